use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ops::Range,
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use weft_model::NodeId;

use super::{
    stations::SeenFrom,
    writer::{Key, Writer},
};
use crate::{
    DropReason, Offload,
    control::Event,
    counters::Tallies,
    frame::{Arrival, Coalescer, Headers, Part, check_source},
    key::{Content, Flags, HEADER, Header, Lane, META, Meta, Opener, Refused, RootId, TAG},
    mmsg::{Received, Receives, Rooms},
    routes::Sessions,
    shared::Shared,
};

/// A sealed packet that did not come by the socket of the lane that opens it: it was relayed, or
/// sent to another lane's port.
pub(crate) type Parcel = Vec<u8>;

/// The receiving end of a lane's parcels; it outlives the thread's loop.
pub(crate) type Parcels = Mutex<mpsc::Receiver<Parcel>>;

/// Opens what one lane's socket receives, and writes it to the TAPs.
///
/// The openers of a lane belong to one thread, so that no replay gets through a second window:
/// the peer's lane L is opened by lane L modulo the number of lanes here, and whatever comes to
/// another socket is handed over.
pub(super) struct Opening {
    shared: Arc<Shared>,
    lane: usize,
    parcels: Arc<Parcels>,
    receives: Receives,
    sessions: Arc<Sessions>,
    openers: Openers,
    writer: Writer,
    coalescer: Coalescer<Key>,
}

