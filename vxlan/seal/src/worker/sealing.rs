use std::{
    collections::{BTreeMap, btree_map::Entry},
    io::{self, Read, Write},
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use weft_model::NodeId;

use super::outbox::Outbox;
use crate::{
    DropReason, Forwarding,
    counters::Tallies,
    frame::{
        ANSWER_ROOM, Answer, Excess, Fragments, Gateway, Headers, Part, REPORT_ROOM, Remedy,
        Splitter, TokenBucket, VNET_LEN, VnetHeader, answer, too_big,
    },
    key::{Content, Flags, HEADER, Lane, Limits, META, Meta, OVERHEAD, RootId, Sealer, Unsealed},
    networks::{Carried, Snapshot},
    routes::{Route, Routes, Way},
    shared::Shared,
    stop::Waker,
};

/// Seals the frames that one lane's TAP queues say, and sends them to whom they are for.
pub(super) struct Sealing {
    shared: Arc<Shared>,
    lane: usize,
    poller: Poller,
    read: Box<[u8]>,
    carrier: Carrier,
}

/// Everything that one frame needs on its way from the TAP to a socket.
struct Carrier {
    shared: Arc<Shared>,
    lane: usize,
    now: Instant,
    routes: Arc<Routes>,
    sealers: Sealers,
    outbox: Outbox,
    reports: TokenBucket,
    answer: Box<[u8; ANSWER_ROOM]>,
    report: Box<[u8; REPORT_ROOM]>,
    fragments: Box<[u8]>,
}

impl Sealing {
    pub(super) fn new(shared: Arc<Shared>, lane: usize) -> io::Result<Self> {
        let snapshot = shared.networks.snapshot().load_full();
        let poller = Poller::new(lane, shared.sockets.len(), snapshot, &shared.stop.sealing[lane])?;
        let carrier = Carrier::new(Arc::clone(&shared), lane);
        Ok(Self { shared, lane, poller, read: vec![0; READ_ROOM].into(), carrier })
    }

    pub(super) fn run(mut self) {
        let mut ready = Vec::with_capacity(MAX_READY);
        while !self.shared.stop.is_set() {
            if let Err(error) = self.poller.wait(&mut ready) {
                self.shared.worker_failed("seal-out", &format!("epoll: {error}"));
                self.waker().wait(1);
                continue;
            }
            self.refresh(&mut ready);
            self.carrier.begin();
            for &place in &ready {
                self.drain(place);
            }
            self.carrier.finish();
        }
    }

    fn waker(&self) -> &Waker {
        &self.shared.stop.sealing[self.lane]
    }

    /// Takes the newest snapshot of the networks; reads other queues if the TAPs are others.
    fn refresh(&mut self, ready: &mut Vec<usize>) {
        if ready.contains(&WAKER) {
            self.waker().clear();
            ready.retain(|place| *place != WAKER);
        }
        let newest = self.shared.networks.snapshot().load();
        if Arc::ptr_eq(&newest, &self.poller.snapshot) {
            return;
        }
        let newest = Arc::clone(&newest);
        if self.poller.reads_the_same(&newest) {
            self.poller.snapshot = newest;
            return;
        }
        ready.clear();
        match Poller::new(self.lane, self.shared.sockets.len(), newest, self.waker()) {
            Ok(poller) => self.poller = poller,
            Err(error) => self.shared.worker_failed("seal-out", &format!("epoll: {error}")),
        }
    }

    /// Reads what a queue has, up to a budget, so that others get their turn.
    fn drain(&mut self, place: usize) {
        let Some(&(network, queue)) = self.poller.places.get(place) else { return };
        let network = Arc::clone(&self.poller.snapshot.all[network]);
        let tallies = &network.ledger.sealing[self.lane];
        for _ in 0..BUDGET {
            self.carrier.syscall();
            match (&network.tap.queues[queue]).read(&mut self.read) {
                Ok(len) => {
                    if let Err(reason) = self.carrier.carry(&network, &mut self.read[..len]) {
                        tallies.dropped(reason, 1);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.poller.forget(place);
                    return self.shared.tap_failed(&network, &error);
                }
            }
            if self.carrier.outbox.is_full() {
                self.carrier.send(tallies);
            }
        }
        self.carrier.send(tallies);
    }
}

impl Carrier {
    fn new(shared: Arc<Shared>, lane: usize) -> Self {
        let now = Instant::now();
        Self {
            lane,
            now,
            routes: shared.routes.load_full(),
            sealers: Sealers::new(lane, shared.config.limits),
            outbox: Outbox::new(Arc::clone(&shared), lane),
            reports: TokenBucket::new(REPORT_BURST, REPORT_INTERVAL, now),
            answer: Box::new([0; ANSWER_ROOM]),
            report: Box::new([0; REPORT_ROOM]),
            fragments: vec![0; READ_ROOM].into(),
            shared,
        }
    }

    /// Begins a batch: the time and the routes of all its frames.
    fn begin(&mut self) {
        self.now = Instant::now();
        let newest = self.shared.routes.load();
        if !Arc::ptr_eq(&newest, &self.routes) {
            self.routes = Arc::clone(&newest);
            self.sealers.retain(&self.routes);
        }
    }

    /// Ends a batch.
    fn finish(&mut self) {
        let shared = Arc::clone(&self.shared);
        self.send(&shared.ledger.sealing[self.lane]);
    }

    /// Sends what waits, and counts what could not be sent under `tallies`.
    fn send(&mut self, tallies: &Tallies) {
        self.outbox.flush(&self.shared.syscalls.sealing[self.lane]);
        let lost = self.outbox.take_lost();
        for (reason, packets) in [
            (DropReason::Queue, lost.queue),
            (DropReason::TooBig, lost.too_big),
            (DropReason::NoPath, lost.no_path),
        ] {
            if packets > 0 {
                tallies.dropped(reason, packets);
            }
        }
    }

    fn syscall(&self) {
        self.shared.syscalls.sealing[self.lane].add(1);
    }

    /// Carries what was read from a TAP of `network`: vnet header and frame.
    fn carry(&mut self, network: &Carried, read: &mut [u8]) -> Result<(), DropReason> {
        if network.fault.is_some() {
            return Err(DropReason::UnknownNetwork);
        }
        let malformed = |_| DropReason::Malformed;
        let vnet = VnetHeader::parse(read).map_err(|_| DropReason::Malformed)?;
        if let Some(gso) = vnet.gso {
            self.shared.used(gso.kind.into()).sealing[self.lane].add(1);
        }
        let frame = &mut read[VNET_LEN..];
        let headers = Headers::parse(frame).map_err(malformed)?;
        let forwarding = &*network.forwarding;

        let lookup = |ip| forwarding.neighbours.get(&ip).copied();
        match answer(frame, &headers, lookup, &mut self.answer) {
            Answer::Forward => {}
            Answer::Quiet => return Ok(()),
            Answer::Unknown => return Err(DropReason::Unanswerable),
            Answer::Reply(len) => {
                self.write_back(network, Back::Answer(len));
                return Ok(());
            }
        }
        let Some(destination) = headers.destination else {
            return self.flood(network, vnet, frame, &headers);
        };
        match forwarding.stations.get(&destination) {
            Some(station) => self.seal(network, station.node, vnet, frame, &headers),
            None => Err(DropReason::UnknownDestination),
        }
    }

    /// Sends a copy to every node that gets the network's broadcast and multicast.
    fn flood(
        &mut self,
        network: &Carried,
        vnet: VnetHeader,
        frame: &mut [u8],
        headers: &Headers,
    ) -> Result<(), DropReason> {
        if network.forwarding.flood.is_empty() {
            return Err(DropReason::Unanswerable);
        }
        for &node in &network.forwarding.flood {
            if let Err(reason) = self.seal(network, node, vnet, frame, headers) {
                network.ledger.sealing[self.lane].dropped(reason, 1);
            }
        }
        Ok(())
    }

    /// Seals a frame for `node`, as one packet or as the segments of a super-frame.
    fn seal(
        &mut self,
        network: &Carried,
        node: NodeId,
        vnet: VnetHeader,
        frame: &mut [u8],
        headers: &Headers,
    ) -> Result<(), DropReason> {
        let routes = Arc::clone(&self.routes);
        let route = routes.to(node)?;
        let splitter = Splitter::new(frame, headers, vnet).map_err(|_| DropReason::Malformed)?;
        if splitter.packet_len() > route.inner_mtu {
            return self.seal_narrow(network, node, route, vnet, frame, headers);
        }
        for index in 0..splitter.segments() {
            let len = splitter.segment_len(index);
            self.seal_packet(network, node, route, splitter.part(index), len, |room| {
                splitter.write(index, room);
            })?;
        }
        Ok(())
    }

    /// Does what can be done for a frame that is too large for the path.
    #[cold]
    fn seal_narrow(
        &mut self,
        network: &Carried,
        node: NodeId,
        route: &Route,
        vnet: VnetHeader,
        frame: &mut [u8],
        headers: &Headers,
    ) -> Result<(), DropReason> {
        let gateway = gateway(&network.forwarding);
        let splitter = Splitter::new(frame, headers, vnet).map_err(|_| DropReason::Malformed)?;
        let excess = Excess { longest: splitter.packet_len(), mtu: route.inner_mtu };
        match too_big(frame, headers, excess, &gateway, &mut self.report) {
            Remedy::Drop => Err(DropReason::TooBig),
            Remedy::Report(len) => {
                if self.reports.take(self.now) {
                    self.write_back(network, Back::Report(len));
                }
                Err(DropReason::TooBig)
            }
            Remedy::Carry => self.seal_fragmentable(network, route, vnet, frame, headers),
            Remedy::Fragment => self.seal_fragments(network, node, route, vnet, frame, headers),
        }
    }

    fn seal_fragments(
        &mut self,
        network: &Carried,
        node: NodeId,
        route: &Route,
        vnet: VnetHeader,
        frame: &mut [u8],
        headers: &Headers,
    ) -> Result<(), DropReason> {
        let malformed = |_| DropReason::Malformed;
        let splitter = Splitter::new(frame, headers, vnet).map_err(malformed)?;
        // Borrowed for a while: each segment is written there whole, to be cut.
        let mut whole = std::mem::take(&mut self.fragments);
        let mut result = Ok(());
        for index in 0..splitter.segments() {
            let len = splitter.write(index, &mut whole);
            let segment = &mut whole[..len];
            let partial = splitter.part(index).partial;
            result = Headers::parse(segment).map_err(malformed).and_then(|headers| {
                let fragments = Fragments::new(segment, &headers, partial, route.inner_mtu)
                    .map_err(|_| DropReason::TooBig)?;
                (0..fragments.count()).try_for_each(|index| {
                    let len = fragments.len(index);
                    self.seal_packet(network, node, route, Part::default(), len, |room| {
                        fragments.write(index, room);
                    })
                })
            });
            if result.is_err() {
                break;
            }
        }
        self.fragments = whole;
        result
    }

    /// Seals a small IPv6 packet that the path does not take in one piece: the underlay cuts it.
    fn seal_fragmentable(
        &mut self,
        network: &Carried,
        route: &Route,
        vnet: VnetHeader,
        frame: &mut [u8],
        headers: &Headers,
    ) -> Result<(), DropReason> {
        let Way::Straight(hops) = &route.way else { return Err(DropReason::TooBig) };
        let splitter = Splitter::new(frame, headers, vnet).map_err(|_| DropReason::Malformed)?;
        let hop = &hops[self.lane % hops.len()];
        for index in 0..splitter.segments() {
            let len = splitter.segment_len(index);
            let mut packet = vec![0; len + OVERHEAD];
            splitter.write(index, &mut packet[HEADER + META..]);
            describe(network, splitter.part(index), &mut packet);
            self.sealers.of(route)?.seal(self.now, &mut packet).map_err(unsealed)?;
            let sent = self.shared.sockets[hop.socket].send_fragmentable(&packet, &hop.to);
            sent.map_err(|_| DropReason::TooBig)?;
            network.ledger.sealing[self.lane].carried(1, len as u64);
        }
        Ok(())
    }

    /// Seals one packet whose frame has `len` bytes and is written by `write`.
    #[inline]
    fn seal_packet(
        &mut self,
        network: &Carried,
        node: NodeId,
        route: &Route,
        part: Part,
        len: usize,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), DropReason> {
        let sealed_len = len + OVERHEAD;
        let sealer = self.sealers.of(route)?;
        let before = sealer.rekeys();
        let packet = self.outbox.room(sealed_len, &self.shared.syscalls.sealing[self.lane]);
        write(&mut packet[HEADER + META..HEADER + META + len]);
        describe(network, part, packet);
        sealer.seal(self.now, packet).map_err(unsealed)?;
        let rekeys = sealer.rekeys() - before;
        if rekeys > 0 {
            self.shared.rekeys.sealing[self.lane].add(rekeys);
        }

        match &route.way {
            Way::Straight(hops) => self.outbox.push(sealed_len, &hops[self.lane % hops.len()]),
            Way::Relay => {
                if !self.shared.relay(node, packet) {
                    return Err(DropReason::Queue);
                }
            }
        }
        network.ledger.sealing[self.lane].carried(1, len as u64);
        Ok(())
    }

    /// Writes something of our own back into the TAP that a frame came from.
    fn write_back(&self, network: &Carried, what: Back) {
        let bytes = match what {
            Back::Answer(len) => &self.answer[..len],
            Back::Report(len) => &self.report[..len],
        };
        let mut framed = [0; VNET_LEN + REPORT_ROOM];
        framed[..VNET_LEN].copy_from_slice(&VnetHeader::default().to_bytes());
        framed[VNET_LEN..VNET_LEN + bytes.len()].copy_from_slice(bytes);
        let queues = &network.tap.queues;
        let mut queue = &queues[self.lane % queues.len()];
        self.syscall();
        if queue.write(&framed[..VNET_LEN + bytes.len()]).is_err() {
            network.ledger.sealing[self.lane].dropped(DropReason::Queue, 1);
        }
    }
}

/// What one lane has borrowed from the roots that are sent with.
struct Sealers {
    lane: Lane,
    limits: Limits,
    by_root: BTreeMap<RootId, Sealer>,
}

impl Sealers {
    fn new(lane: usize, limits: Limits) -> Self {
        let lane = u8::try_from(lane).ok().and_then(|lane| Lane::try_from(lane).ok());
        let lane = lane.expect("a tunnel has no more lanes than a session");
        Self { lane, limits, by_root: BTreeMap::new() }
    }

    #[inline]
    fn of(&mut self, route: &Route) -> Result<&mut Sealer, DropReason> {
        match self.by_root.entry(route.root.id()) {
            Entry::Occupied(sealer) => Ok(sealer.into_mut()),
            Entry::Vacant(place) => route
                .root
                .sealer(self.lane, route.suite, self.limits)
                .map(|sealer| place.insert(sealer))
                .map_err(|_| DropReason::NoKey),
        }
    }

    /// Gives back the lane, counter and all, of roots that are sent with no longer.
    fn retain(&mut self, routes: &Routes) {
        self.by_root.retain(|root, sealer| {
            let used = |route: &Route| route.root.id() == *root && route.suite == sealer.suite();
            routes.peers.values().flatten().any(used)
        });
    }
}

#[derive(Clone, Copy)]
enum Back {
    Answer(usize),
    Report(usize),
}

/// Writes the description of a packet where it belongs.
#[inline]
fn describe(network: &Carried, part: Part, packet: &mut [u8]) {
    let mut flags = Flags::NONE;
    if part.partial {
        flags = flags.with(Flags::PARTIAL_CHECKSUM);
    }
    if part.last {
        flags = flags.with(Flags::LAST);
    }
    let content = if part.segment { Content::Segment } else { Content::Frame };
    let meta = Meta { content, flags, index: part.index, network: network.number };
    let room = packet[HEADER..].first_chunk_mut::<META>().expect("a packet has room for it");
    meta.encode(room);
}

fn unsealed(error: Unsealed) -> DropReason {
    match error {
        Unsealed::Exhausted => DropReason::NoKey,
        Unsealed::Expired => DropReason::Expired,
        Unsealed::Size { .. } => DropReason::TooBig,
    }
}

fn gateway(forwarding: &Forwarding) -> Gateway {
    let mut gateway = Gateway { mac: forwarding.gateway_mac, v4: None, v6: None };
    for ip in &forwarding.gateways {
        match ip {
            std::net::IpAddr::V4(ip) => gateway.v4 = gateway.v4.or(Some(*ip)),
            std::net::IpAddr::V6(ip) => gateway.v6 = gateway.v6.or(Some(*ip)),
        }
    }
    gateway
}

/// The TAP queues that one lane reads.
struct Poller {
    epoll: Epoll,
    snapshot: Arc<Snapshot>,
    /// What each token means: network in the snapshot, queue of its TAP.
    places: Vec<(usize, usize)>,
}

impl Poller {
    fn new(lane: usize, lanes: usize, snapshot: Arc<Snapshot>, waker: &Waker) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(waker, EpollEvent::new(EpollFlags::EPOLLIN, WAKER as u64))?;
        let mut places = Vec::new();
        for (network, carried) in snapshot.all.iter().enumerate() {
            for (queue, file) in carried.tap.queues.iter().enumerate() {
                if queue % lanes == lane {
                    let event = EpollEvent::new(EpollFlags::EPOLLIN, places.len() as u64);
                    epoll.add(file.as_fd(), event)?;
                    places.push((network, queue));
                }
            }
        }
        Ok(Self { epoll, snapshot, places })
    }

    /// Waits until a queue has something, or somebody calls.
    fn wait(&self, ready: &mut Vec<usize>) -> Result<(), Errno> {
        ready.clear();
        let mut events = [EpollEvent::empty(); MAX_READY];
        match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(count) => ready.extend(events[..count].iter().map(|event| event.data() as usize)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Reads a queue no more: its TAP has gone.
    fn forget(&self, place: usize) {
        if let Some(&(network, queue)) = self.places.get(place) {
            let _ = self.epoll.delete(self.snapshot.all[network].tap.queues[queue].as_fd());
        }
    }

    fn reads_the_same(&self, newest: &Snapshot) -> bool {
        let (old, new) = (&self.snapshot.all, &newest.all);
        old.len() == new.len()
            && old.iter().zip(new).all(|(old, new)| Arc::ptr_eq(&old.tap, &new.tap))
    }
}

/// The token of the waker among those of the queues.
const WAKER: usize = usize::MAX;

const MAX_READY: usize = 32;

/// Frames that one queue may have at a time.
const BUDGET: usize = 64;

/// A vnet header and the longest frame: Ethernet with two tags and the longest packet of IPv6.
const READ_ROOM: usize = VNET_LEN + 14 + 8 + 40 + 65_535;

/// So many "too big" reports at once, and then one each interval.
const REPORT_BURST: u32 = 32;
const REPORT_INTERVAL: Duration = Duration::from_millis(5);
