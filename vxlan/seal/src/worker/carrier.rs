use std::{
    io::Write,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use weft_model::NodeId;

use super::{outbox::Outbox, sealers::Sealers};
use crate::{
    DropReason, Forwarding, Station,
    counters::Tallies,
    frame::{
        ANSWER_ROOM, Answer, Excess, Fragments, Gateway, Headers, Network, Part, REPORT_ROOM,
        Remedy, Splitter, TokenBucket, VNET_LEN, VnetHeader, answer, too_big,
    },
    key::{Content, Flags, HEADER, META, Meta, OVERHEAD, Unsealed},
    networks::Carried,
    routes::{Route, Routes, Way},
    shared::Shared,
};

/// Everything that a frame needs on its way from the TAP to a socket.
pub(super) struct Carrier {
    shared: Arc<Shared>,
    lane: usize,
    now: Instant,
    routes: Arc<Routes>,
    sealers: Sealers,
    outbox: Outbox,
    reports: TokenBucket,
    answer: Box<[u8; ANSWER_ROOM]>,
    report: Box<[u8; REPORT_ROOM]>,
    segment: Box<[u8]>,
}

/// A frame that was read from a TAP.
struct Frame<'a> {
    network: &'a Carried,
    vnet: VnetHeader,
    bytes: &'a mut [u8],
    headers: Headers,
}

/// Who gets a frame, and how.
#[derive(Clone, Copy)]
struct Target<'a> {
    network: &'a Carried,
    node: NodeId,
    route: &'a Route,
}