impl Opening {
    pub(super) fn new(shared: Arc<Shared>, lane: usize, parcels: Arc<Parcels>) -> Self {
        let rooms = match shared.offloads.is_on(Offload::UdpGro) {
            true => Rooms::AGGREGATES,
            false => Rooms::PACKETS,
        };
        let sessions = shared.sessions.load_full();
        let writer = Writer::new(Arc::clone(&shared), lane);
        let coalescer = Coalescer::new(writer.accepts());
        let openers = Openers::default();
        let receives = Receives::new(rooms);
        Self { shared, lane, parcels, receives, sessions, openers, writer, coalescer }
    }

    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        while !shared.stop.is_set() {
            let handed = self.take_parcels();
            if handed > 0 {
                self.open_batch(handed);
            }
            shared.syscalls.opening[self.lane].add(1);
            match self.receives.receive(&shared.sockets[self.lane]) {
                Ok(count) => self.open_batch(count),
                // Nobody calls again for parcels that did not fit the batch.
                Err(Errno::EAGAIN) if handed == 0 => self.wait(),
                Err(Errno::EAGAIN) => {}
                // An ICMP error about something that was sent is told to whoever receives.
                Err(_) => {}
            }
        }
    }

    /// Waits until there is something to receive, or somebody calls.
    fn wait(&mut self) {
        let socket = &self.shared.sockets[self.lane];
        let waker = &self.shared.stop.opening[self.lane];
        let mut fds = [
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(waker.as_fd(), PollFlags::POLLIN),
        ];
        self.shared.syscalls.opening[self.lane].add(1);
        let _ = poll(&mut fds, PollTimeout::NONE);
        if fds[1].any().unwrap_or_default() {
            waker.clear();
            // Keys that are no longer valid must not wait for the next packet to be wiped.
            self.refresh();
        }
    }

    /// Puts handed-over packets where received ones would lie.
    fn take_parcels(&mut self) -> usize {
        let parcels = self.parcels.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        while count < self.receives.slots()
            && let Ok(parcel) = parcels.try_recv()
        {
            self.receives.place(count, &parcel);
            count += 1;
        }
        count
    }

    /// Opens everything that lies in the first `count` slots.
    fn open_batch(&mut self, count: usize) {
        let now = Instant::now();
        self.refresh();
        for slot in 0..count {
            let received = self.receives.received(slot);
            if received.truncated || received.run.bytes.is_empty() {
                self.tallies().dropped(DropReason::Malformed, 1);
                continue;
            }
            let Received { run, .. } = received;
            if run.packets() > 1 {
                self.shared.used(Offload::UdpGro).opening[self.lane].add(1);
            }
            for packet in run.singles() {
                if let Err(reason) = self.open(now, slot, packet.bytes) {
                    self.tallies().dropped(reason, 1);
                }
            }
        }
        // The arena is received into again: nothing may refer to it any longer.
        let Self { writer, coalescer, receives, .. } = self;
        coalescer.flush(receives.arena(), |built| writer.write(&built));
        coalescer.accept(writer.accepts());
    }

    /// Takes the newest snapshots of networks and sessions.
    fn refresh(&mut self) {
        self.writer.refresh();
        self.coalescer.accept(self.writer.accepts());
        let sessions = self.shared.sessions.load();
        if !Arc::ptr_eq(&sessions, &self.sessions) {
            self.sessions = Arc::clone(&sessions);
            self.openers.retain(&self.sessions);
        }
    }

    /// Opens one packet in the arena.
    #[inline]
    fn open(&mut self, now: Instant, slot: usize, packet: Range<usize>) -> Result<(), DropReason> {
        let bytes = &self.receives.arena()[packet.clone()];
        let header = Header::decode(bytes).map_err(|_| DropReason::Malformed)?;
        let owner = usize::from(header.lane.number()) % self.shared.sockets.len();
        if header.lane == Lane::CONTROL || owner != self.lane {
            return self.hand_on(&header, owner, slot, bytes);
        }

        let bytes = &mut self.receives.arena_mut()[packet.clone()];
        let Opened { session, peer, tell } =
            self.openers.open(&self.sessions, &self.shared, header, now, bytes)?;
        let opened = &bytes[HEADER..bytes.len() - TAG];
        let (meta, _) = Meta::decode(opened).map_err(|_| DropReason::Malformed)?;
        if tell && let Some(from) = self.receives.from(slot) {
            self.shared.tell_control(Event::Heard { peer, socket: self.lane, from });
        }
        let network = self.writer.networks.by_number.get(&meta.network);
        let network = network.ok_or(DropReason::UnknownNetwork)?;
        let frame = packet.start + HEADER + META..packet.end - TAG;
        network.ledger.opening[self.lane].carried(1, frame.len() as u64);

        let arrival = Arrival {
            key: (meta.network, session),
            counter: header.counter,
            part: part(meta)?,
            frame,
        };
        if let Err(reason) = self.admit(peer, arrival) {
            self.drop_from(meta.network, reason);
        }
        Ok(())
    }

    /// Judges an opened frame and puts it together with its neighbours.
    #[inline]
    fn admit(&mut self, peer: NodeId, arrival: Arrival<Key>) -> Result<(), DropReason> {
        let Self { writer, coalescer, receives, .. } = self;
        let Some(network) = writer.networks.by_number.get(&arrival.key.0) else {
            return Err(DropReason::UnknownNetwork);
        };
        let bytes = &receives.arena()[arrival.frame.clone()];
        let headers = Headers::parse(bytes).map_err(|_| DropReason::Malformed)?;
        let stations = SeenFrom { peer, forwarding: &network.forwarding };
        check_source(bytes, &headers, &stations).map_err(|_| DropReason::Spoofed)?;
        coalescer
            .push(receives.arena(), arrival, &headers, |built| writer.write(&built))
            .map_err(|_| DropReason::Malformed)
    }

    /// Gives a packet that another thread opens to that one.
    #[cold]
    fn hand_on(
        &self,
        header: &Header,
        owner: usize,
        slot: usize,
        packet: &[u8],
    ) -> Result<(), DropReason> {
        // Whoever does not know a tag cannot fill others' queues.
        if !self.sessions.by_tag.contains_key(&header.tag) {
            return Err(DropReason::UnknownPeer);
        }
        let packet = packet.to_vec();
        let handed = if header.lane == Lane::CONTROL {
            let from = self.receives.from(slot).ok_or(DropReason::Malformed)?;
            self.shared.tell_control(Event::Received { socket: self.lane, from, packet })
        } else {
            self.shared.hand_over(owner, packet)
        };
        if handed { Ok(()) } else { Err(DropReason::Queue) }
    }

    fn drop_from(&self, network: u32, reason: DropReason) {
        match self.writer.networks.by_number.get(&network) {
            Some(network) => network.ledger.opening[self.lane].dropped(reason, 1),
            None => self.tallies().dropped(reason, 1),
        }
    }

    /// The counters of what belongs to no network yet.
    fn tallies(&self) -> &Tallies {
        &self.shared.ledger.opening[self.lane]
    }
}

/// What a packet says of the frame in it.
fn part(meta: Meta) -> Result<Part, DropReason> {
    let segment = match meta.content {
        Content::Frame => false,
        Content::Segment => true,
        _ => return Err(DropReason::Malformed),
    };
    Ok(Part {
        segment,
        partial: meta.flags.has(Flags::PARTIAL_CHECKSUM),
        last: meta.flags.has(Flags::LAST),
        index: meta.index,
    })
}

/// The openers that one thread has borrowed from their roots.
#[derive(Default)]
struct Openers {
    by_root: BTreeMap<(RootId, Lane), Borrowed>,
}

struct Borrowed {
    opener: Opener,
    /// When the control thread was told that the peer is heard.
    told: Option<Instant>,
}

/// Whose packet was opened.
struct Opened {
    /// A number for the session, for as long as sessions are what they are.
    session: u32,
    peer: NodeId,
    /// Whether it is time to tell the control thread.
    tell: bool,
}

