use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use weft_model::NodeId;

use super::book::{Action, Config};
use super::message::{RELAY_OVERHEAD, SMALL};
use super::mtu::Mtu;
use super::relay::{Choice, Offer};
use super::route::{Kind, Route, Via, Way, datagram_overhead};
use super::track::{BUSY, FAST, IDLE, SILENT, Source, Track};
use crate::key::RootId;

/// How long direct ways are waited for before a relay is asked.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a relay may take to prove that it reaches the peer.
const RELAY_PATIENCE: Duration = Duration::from_millis(1500);

/// How long a route is used that answers no longer, while there is no other.
const LINGER: Duration = Duration::from_secs(30);

/// How long an address that a packet came from is used unvalidated, while nothing else works.
const GUESS: Duration = Duration::from_secs(3);

/// How often silent ways are probed while another one works.
const DORMANT: Duration = Duration::from_secs(60);

/// An observed address that does not answer so many probes, in 2.5 seconds, is forgotten.
const OBSERVED_TRIES: u32 = 7;

/// How many observed addresses are kept per socket.
const OBSERVED: usize = 4;

/// The smallest MTU that a path may have: IPv6's (RFC 8200 section 5).
const FLOOR: u16 = 1280;

/// What is known of a peer without asking it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Candidate {
    /// Its lane 0's; the others are at the ports behind it.
    pub address: SocketAddr,
    /// At least one.
    pub lanes: u8,
    /// Whether it offers to relay.
    pub relay: bool,
    /// Whether both nodes share an encrypted network: it is probed more often.
    pub busy: bool,
}

/// What a peer's decisions need beyond the peer itself.
pub(super) struct Surroundings<'a> {
    pub(super) now: Instant,
    pub(super) config: &'a Config,
    /// Relays of all peers.
    pub(super) offers: &'a BTreeMap<NodeId, Offer>,
}

/// Where probes go to, with an id for each.
pub(super) struct Outbox<'a> {
    pub(super) peer: NodeId,
    pub(super) ids: &'a mut u32,
    pub(super) actions: &'a mut Vec<Action>,
}

impl Outbox<'_> {
    fn probe(&mut self, via: Via, size: u16, root: Option<RootId>) -> u32 {
        *self.ids = self.ids.wrapping_add(1);
        self.actions.push(Action::Probe { peer: self.peer, via, id: *self.ids, size, root });
        *self.ids
    }
}

/// One peer: its tracks, and the route that they make.
#[derive(Debug)]
pub(super) struct Peer {
    candidate: Candidate,
    tracks: Vec<Track>,
    /// Of each socket: the way that is in use.
    chosen: BTreeMap<u8, Via>,
    /// Since when no direct way answers.
    alone: Option<Instant>,
    relays: Choice,
    mtu: Option<(Carrier, Mtu)>,
    confirming: BTreeMap<RootId, Backoff>,
    route: Option<Route>,
    /// The latest route that answered, and until when it did.
    proven: Option<(Route, Instant)>,
    wake: Instant,
}

/// What the path MTU was found for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Carrier {
    Direct,
    Relay(NodeId, Ceiling),
}

/// The largest packet that could get through.
type Ceiling = u16;

#[derive(Clone, Copy, Debug)]
struct Backoff {
    next: Instant,
    wait: Duration,
}

impl Peer {
    pub(super) fn new(now: Instant, candidate: Candidate, sockets: u8) -> Self {
        let mut peer = Self {
            candidate,
            tracks: Vec::new(),
            chosen: BTreeMap::new(),
            alone: Some(now),
            relays: Choice::default(),
            mtu: None,
            confirming: BTreeMap::new(),
            route: None,
            proven: None,
            wake: now,
        };
        peer.add_record(now, sockets);
        peer
    }

    pub(super) fn route(&self) -> Option<&Route> {
        self.route.as_ref()
    }

    pub(super) fn relays(&self) -> &Choice {
        &self.relays
    }

    /// When it must be stepped again at the latest.
    pub(super) fn wake(&self) -> Instant {
        self.wake
    }

    /// What it is for others: a relay, if it offers that and is reached directly.
    pub(super) fn offer(&self) -> Option<Offer> {
        let route = self.route.as_ref()?;
        let offers = self.candidate.relay && route.up && route.relay.is_none();
        offers.then_some(Offer { packet: route.packet, rtt: route.rtt })
    }

