use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use socket2::SockAddr;
use tokio::sync::mpsc;
use weft_model::NodeId;

use super::{Event, keyring::Keyring, report};
use crate::{
    DropReason, Members, TunnelStatus,
    counters::Tallies,
    key::{Content, HEADER, Header, Lane, Meta, RootId, TAG},
    mmsg,
    path::{
        Action, Book, Candidate, Config, Payload, Probe, Relayed, Reply, Via, Way, unrelayable,
    },
    routes::Session,
    shared::Shared,
};

/// What the control thread knows and does: it tells the book what happened, and does what the
/// book says.
pub(super) struct Desk {
    shared: Arc<Shared>,
    detoured: mpsc::Sender<(NodeId, Bytes)>,
    members: Arc<Members>,
    keys: Keyring,
    book: Book,
    /// What the book was told of last.
    candidates: BTreeMap<NodeId, Candidate>,
    /// The roots that the book was told of last as not confirmed.
    unconfirmed: BTreeMap<NodeId, BTreeSet<RootId>>,
    /// Whose packets go where: to know whom an error of a socket concerns.
    destinations: BTreeMap<(usize, SocketAddr), NodeId>,
    /// Whether another root may have been confirmed, or come.
    doubt: bool,
    /// Whether routes or status may have changed.
    stale: bool,
    /// Whether members have changed.
    met: bool,
}

impl Desk {
    pub(super) fn new(shared: Arc<Shared>, detoured: mpsc::Sender<(NodeId, Bytes)>) -> Self {
        let config = &shared.config;
        let book = Book::new(Config {
            own: config.own,
            underlay: config.bind,
            underlay_mtu: config.underlay_mtu,
            sockets: config.lanes,
            relay: config.relay,
        });
        Self {
            keys: Keyring::new(config.suites.clone(), config.limits),
            shared,
            detoured,
            members: Arc::default(),
            book,
            candidates: BTreeMap::new(),
            unconfirmed: BTreeMap::new(),
            destinations: BTreeMap::new(),
            doubt: true,
            stale: true,
            met: false,
        }
    }