impl Openers {
    /// Opens `packet` with whichever session it is of; tells which one, and the peer.
    fn open(
        &mut self,
        sessions: &Sessions,
        shared: &Shared,
        header: Header,
        now: Instant,
        packet: &mut [u8],
    ) -> Result<Opened, DropReason> {
        let candidates = sessions.by_tag.get(&header.tag).map(Vec::as_slice).unwrap_or_default();
        // A wrong key destroys the packet: where several are possible, each gets a copy.
        let copy = (candidates.len() > 1).then(|| packet.to_vec());
        let mut refused = DropReason::UnknownPeer;
        for (index, session) in candidates.iter().enumerate() {
            if let Some(copy) = &copy {
                packet.copy_from_slice(copy);
            }
            let key = (session.root.id(), header.lane);
            let Borrowed { opener, told } = match self.by_root.entry(key) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    match session.root.opener(header.lane, &shared.config.suites) {
                        Ok(opener) => entry.insert(Borrowed { opener, told: None }),
                        Err(_) => {
                            refused = DropReason::NoKey;
                            continue;
                        }
                    }
                }
            };
            let mut result = opener.open(now, packet).map(drop);
            if result == Err(Refused::Epoch) {
                // Perhaps all packets of many epochs were lost: the peer says in its probes where
                // its lanes are.
                opener.catch_up(session.epoch(header.lane));
                result = opener.open(now, packet).map(drop);
            }
            match result {
                Ok(()) => {
                    let tell = told.is_none_or(|told| now.duration_since(told) >= TELL_INTERVAL);
                    if tell {
                        *told = Some(now);
                    }
                    let number = header.tag.wrapping_add(index as u32);
                    return Ok(Opened { session: number, peer: session.peer, tell });
                }
                Err(error) => refused = reason(error),
            }
        }
        Err(refused)
    }

    /// Gives the openers of roots that are no longer valid back.
    fn retain(&mut self, sessions: &Sessions) {
        let valid: BTreeSet<_> =
            sessions.by_tag.values().flatten().map(|session| session.root.id()).collect();
        self.by_root.retain(|(root, _), _| valid.contains(root));
    }
}

pub(crate) fn reason(refused: Refused) -> DropReason {
    match refused {
        Refused::Malformed(_) => DropReason::Malformed,
        Refused::Foreign => DropReason::UnknownPeer,
        Refused::Suite | Refused::Exhausted => DropReason::NoKey,
        Refused::Expired => DropReason::Expired,
        Refused::Replay => DropReason::Replay,
        Refused::Epoch => DropReason::Epoch,
        Refused::Auth => DropReason::Auth,
    }
}

/// How often the control thread is told that a peer is heard.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::{TunnelConfig, key::OVERHEAD};

    #[test]
    fn however_many_parcels_come_at_once_none_waits_for_the_next_one() {
        let (shared, ends) = Shared::open(TunnelConfig::on_loopback(16_811)).unwrap();
        let parcels = Arc::new(ends.parcels.into_iter().next().unwrap());
        let count = 4 * Rooms::PACKETS.count as u64 + 1;
        // Of lane 0, of a session that nobody knows: opened, and counted as that.
        let parcel = [&[0x11][..], &[0; OVERHEAD - 1]].concat();
        for _ in 0..count {
            assert!(shared.hand_over(0, parcel.clone()));
        }

        let opened = counted(&shared, parcels, DropReason::UnknownPeer, count);
        assert_eq!(opened, count, "parcels are left lying");
    }

    #[test]
    fn a_datagram_of_nothing_is_counted_too() {
        let (shared, ends) = Shared::open(TunnelConfig::on_loopback(16_815)).unwrap();
        let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..3 {
            sender.send_to(&[], shared.sockets[0].local()).unwrap();
        }
        let parcels = Arc::new(ends.parcels.into_iter().next().unwrap());
        assert_eq!(counted(&shared, parcels, DropReason::Malformed, 3), 3);
    }

    /// Runs lane 0 until it has dropped `count` packets for `reason`; tells how many it has.
    fn counted(shared: &Arc<Shared>, parcels: Arc<Parcels>, reason: DropReason, count: u64) -> u64 {
        let own = Arc::clone(shared);
        let thread = thread::spawn(move || Opening::new(own, 0, parcels).run());
        let dropped = || shared.ledger.read().dropped(reason);
        let deadline = Instant::now() + Duration::from_secs(10);
        while dropped() < count && Instant::now() < deadline {
            thread::yield_now();
        }
        shared.stop.set();
        thread.join().unwrap();
        dropped()
    }
}