    /// Takes a newer record. Ways that it no longer names stay in use for as long as they answer.
    pub(super) fn update(&mut self, now: Instant, candidate: Candidate, sockets: u8) {
        if candidate == self.candidate {
            return;
        }
        let before = std::mem::replace(&mut self.candidate, candidate);
        if (before.address, before.lanes) != (candidate.address, candidate.lanes) {
            self.tracks.retain(|track| track.source != Source::Record || track.is_live());
            for track in &mut self.tracks {
                if track.source == Source::Record {
                    track.source = Source::Observed;
                }
            }
            self.add_record(now, sockets);
        }
        if candidate.busy && !before.busy {
            self.tracks.iter_mut().for_each(|track| track.keep_pace(now, BUSY));
        }
    }

    /// Has the roots probed that were not confirmed yet.
    pub(super) fn unconfirmed(&mut self, now: Instant, roots: &BTreeSet<RootId>) {
        self.confirming.retain(|root, _| roots.contains(root));
        let kept = self.confirming.len();
        for &root in roots {
            self.confirming.entry(root).or_insert(Backoff { next: now, wait: FAST });
        }
        // A new session: what was silent for the lack of keys may answer now.
        if self.confirming.len() > kept {
            self.relays.forgive();
            self.tracks.iter_mut().filter(|track| !track.is_live()).for_each(|t| t.hurry(now));
        }
    }

    /// Notes that an authentic packet came from the peer this way.
    pub(super) fn heard(&mut self, now: Instant, via: Via) {
        if let Via::Relay(relay) = via {
            self.relays.heard(now, relay);
        }
        if let Some(track) = self.tracks.iter_mut().find(|track| track.via == via) {
            return track.hear(now);
        }
        match via {
            Via::Way(way) => self.observe(now, way),
            Via::Relay(_) => {}
        }
    }

    /// Notes a reply; says whether it was to one of this peer's probes.
    pub(super) fn replied(&mut self, now: Instant, id: u32) -> bool {
        let cadence = self.cadence();
        let mut known = false;
        for track in &mut self.tracks {
            if track.reply(now, id, cadence) {
                known = true;
                if let Via::Relay(relay) = track.via {
                    self.relays.works(relay);
                }
            }
        }
        let sized = self.mtu.as_mut().is_some_and(|(_, mtu)| mtu.reply(now, id));
        known || sized
    }

    pub(super) fn unreachable(&mut self, now: Instant, via: Via) {
        for track in self.tracks.iter_mut().filter(|track| track.via == via) {
            track.unreachable(now);
        }
    }

    pub(super) fn too_big(&mut self, now: Instant, size: u16) {
        if let Some((_, mtu)) = &mut self.mtu {
            mtu.too_big(now, size);
        }
    }

    /// Notes that `relay` says that it does not reach the peer.
    pub(super) fn refused(&mut self, now: Instant, relay: NodeId) {
        self.relays.penalise(now, relay);
        self.tracks.retain(|track| track.via != Via::Relay(relay));
    }

    /// Does what is due and decides on the route. Says whether the route changed; a new
    /// round-trip time alone is no change.
    pub(super) fn step(&mut self, around: &Surroundings<'_>, out: &mut Outbox<'_>) -> bool {
        self.forget(around.now);
        self.probe(around.now, out);
        self.seek_relay(around, out);
        let route = self.choose(around);
        let route = self.size(around, route, out);
        self.confirm(around.now, route.as_ref(), out);

        let before = std::mem::replace(&mut self.route, route);
        if let Some(route) = self.route.as_ref().filter(|route| route.up) {
            self.proven = Some((route.clone(), around.now));
        }
        self.wake = self.next_wake(around.now);
        let timeless = |route: Option<Route>| route.map(|route| Route { rtt: None, ..route });
        timeless(before) != timeless(self.route.clone())
    }

    fn add_record(&mut self, now: Instant, sockets: u8) {
        let Candidate { address, lanes, .. } = self.candidate;
        for socket in 0..sockets {
            let port = address.port().wrapping_add(u16::from(socket % lanes.max(1)));
            let via = Via::Way(Way { socket, remote: SocketAddr::new(address.ip(), port) });
            match self.tracks.iter_mut().find(|track| track.via == via) {
                Some(track) => track.source = Source::Record,
                None => self.tracks.push(Track::new(now, via, Source::Record)),
            }
        }
    }

