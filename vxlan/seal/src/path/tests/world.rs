use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use weft_model::NodeId;

use super::super::route::datagram_overhead;
use super::super::{Action, Book, Candidate, Config, Route, Via, Way, relay_overhead};

/// Every link takes this long.
pub(super) const DELAY: Duration = Duration::from_millis(5);

/// How long a NAT keeps a mapping that nothing leaves by.
const MAPPING: Duration = Duration::from_secs(30);

const PORT: u16 = 6791;

pub(super) fn node(number: u8) -> NodeId {
    NodeId::from([number; 16])
}

/// Nodes, their books, and what is between them.
pub(super) struct World {
    pub(super) now: Instant,
    hosts: BTreeMap<NodeId, Host>,
    in_flight: BTreeMap<(Instant, u64), Packet>,
    sequence: u64,
    /// Pairs that do not reach each other directly.
    pub(super) cut: BTreeSet<(NodeId, NodeId)>,
    /// Bytes of the largest IP packet between all nodes.
    pub(super) mtu: u16,
    /// Of 100 packets, how many are lost.
    pub(super) loss: u64,
    dice: u64,
    /// All probes that left, with the node that sent them.
    pub(super) sent: Vec<(NodeId, Action)>,
    /// When each route of a node to another one came to be.
    pub(super) routes: Vec<(Instant, NodeId, NodeId, Option<Route>)>,
}

struct Host {
    book: Book,
    config: Config,
    nat: Option<Nat>,
}

/// Maps each socket to a port of its own, lets in only whom that socket sent to.
struct Nat {
    public: Ipv4Addr,
    generation: u16,
    open: BTreeMap<(u8, SocketAddr), Instant>,
}

struct Packet {
    to: NodeId,
    from: NodeId,
    arrival: Via,
    body: Body,
}