impl Carrier {
    pub(super) fn new(shared: Arc<Shared>, lane: usize) -> Self {
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
            segment: vec![0; READ_ROOM].into(),
            shared,
        }
    }

    /// Begins a batch: the time and the routes of all its frames.
    pub(super) fn begin(&mut self) {
        self.now = Instant::now();
        let newest = self.shared.routes.load();
        if !Arc::ptr_eq(&newest, &self.routes) {
            self.routes = Arc::clone(&newest);
            self.sealers.retain(&self.routes);
        }
    }

    /// Ends a batch.
    pub(super) fn finish(&mut self) {
        let shared = Arc::clone(&self.shared);
        self.send(&shared.ledger.sealing[self.lane]);
    }

    pub(super) fn routes(&self) -> &Arc<Routes> {
        &self.routes
    }

    /// Whether enough waits that sending it is worth a system call.
    pub(super) fn has_much(&self) -> bool {
        self.outbox.is_full()
    }

    /// Sends what waits, and counts what could not be sent under `tallies`.
    pub(super) fn send(&mut self, tallies: &Tallies) {
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

    pub(super) fn syscall(&self) {
        self.shared.syscalls.sealing[self.lane].add(1);
    }

    /// Carries what was read from a TAP of `network`: vnet header and frame.
    ///
    /// # Errors
    ///
    /// Why it goes no further.
    pub(super) fn carry(
        &mut self,
        network: &Carried,
        routes: &Routes,
        read: &mut [u8],
    ) -> Result<(), DropReason> {
        if network.fault.is_some() {
            return Err(DropReason::UnknownNetwork);
        }
        let vnet = VnetHeader::parse(read).map_err(|_| DropReason::Malformed)?;
        if let Some(gso) = vnet.gso {
            self.shared.used(gso.kind.into()).sealing[self.lane].add(1);
        }
        let bytes = &mut read[VNET_LEN..];
        let headers = Headers::parse(bytes).map_err(|_| DropReason::Malformed)?;
        let forwarding = &*network.forwarding;

        let lookup = |ip| forwarding.neighbours.get(&ip).copied();
        match answer(bytes, &headers, lookup, &mut self.answer) {
            Answer::Forward => {}
            Answer::Quiet => return Ok(()),
            Answer::Unknown => return Err(DropReason::Unanswerable),
            Answer::Reply(len) => {
                self.write_back(network, &self.answer[..len]);
                return Ok(());
            }
        }
        let mut frame = Frame { network, vnet, bytes, headers };
        match headers.destination {
            None => self.flood(routes, &mut frame),
            Some(mac) => {
                let station =
                    forwarding.stations.get(&mac).filter(|own| is_for(&headers, own, forwarding));
                let node = station.ok_or(DropReason::UnknownDestination)?.node;
                self.seal(Target { network, node, route: routes.to(node)? }, &mut frame)
            }
        }
    }

    /// Sends a copy to every node that gets the network's broadcast and multicast.
    fn flood(&mut self, routes: &Routes, frame: &mut Frame<'_>) -> Result<(), DropReason> {
        let network = frame.network;
        if network.forwarding.flood.is_empty() {
            return Err(DropReason::Unanswerable);
        }
        for &node in &network.forwarding.flood {
            let sealed =
                routes.to(node).and_then(|route| self.seal(Target { network, node, route }, frame));
            if let Err(reason) = sealed {
                network.ledger.sealing[self.lane].dropped(reason, 1);
            }
        }
        Ok(())
    }

    /// Seals a frame as one packet, or as the segments of a super-frame.
    #[inline]
    fn seal(&mut self, target: Target<'_>, frame: &mut Frame<'_>) -> Result<(), DropReason> {
        let splitter = frame.splitter()?;
        let longest = splitter.packet_len();
        if longest > target.route.inner_mtu {
            return self.seal_excess(target, frame, longest);
        }
        for index in 0..splitter.segments() {
            let len = splitter.segment_len(index);
            self.seal_packet(target, splitter.part(index), len, |room| {
                splitter.write(index, room);
            })?;
        }
        Ok(())
    }

    /// Does what can be done for a frame that is too large for the path.
    #[cold]
    fn seal_excess(
        &mut self,
        target: Target<'_>,
        frame: &mut Frame<'_>,
        longest: usize,
    ) -> Result<(), DropReason> {
        let gateway = gateway(&target.network.forwarding);
        let excess = Excess { longest, mtu: target.route.inner_mtu };
        match too_big(frame.bytes, &frame.headers, excess, &gateway, &mut self.report) {
            Remedy::Drop => Err(DropReason::TooBig),
            Remedy::Report(len) => {
                if self.reports.take(self.now) {
                    self.write_back(target.network, &self.report[..len]);
                }
                Err(DropReason::TooBig)
            }
            Remedy::Carry => self.seal_fragmentable(target, frame),
            Remedy::Fragment => {
                // Borrowed for a while: each segment is written there whole, to be cut.
                let mut room = std::mem::take(&mut self.segment);
                let sealed = self.seal_fragments(target, frame, &mut room);
                self.segment = room;
                sealed
            }
        }
    }

    /// Seals the fragments of each segment.
    fn seal_fragments(
        &mut self,
        target: Target<'_>,
        frame: &Frame<'_>,
        room: &mut [u8],
    ) -> Result<(), DropReason> {
        let splitter = frame.splitter()?;
        for index in 0..splitter.segments() {
            let len = splitter.write(index, room);
            let segment = &mut room[..len];
            let headers = Headers::parse(segment).map_err(|_| DropReason::Malformed)?;
            let partial = splitter.part(index).partial;
            let fragments = Fragments::new(segment, &headers, partial, target.route.inner_mtu)
                .map_err(|_| DropReason::TooBig)?;
            for index in 0..fragments.count() {
                let len = fragments.len(index);
                self.seal_packet(target, Part::default(), len, |room| {
                    fragments.write(index, room);
                })?;
            }
        }
        Ok(())
    }

    /// Seals IPv6 packets that no sender makes smaller: the underlay cuts them.
    fn seal_fragmentable(
        &mut self,
        target: Target<'_>,
        frame: &Frame<'_>,
    ) -> Result<(), DropReason> {
        let Way::Straight(hops) = &target.route.way else { return Err(DropReason::TooBig) };
        let hop = &hops[self.lane % hops.len()];
        let splitter = frame.splitter()?;
        for index in 0..splitter.segments() {
            let len = splitter.segment_len(index);
            let mut packet = vec![0; len + OVERHEAD];
            splitter.write(index, &mut packet[HEADER + META..]);
            describe(target.network, splitter.part(index), &mut packet);
            self.sealers.of(target.route)?.seal(self.now, &mut packet).map_err(unsealed)?;
            let sent = self.shared.sockets[hop.socket].send_fragmentable(&packet, &hop.to);
            sent.map_err(|_| DropReason::TooBig)?;
            target.network.ledger.sealing[self.lane].carried(1, len as u64);
        }
        Ok(())
    }

    /// Seals one packet whose frame has `len` bytes and is written by `write`.
    #[inline]
    fn seal_packet(
        &mut self,
        target: Target<'_>,
        part: Part,
        len: usize,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), DropReason> {
        let Target { network, node, route } = target;
        let sealer = self.sealers.of(route)?;
        let before = sealer.rekeys();
        let packet = self.outbox.room(len + OVERHEAD, &self.shared.syscalls.sealing[self.lane]);
        write(&mut packet[HEADER + META..HEADER + META + len]);
        describe(network, part, packet);
        sealer.seal(self.now, packet).map_err(unsealed)?;
        if sealer.rekeys() > before {
            self.shared.rekeys.sealing[self.lane].add(1);
        }

        match &route.way {
            Way::Straight(hops) => self.outbox.push(len + OVERHEAD, &hops[self.lane % hops.len()]),
            Way::Relay => {
                if !self.shared.relay(node, packet) {
                    return Err(DropReason::Queue);
                }
            }
        }
        network.ledger.sealing[self.lane].carried(1, len as u64);
        Ok(())
    }

    /// Writes a frame of our own back into the TAP that another came from.
    fn write_back(&self, network: &Carried, bytes: &[u8]) {
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

impl Frame<'_> {
    fn splitter(&self) -> Result<Splitter<'_>, DropReason> {
        Splitter::new(self.bytes, &self.headers, self.vnet).map_err(|_| DropReason::Malformed)
    }
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

/// Whether the station may get the packet: as the source of a packet must be its station's, so must
/// the destination. Addresses are lent, MACs are only claimed: who claims another's gets nothing.
/// A router gets what it forwards: all but packets for stations of others.
#[inline]
fn is_for(headers: &Headers, station: &Station, forwarding: &Forwarding) -> bool {
    let Network::Ip(ip) = headers.network else { return true };
    let group = match ip.destination {
        IpAddr::V4(to) => to.is_multicast() || to.is_broadcast(),
        IpAddr::V6(to) => to.is_multicast(),
    };
    let forwarded = || station.router && !forwarding.is_elsewhere(ip.destination, station.node);
    group || station.ips.contains(&ip.destination) || forwarded()
}

fn gateway(forwarding: &Forwarding) -> Gateway {
    let mut gateway = Gateway { mac: forwarding.gateway_mac, v4: None, v6: None };
    for ip in &forwarding.gateways {
        match ip {
            IpAddr::V4(ip) => gateway.v4 = gateway.v4.or(Some(*ip)),
            IpAddr::V6(ip) => gateway.v6 = gateway.v6.or(Some(*ip)),
        }
    }
    gateway
}

/// A vnet header and the longest frame: Ethernet with two tags and the longest packet of IPv6.
pub(super) const READ_ROOM: usize = VNET_LEN + 14 + 8 + 40 + 65_535;

/// So many "too big" reports at once, and then one each interval.
const REPORT_BURST: u32 = 32;
const REPORT_INTERVAL: Duration = Duration::from_millis(5);