    /// Takes up an address that the peer's packets come from, unless the socket has a way by the
    /// record: then it is another of the peer's sockets.
    fn observe(&mut self, now: Instant, way: Way) {
        let same_socket = |track: &Track| match track.via {
            Via::Way(known) => known.socket == way.socket,
            Via::Relay(_) => false,
        };
        let mut here: Vec<_> = self.tracks.iter_mut().filter(|t| same_socket(t)).collect();
        if here.iter().any(|track| track.source == Source::Record && track.is_live()) {
            return;
        }
        // Whatever is in use must prove that it still answers.
        here.iter_mut().filter(|track| track.is_live()).for_each(|track| track.hurry(now));
        let observed = here.iter().filter(|track| track.source == Source::Observed);
        if observed.clone().count() >= OBSERVED {
            let silent = observed.filter(|track| !track.is_live());
            let Some(oldest) = silent.min_by_key(|track| track.since()).map(|track| track.via)
            else {
                return;
            };
            self.tracks.retain(|track| track.via != oldest);
        }
        let mut track = Track::new(now, Via::Way(way), Source::Observed);
        track.hear(now);
        self.tracks.push(track);
    }

    fn cadence(&self) -> Duration {
        if self.candidate.busy { BUSY } else { IDLE }
    }

    fn is_direct(track: &Track) -> bool {
        matches!(track.via, Via::Way(_))
    }

    fn has_direct(&self) -> bool {
        self.tracks.iter().any(|track| Self::is_direct(track) && track.is_live())
    }

    /// Sends the probes of all tracks that are due.
    fn probe(&mut self, now: Instant, out: &mut Outbox<'_>) {
        let slowest = match self.has_direct() {
            true => DORMANT,
            false => self.cadence().max(SILENT),
        };
        for track in &mut self.tracks {
            if track.is_due(now) {
                let id = out.probe(track.via, SMALL, None);
                track.sent(now, id, slowest);
            }
        }
    }

    /// Drops observed addresses that do not answer.
    fn forget(&mut self, now: Instant) {
        self.tracks.retain(|track| {
            let patience = match track.answered() {
                None => track.tries() < OBSERVED_TRIES || now < track.next(),
                Some(_) => now.saturating_duration_since(track.since()) < LINGER,
            };
            track.source != Source::Observed || track.is_live() || patience
        });
    }

    /// Tries relays while no direct way answers, one after the other.
    fn seek_relay(&mut self, around: &Surroundings<'_>, out: &mut Outbox<'_>) {
        let now = around.now;
        self.alone = match self.has_direct() {
            true => None,
            false => self.alone.or(Some(now)),
        };
        let wanted = self.alone.is_some_and(|since| now - since >= PATIENCE);
        let relays = &mut self.relays;
        self.tracks.retain(|track| {
            let Via::Relay(relay) = track.via else { return true };
            if !wanted || !around.offers.contains_key(&relay) {
                return false;
            }
            let failed = !track.is_live() && now - track.since() >= RELAY_PATIENCE;
            if failed {
                relays.penalise(now, relay);
            }
            !failed
        });
        if !wanted || self.tracks.iter().any(|track| !Self::is_direct(track)) {
            return;
        }
        if let Some(relay) = self.relays.best(now, around.offers) {
            let mut track = Track::new(now, Via::Relay(relay), Source::Relay);
            let id = out.probe(track.via, SMALL, None);
            track.sent(now, id, self.cadence());
            self.tracks.push(track);
        }
    }

    /// The best route that there is, its packet size aside.
    fn choose(&mut self, around: &Surroundings<'_>) -> Option<Route> {
        let chosen: BTreeMap<u8, Via> = (0..around.config.sockets)
            .filter_map(|socket| Some((socket, self.choose_way(socket)?.via)))
            .collect();
        self.chosen = chosen;
        let live = |track: &&Track| match track.via {
            Via::Way(way) => self.chosen.get(&way.socket) == Some(&track.via),
            Via::Relay(_) => false,
        };
        let guess = |track: &&Track| {
            let lately = |at| around.now.saturating_duration_since(at) < GUESS;
            Self::is_direct(track) && track.heard().is_some_and(lately)
        };
        let relay = |track: &&Track| !Self::is_direct(track) && track.is_live();

        let direct = Self::assemble(self.tracks.iter().filter(live), true);
        direct
            .or_else(|| Self::assemble(self.tracks.iter().filter(relay), true))
            .or_else(|| Self::assemble(self.tracks.iter().filter(guess), false))
            .or_else(|| self.linger(around))
    }

    /// The way that a socket uses: the record's before others, and not another one while the one
    /// in use answers.
    fn choose_way(&self, socket: u8) -> Option<&Track> {
        let live = self.tracks.iter().filter(|track| match track.via {
            Via::Way(way) => way.socket == socket && track.is_live(),
            Via::Relay(_) => false,
        });
        live.max_by_key(|track| {
            let in_use = self.chosen.get(&socket) == Some(&track.via);
            (track.source == Source::Record, track.lost() == 0, in_use, track.answered())
        })
    }