#[derive(Clone, Copy)]
enum Body {
    Probe {
        id: u32,
        size: u16,
    },
    Reply {
        id: u32,
    },
    CannotRelay {
        to: NodeId,
    },
    /// A frame: no news but where it comes from.
    Frame,
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            now: Instant::now(),
            hosts: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            sequence: 0,
            cut: BTreeSet::new(),
            mtu: 1500,
            loss: 0,
            dice: 1,
            sent: Vec::new(),
            routes: Vec::new(),
        }
    }

    /// Adds a node with so many lanes, which knows nobody before [`meet`](Self::meet).
    pub(super) fn add(&mut self, number: u8, sockets: u8, underlay_mtu: u16, relay: bool) {
        let (own, underlay) = (node(number), IpAddr::from([10, 0, 0, number]));
        let config = Config { own, underlay, underlay_mtu, sockets, relay };
        let book = Book::new(config.clone());
        self.hosts.insert(own, Host { book, config, nat: None });
    }

    pub(super) fn put_behind_nat(&mut self, number: u8) {
        let public = Ipv4Addr::new(198, 51, 100, number);
        self.host(number).nat = Some(Nat { public, generation: 0, open: BTreeMap::new() });
    }

    /// The NAT forgets all mappings and makes other ones from now on.
    pub(super) fn rebind(&mut self, number: u8) {
        let nat = self.host(number).nat.as_mut().unwrap();
        nat.generation += 1;
        nat.open.clear();
    }

    /// Tells all nodes of each other.
    pub(super) fn meet(&mut self, busy: bool) {
        let candidates: BTreeMap<_, _> =
            self.hosts.iter().map(|(&id, host)| (id, host.candidate(busy))).collect();
        for id in candidates.keys() {
            let now = self.now;
            self.hosts.get_mut(id).unwrap().book.set_peers(now, &candidates);
            self.act(*id);
        }
    }

    pub(super) fn candidate(&self, number: u8) -> Candidate {
        self.hosts[&node(number)].candidate(true)
    }

    /// Does something to one node's book, and what follows from it.
    pub(super) fn tell<T>(&mut self, number: u8, news: impl FnOnce(&mut Book, Instant) -> T) -> T {
        let now = self.now;
        let result = news(&mut self.host(number).book, now);
        self.act(node(number));
        result
    }

    /// Sends a frame by the present route.
    pub(super) fn send_frame(&mut self, from: u8, to: u8, lane: u8) {
        let route = self.route(from, to).unwrap();
        let via = route.way(lane).map(Via::Way).or_else(|| route.via()).unwrap();
        self.send(node(from), node(to), via, Body::Frame, 100);
    }

    pub(super) fn cut(&mut self, one: u8, other: u8) {
        self.cut.extend([(node(one), node(other)), (node(other), node(one))]);
    }

    pub(super) fn mend(&mut self, one: u8, other: u8) {
        self.cut.remove(&(node(one), node(other)));
        self.cut.remove(&(node(other), node(one)));
    }

    pub(super) fn route(&self, from: u8, to: u8) -> Option<Route> {
        self.hosts[&node(from)].book.route(node(to)).cloned()
    }

    pub(super) fn book(&self, number: u8) -> &Book {
        &self.hosts[&node(number)].book
    }

    /// The addresses that a route has, as `socket>address`.
    pub(super) fn ways(&self, from: u8, to: u8) -> Vec<String> {
        let ways = self.route(from, to).map_or(Vec::new(), |route| route.ways);
        ways.iter().map(|way| format!("{}>{}", way.socket, way.remote)).collect()
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        self.run_until(end, |_| false);
    }

    /// Lets time pass until something is so; says how long that took.
    pub(super) fn wait(&mut self, most: Duration, done: impl Fn(&Self) -> bool) -> Duration {
        let start = self.now;
        self.run_until(start + most, &done);
        let routes: Vec<_> = self.routes.iter().rev().take(6).collect();
        assert!(done(self), "not so after {most:?}; latest routes first: {routes:#?}");
        self.now - start
    }

    fn run_until(&mut self, end: Instant, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let packet = self.in_flight.first_key_value().map(|(&(at, _), _)| at);
            let ticks = self.hosts.iter();
            let tick = ticks.filter_map(|(&id, host)| Some((host.book.deadline()?, id))).min();
            let next = packet.into_iter().chain(tick.map(|(at, _)| at)).min();
            let Some(next) = next.filter(|&next| next <= end) else {
                self.now = end;
                return;
            };
            assert!(next >= self.now || packet.is_none_or(|at| at >= self.now));
            self.now = self.now.max(next);
            match (packet, tick) {
                (Some(at), _) if at == next => {
                    let (_, packet) = self.in_flight.pop_first().unwrap();
                    self.deliver(&packet);
                }
                (_, Some((_, id))) => {
                    let now = self.now;
                    self.hosts.get_mut(&id).unwrap().book.tick(now);
                    self.act(id);
                }
                (_, None) => unreachable!("something was next"),
            }
        }
    }

    fn host(&mut self, number: u8) -> &mut Host {
        self.hosts.get_mut(&node(number)).unwrap()
    }

    fn act(&mut self, id: NodeId) {
        let now = self.now;
        let host = self.hosts.get_mut(&id).unwrap();
        if let Some(deadline) = host.book.deadline() {
            assert!(deadline > now, "a book that has just worked has nothing due");
        }
        for action in host.book.actions() {
            match action.clone() {
                Action::Route { peer, route } => self.routes.push((now, id, peer, route)),
                Action::Probe { peer, via, id: probe, size, .. } => {
                    self.sent.push((id, action));
                    self.send(id, peer, via, Body::Probe { id: probe, size }, size);
                }
            }
        }
    }

    fn send(&mut self, from: NodeId, to: NodeId, via: Via, body: Body, size: u16) {
        match via {
            Via::Way(way) => {
                if let Some((at, arrival)) = self.carry(from, way, size)
                    && at == to
                {
                    self.queue(DELAY, Packet { to, from, arrival: Via::Way(arrival), body });
                }
            }
            Via::Relay(relay) => self.relay(from, relay, to, body, size),
        }
    }

    fn relay(&mut self, from: NodeId, relay: NodeId, to: NodeId, body: Body, size: u16) {
        let size = size + relay_overhead();
        let first = self.hosts[&from].book.route(relay).and_then(|route| route.way(0));
        let Some((at, arrival)) = first.and_then(|way| self.carry(from, way, size)) else { return };
        assert_eq!(at, relay);
        let admitted = self.hosts[&relay].book.admit(from, Via::Way(arrival), to, size.into());
        match admitted.map(|route| route.way(0)) {
            Ok(way) => {
                let Some((at, _)) = way.and_then(|way| self.carry(relay, way, size)) else {
                    return;
                };
                assert_eq!(at, to);
                self.queue(2 * DELAY, Packet { to, from, arrival: Via::Relay(relay), body });
            }
            Err(refused) if refused.is_answered() => {
                let body = Body::CannotRelay { to };
                let back = Via::Way(first.unwrap());
                self.queue(2 * DELAY, Packet { to: from, from: relay, arrival: back, body });
            }
            Err(_) => {}
        }
    }

    /// Who gets a datagram, at which socket, and from where it seems to come.
    fn carry(&mut self, from: NodeId, way: Way, size: u16) -> Option<(NodeId, Way)> {
        let now = self.now;
        let sender = self.hosts.get_mut(&from).unwrap();
        let underlay = sender.config.underlay;
        let source = match &mut sender.nat {
            None => SocketAddr::new(underlay, PORT + u16::from(way.socket)),
            Some(nat) => {
                nat.open.insert((way.socket, way.remote), now);
                SocketAddr::new(nat.public.into(), nat.port(way.socket))
            }
        };
        let (&to, receiver) = self.hosts.iter().find(|(_, host)| host.owns(way.remote.ip()))?;
        let socket = match &receiver.nat {
            None => u8::try_from(way.remote.port().checked_sub(PORT)?).ok()?,
            Some(nat) => nat.admits(now, way.remote.port(), source)?,
        };
        let large = size + datagram_overhead(underlay) > self.mtu;
        if large || socket >= receiver.config.sockets || self.cut.contains(&(from, to)) {
            return None;
        }
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        if self.dice >> 33 & 0xffff < self.loss * 0x10000 / 100 {
            return None;
        }
        Some((to, Way { socket, remote: source }))
    }

    fn queue(&mut self, delay: Duration, packet: Packet) {
        self.sequence += 1;
        self.in_flight.insert((self.now + delay, self.sequence), packet);
    }

    fn deliver(&mut self, packet: &Packet) {
        let &Packet { to, from, arrival, body } = packet;
        let now = self.now;
        let book = &mut self.hosts.get_mut(&to).unwrap().book;
        book.heard(now, from, arrival);
        match body {
            Body::Probe { id, size } => {
                self.act(to);
                assert!(size >= super::super::SMALL);
                self.send(to, from, arrival, Body::Reply { id }, super::super::SMALL);
            }
            Body::Reply { id } => {
                book.replied(now, from, id);
                self.act(to);
            }
            Body::CannotRelay { to: peer } => {
                book.cannot_relay(now, peer, from);
                self.act(to);
            }
            Body::Frame => self.act(to),
        }
    }
}

impl Host {
    fn candidate(&self, busy: bool) -> Candidate {
        Candidate {
            address: SocketAddr::new(self.config.underlay, PORT),
            lanes: self.config.sockets,
            relay: self.config.relay,
            busy,
        }
    }

    fn owns(&self, address: IpAddr) -> bool {
        match &self.nat {
            None => self.config.underlay == address,
            Some(nat) => IpAddr::from(nat.public) == address,
        }
    }
}

impl Nat {
    fn port(&self, socket: u8) -> u16 {
        40000 + 100 * self.generation + u16::from(socket)
    }

    fn admits(&self, now: Instant, port: u16, source: SocketAddr) -> Option<u8> {
        let socket = (0..8).find(|&socket| self.port(socket) == port)?;
        let used = self.open.get(&(socket, source))?;
        (now - *used < MAPPING).then_some(socket)
    }
}