    /// When [`settle`](Self::settle) has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.book.deadline()
    }

    /// Takes what is known of all members.
    pub(super) fn meet(&mut self, now: Instant, members: Arc<Members>) {
        self.keys.update(&members);
        self.members = members;
        self.shared.sessions.store(Arc::clone(self.keys.sessions()));
        self.tell_candidates(now);
        (self.doubt, self.stale, self.met) = (true, true, true);
    }

    /// Takes what a worker says.
    pub(super) fn hear(&mut self, now: Instant, event: Event) {
        match event {
            Event::Received { socket, from, packet } => {
                let way = Way { socket: socket as u8, remote: from };
                self.receive(now, Via::Way(way), packet);
            }
            Event::Heard { peer, socket, from } => {
                let way = Way { socket: socket as u8, remote: from };
                self.book.heard(now, peer, Via::Way(way));
            }
            Event::Relay { to, packet } => match self.book.route(to).and_then(|r| r.relay) {
                Some(relay) => self.send_relayed(now, relay, to, Payload::Packet, &packet),
                None => self.tallies_out().dropped(DropReason::NoPath, 1),
            },
            Event::Narrowed { socket, to, len } => {
                if let Some(&peer) = self.destinations.get(&(socket, to)) {
                    self.book.too_big(now, peer, len as u16);
                }
            }
        }
    }

    /// Sends a datagram of the agent's by a relay.
    pub(super) fn detour(&mut self, now: Instant, to: NodeId, datagram: &[u8]) {
        match self.book.relays(now, to).first() {
            Some(&relay) => self.send_relayed(now, relay, to, Payload::Datagram, datagram),
            None => self.tallies_out().dropped(DropReason::NoPath, 1),
        }
    }

    /// Looks at what nobody tells: networks that came or went, sessions that expired, workers'
    /// news.
    pub(super) fn look_round(&mut self, now: Instant) {
        self.tell_candidates(now);
        (self.doubt, self.stale) = (true, true);
    }

    /// Does what the book says, and shows workers and people what has changed.
    pub(super) fn settle(&mut self, now: Instant) {
        if std::mem::take(&mut self.doubt) {
            self.tell_unconfirmed(now);
        }
        self.book.tick(now);
        // Doing may give rise to more: an error of a socket, for one.
        for _ in 0..ROUNDS {
            let actions = self.book.actions();
            if actions.is_empty() {
                break;
            }
            for action in actions {
                self.act(now, action);
            }
        }
        if std::mem::take(&mut self.stale) {
            self.publish(now);
        }
    }

    fn act(&mut self, now: Instant, action: Action) {
        match action {
            Action::Probe { peer, via, id, size, root } => {
                let epochs = self.epochs(now, peer, root);
                let packet = Probe { id, size, epochs }.packet();
                self.send(now, peer, via, root, packet);
            }
            Action::Route { peer, route } => {
                match route {
                    Some(route) => tracing::info!(%peer, %route, "the path to a peer has changed"),
                    None => tracing::info!(%peer, "no path to a peer answers"),
                }
                self.stale = true;
            }
        }
    }

    /// The epochs that this node's data lanes seal in, for the peer to catch up with.
    fn epochs(&self, now: Instant, peer: NodeId, root: Option<RootId>) -> Vec<u16> {
        let sessions = self.keys.sessions().by_tag.values().flatten();
        let of_probe = root.and_then(|root| sessions.map(|s| &s.root).find(|r| r.id() == root));
        let root = of_probe.or_else(|| self.keys.sending_root(now, peer).ok());
        let lanes = Lane::all().take(self.shared.sockets.len());
        root.map(|root| lanes.map(|lane| root.sending_epoch(lane)).collect()).unwrap_or_default()
    }

    /// Opens a control packet that came by `via` and does what it asks for.
    fn receive(&mut self, now: Instant, via: Via, mut packet: Vec<u8>) {
        let session = match self.keys.open(now, &mut packet) {
            Ok(session) => session,
            Err(reason) => return self.tallies_in().dropped(reason, 1),
        };
        let opened = &packet[HEADER..packet.len() - TAG];
        let Ok((meta, body)) = Meta::decode(opened) else {
            return self.tallies_in().dropped(DropReason::Malformed, 1);
        };
        self.tallies_in().carried(1, body.len() as u64);
        let peer = session.peer;
        let doubted = self.unconfirmed.get(&peer);
        self.doubt |= doubted.is_some_and(|roots| roots.contains(&session.root.id()));
        let understood = match meta.content {
            Content::Probe => self.answer(now, &session, via, body, packet.len()),
            Content::ProbeReply => Reply::decode(body).is_ok_and(|reply| {
                self.book.heard(now, peer, via);
                self.book.replied(now, peer, reply.id);
                true
            }),
            Content::Relayed => self.unwrap(now, peer, via, &meta, body),
            Content::RelayThis => match Relayed::decode(&meta, body).map(|relayed| relayed.node) {
                Ok(to) => {
                    self.relay(now, peer, via, to, packet);
                    true
                }
                Err(_) => false,
            },
            Content::CannotRelay => match body.first_chunk() {
                Some(node) => {
                    self.book.cannot_relay(now, NodeId::from(*node), peer);
                    true
                }
                None => false,
            },
            Content::Frame | Content::Segment => false,
        };
        if !understood {
            self.tallies_in().dropped(DropReason::Malformed, 1);
        }
    }

    /// Replies to a probe, the way it came and under its root. False if it is none.
    fn answer(
        &mut self,
        now: Instant,
        session: &Session,
        via: Via,
        body: &[u8],
        len: usize,
    ) -> bool {
        let Ok(probe) = Probe::decode(body) else { return false };
        session.note_epochs(&probe.epochs);
        self.book.heard(now, session.peer, via);
        let observed = match via {
            Via::Way(way) => Some(way.remote),
            Via::Relay(_) => None,
        };
        let reply = Reply { id: probe.id, size: len as u16, observed };
        self.send(now, session.peer, via, Some(session.root.id()), reply.packet());
        true
    }

    /// Takes out what `relay` passes on. False if it is nothing.
    fn unwrap(&mut self, now: Instant, relay: NodeId, via: Via, meta: &Meta, body: &[u8]) -> bool {
        let Ok(Relayed { node, kind, payload }) = Relayed::decode(meta, body) else {
            return false;
        };
        // Relayed twice: nobody of ours does that.
        if matches!(via, Via::Relay(_)) {
            return false;
        }
        match kind {
            Payload::Datagram => {
                let datagram = Bytes::copy_from_slice(payload);
                if self.detoured.try_send((node, datagram)).is_err() {
                    self.tallies_in().dropped(DropReason::Queue, 1);
                }
                true
            }
            Payload::Packet => match Header::decode(payload).map(|header| header.lane) {
                Ok(Lane::CONTROL) => {
                    self.receive(now, Via::Relay(relay), payload.to_vec());
                    true
                }
                Ok(lane) => {
                    let owner = usize::from(lane.number()) % self.shared.sockets.len();
                    if !self.shared.hand_over(owner, payload.to_vec()) {
                        self.tallies_in().dropped(DropReason::Queue, 1);
                    }
                    true
                }
                Err(_) => false,
            },
        }
    }

    /// Passes on what `from` wants to have brought to `to`.
    fn relay(&mut self, now: Instant, from: NodeId, via: Via, to: NodeId, mut packet: Vec<u8>) {
        let way = self.book.admit(from, via, to, packet.len()).map(|route| route.via());
        match way {
            Ok(Some(onward)) => {
                if Relayed::forward(from, &mut packet).is_ok() {
                    self.send(now, to, onward, None, packet);
                }
            }
            Ok(None) => self.tallies_in().dropped(DropReason::NoPath, 1),
            Err(why) => {
                self.tallies_in().dropped(DropReason::NoPath, 1);
                if why.is_answered() {
                    self.send(now, from, via, None, unrelayable(to));
                }
            }
        }
    }

    /// Has `relay` bring a payload to `to`.
    fn send_relayed(
        &mut self,
        now: Instant,
        relay: NodeId,
        to: NodeId,
        kind: Payload,
        payload: &[u8],
    ) {
        let packet = Relayed { node: to, kind, payload }.packet();
        match self.book.route(relay).and_then(|route| route.via()) {
            Some(via @ Via::Way(_)) => self.send(now, relay, via, None, packet),
            Some(Via::Relay(_)) | None => self.tallies_out().dropped(DropReason::NoPath, 1),
        }
    }

    /// Seals a control packet for `peer` and sends it by `via`.
    fn send(
        &mut self,
        now: Instant,
        peer: NodeId,
        via: Via,
        root: Option<RootId>,
        mut packet: Vec<u8>,
    ) {
        if let Err(reason) = self.keys.seal(now, peer, root, &mut packet) {
            return self.tallies_out().dropped(reason, 1);
        }
        match via {
            Via::Relay(relay) => self.send_relayed(now, relay, peer, Payload::Packet, &packet),
            Via::Way(way) => match self.put(way, &packet) {
                Ok(()) => self.tallies_out().carried(1, packet.len() as u64),
                Err(error) => {
                    let reason = match error.raw_os_error() {
                        Some(libc::EMSGSIZE) => {
                            self.book.too_big(now, peer, packet.len() as u16);
                            DropReason::TooBig
                        }
                        Some(libc::EAGAIN | libc::ENOBUFS) => DropReason::Queue,
                        _ => {
                            self.book.unreachable(now, peer, via);
                            DropReason::NoPath
                        }
                    };
                    self.tallies_out().dropped(reason, 1);
                }
            },
        }
    }

    fn put(&self, way: Way, packet: &[u8]) -> io::Result<()> {
        let socket = self.shared.sockets.get(usize::from(way.socket));
        let socket = socket.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        mmsg::send_one(socket, packet, &SockAddr::from(way.remote))
    }

    /// Tells the book of every member that takes part.
    fn tell_candidates(&mut self, now: Instant) {
        let networks = self.shared.networks.snapshot().load();
        let mut busy = BTreeSet::new();
        for carried in &networks.all {
            busy.extend(carried.forwarding.stations.values().map(|station| station.node));
            busy.extend(&carried.forwarding.flood);
        }
        let mut candidates = BTreeMap::new();
        for (&id, peer) in &self.members.peers {
            if let Some(offer) = &peer.offer {
                let candidate = Candidate {
                    address: SocketAddr::new(peer.address, offer.port),
                    lanes: offer.lanes.max(1),
                    relay: offer.relay,
                    busy: busy.contains(&id),
                };
                candidates.insert(id, candidate);
            }
        }
        if candidates != self.candidates {
            self.book.set_peers(now, &candidates);
            self.candidates = candidates;
        }
    }

    fn tell_unconfirmed(&mut self, now: Instant) {
        for &peer in self.members.peers.keys() {
            let roots = self.keys.unconfirmed(now, peer);
            if self.unconfirmed.get(&peer).is_some_and(|told| *told == roots) {
                continue;
            }
            self.book.unconfirmed(now, peer, &roots);
            self.unconfirmed.insert(peer, roots);
            self.stale = true;
        }
        self.unconfirmed.retain(|peer, _| self.members.peers.contains_key(peer));
    }

    fn publish(&mut self, now: Instant) {
        let routes = report::routes(now, &self.members, &self.keys, &self.book);
        self.destinations = self
            .members
            .peers
            .keys()
            .filter_map(|&peer| Some((peer, self.book.route(peer)?)))
            .flat_map(|(peer, route)| {
                route.ways.iter().map(move |way| ((usize::from(way.socket), way.remote), peer))
            })
            .collect();
        self.shared.routes.store(Arc::new(routes));
        if std::mem::take(&mut self.met) {
            // Threads that have nothing to do let go of the keys that were withdrawn.
            self.shared.stop.wake_all();
        }

        let shared = &self.shared;
        let status = TunnelStatus {
            sockets: shared.sockets.iter().map(|socket| socket.local()).collect(),
            peers: report::status(now, &self.members, &self.keys, &self.book),
            offloads: shared.offloads.status(|offload| shared.used(offload).read()),
            networks: shared.networks.status(),
            warnings: shared.warnings(),
        };
        shared.status.send_if_modified(|shown| {
            let news = **shown != status;
            if news {
                *shown = Arc::new(status);
            }
            news
        });
    }

    /// The counters of what the control thread opens.
    fn tallies_in(&self) -> &Tallies {
        &self.shared.ledger.opening[self.shared.sockets.len()]
    }

    /// The counters of what the control thread seals.
    fn tallies_out(&self) -> &Tallies {
        &self.shared.ledger.sealing[self.shared.sockets.len()]
    }
}

/// How often actions may give rise to actions before the next event has its turn.
const ROUNDS: usize = 8;