    fn assemble<'a>(tracks: impl Iterator<Item = &'a Track>, up: bool) -> Option<Route> {
        let mut tracks: Vec<_> = tracks.collect();
        tracks.sort_by_key(|track| track.via);
        let first = tracks.first()?;
        let way = |track: &&Track| match track.via {
            Via::Way(way) => Some(way),
            Via::Relay(_) => None,
        };
        let relay = match first.via {
            Via::Way(_) => None,
            Via::Relay(relay) => Some(relay),
        };
        let by_record = tracks.iter().all(|track| track.source == Source::Record);
        let kind = match relay {
            Some(_) => Kind::Relay,
            None if by_record => Kind::Direct,
            None => Kind::Observed,
        };
        let ways = tracks.iter().filter_map(way).collect();
        Some(Route { ways, relay, kind, up, packet: 0, rtt: first.rtt() })
    }

    /// The route that answered last, for a while: a peer that restarts, or a wire that is
    /// plugged in again, is there at once.
    fn linger(&self, around: &Surroundings<'_>) -> Option<Route> {
        let (route, until) = self.proven.as_ref()?;
        let gone = route.relay.is_some_and(|relay| !around.offers.contains_key(&relay));
        let over = around.now.saturating_duration_since(*until) >= LINGER;
        (!gone && !over).then(|| Route { up: false, ..route.clone() })
    }

    /// Says how large packets may be on a route, and measures it.
    fn size(
        &mut self,
        around: &Surroundings<'_>,
        route: Option<Route>,
        out: &mut Outbox<'_>,
    ) -> Option<Route> {
        let (route, now) = (route?, around.now);
        let overhead = datagram_overhead(around.config.underlay);
        let ceiling = around.config.underlay_mtu.saturating_sub(overhead);
        let floor = FLOOR.saturating_sub(overhead);
        let fresh = match route.relay {
            None => (Carrier::Direct, Mtu::new(now, floor, ceiling, overhead)),
            Some(relay) => {
                let packet = around.offers.get(&relay).map_or(floor, |offer| offer.packet);
                let floor = floor.saturating_sub(RELAY_OVERHEAD);
                let ceiling = packet.saturating_sub(RELAY_OVERHEAD);
                let mtu = Mtu::new(now, floor, ceiling, overhead + RELAY_OVERHEAD);
                (Carrier::Relay(relay, ceiling), mtu)
            }
        };
        let (_, mtu) = match &mut self.mtu {
            Some(known) if known.0 == fresh.0 => known,
            other => other.insert(fresh),
        };

        let track = route.via().and_then(|via| self.tracks.iter_mut().find(|t| t.via == via));
        if let Some(track) = track.filter(|_| route.up) {
            mtu.expire(now, track.answered());
            let cadence = if self.candidate.busy { BUSY } else { IDLE };
            if let Some(size) = mtu.due(now, cadence) {
                // Only if the small one is answered does the loss of the large one mean anything.
                let small = out.probe(track.via, SMALL, None);
                track.remember(now, small);
                let large = out.probe(track.via, size, None);
                mtu.sent(now, large, size, track.rtt());
            }
        }
        Some(Route { packet: mtu.packet(), ..route })
    }

    /// Probes roots that nothing came under yet: the peer confirms them by these, and this node
    /// by the replies.
    fn confirm(&mut self, now: Instant, route: Option<&Route>, out: &mut Outbox<'_>) {
        let via = route.and_then(Route::via);
        for (&root, backoff) in &mut self.confirming {
            if now < backoff.next {
                continue;
            }
            let Some(via) = via else {
                // The tracks' own probes go under the newest root.
                backoff.next = now + PATIENCE;
                continue;
            };
            let id = out.probe(via, SMALL, Some(root));
            if let Some(track) = self.tracks.iter_mut().find(|track| track.via == via) {
                track.remember(now, id);
            }
            backoff.next = now + backoff.wait;
            backoff.wait = (backoff.wait * 2).min(SILENT);
        }
    }

    fn next_wake(&self, now: Instant) -> Instant {
        let up = self.route.as_ref().is_some_and(|route| route.up);
        let tracks = self.tracks.iter().map(Track::next);
        let roots = self.confirming.values().map(|backoff| backoff.next);
        let mtu = self.mtu.as_ref().filter(|_| up).map(|(_, mtu)| mtu.deadline());
        // What is not up waits for relays, penalties and patience to end: looking often is
        // cheaper than to work out when.
        let look = (!up).then_some(now + PATIENCE / 4);
        let first = tracks.chain(roots).chain(mtu).chain(look).min();
        // Never at once: a step has done what was due.
        first.unwrap_or(now + IDLE).max(now + Duration::from_millis(1))
    }
}
