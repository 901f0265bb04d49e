use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use weft_model::NodeId;

use super::peer::{Candidate, Outbox, Peer, Surroundings};
use super::relay::{Offer, Unrelayed};
use super::route::{Route, Via};
use crate::key::RootId;

/// What the book must know of this node.
#[derive(Clone, Debug)]
pub struct Config {
    pub own: NodeId,
    /// The address that the sockets are bound to.
    pub underlay: IpAddr,
    /// Of the underlay's interface, in bytes.
    pub underlay_mtu: u16,
    /// How many sockets this node has: its lanes.
    pub sockets: u8,
    /// Whether it passes on packets between others.
    pub relay: bool,
}

/// What is to be done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action {
    /// Send a [`Probe`](super::Probe) of `size` bytes with this id, on the control lane.
    Probe {
        peer: NodeId,
        via: Via,
        id: u32,
        /// Bytes of the whole sealed packet. Not to be fragmented.
        size: u16,
        /// The root to seal it under; none for the newest one that is confirmed or, failing that,
        /// the newest one.
        root: Option<RootId>,
    },
    /// From now on the peer's frames take this route; none is known if it is none.
    Route { peer: NodeId, route: Option<Route> },
}

/// How every peer is reached. See the [module](super).
///
/// All calls take the time, which must not go backwards.
#[derive(Debug)]
pub struct Book {
    config: Config,
    peers: BTreeMap<NodeId, Peer>,
    /// Peers that others can be reached by.
    offers: BTreeMap<NodeId, Offer>,
    due: BTreeSet<(Instant, NodeId)>,
    ids: u32,
    actions: Vec<Action>,
}

impl Book {
    pub fn new(config: Config) -> Self {
        Self {
            config,
            peers: BTreeMap::new(),
            offers: BTreeMap::new(),
            due: BTreeSet::new(),
            ids: 0,
            actions: Vec::new(),
        }
    }

    /// Takes all peers there are, as their records say. Those that are missing are forgotten, and
    /// their routes with them.
    pub fn set_peers(&mut self, now: Instant, candidates: &BTreeMap<NodeId, Candidate>) {
        let gone: Vec<_> =
            self.peers.keys().filter(|peer| !candidates.contains_key(peer)).copied().collect();
        for id in gone {
            self.forget(now, id);
        }
        for (&id, &candidate) in candidates {
            if id == self.config.own {
                continue;
            }
            match self.peers.get_mut(&id) {
                Some(peer) => {
                    peer.update(now, candidate, self.config.sockets);
                    self.wake(now, id);
                }
                None => {
                    let peer = Peer::new(now, candidate, self.config.sockets);
                    self.due.insert((peer.wake(), id));
                    self.peers.insert(id, peer);
                }
            }
        }
        self.tick(now);
    }

    /// Takes the roots of a peer that are not confirmed yet, all of them: they get probes of their
    /// own, 20 ms apart at first, until a call without them.
    pub fn unconfirmed(&mut self, now: Instant, peer: NodeId, roots: &BTreeSet<RootId>) {
        self.tell(now, peer, |peer| peer.unconfirmed(now, roots));
    }

    /// Notes that an authentic packet of the peer came this way: for a [`Via::Way`], at that socket
    /// from that address. Only what was opened under the peer's own root is authentic, a relayed
    /// datagram is not.
    ///
    /// To be called for every probe and reply; for other packets, when they come from elsewhere
    /// than the route's ways, and otherwise about once a second. Too often does no harm but costs.
    pub fn heard(&mut self, now: Instant, peer: NodeId, via: Via) {
        self.tell(now, peer, |peer| peer.heard(now, via));
    }

    /// Notes that an authentic [`Reply`](super::Reply) with this id came from the peer, by whatever
    /// way. Says whether it was to a probe of late.
    pub fn replied(&mut self, now: Instant, peer: NodeId, id: u32) -> bool {
        let mut known = false;
        self.tell(now, peer, |peer| known = peer.replied(now, id));
        known
    }

    /// Notes that the socket could not send this way at all: unreachable, refused, not permitted.
    pub fn unreachable(&mut self, now: Instant, peer: NodeId, via: Via) {
        self.tell(now, peer, |peer| peer.unreachable(now, via));
    }

    /// Notes that the socket could not send a datagram of `size` bytes to the peer because it was
    /// too large (EMSGSIZE). Of a relayed packet, `peer` is the relay.
    pub fn too_big(&mut self, now: Instant, peer: NodeId, size: u16) {
        self.tell(now, peer, |peer| peer.too_big(now, size));
    }

    /// Notes that `relay` said that it cannot relay to the peer.
    pub fn cannot_relay(&mut self, now: Instant, peer: NodeId, relay: NodeId) {
        self.tell(now, peer, |peer| peer.refused(now, relay));
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.due.first()
            && at <= now
        {
            self.due.pop_first();
            self.step(now, id);
        }
    }

    /// When to call [`tick`](Self::tick) at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.due.first().map(|&(at, _)| at)
    }

    /// What is to be done, in order. Each action is given once.
    pub fn actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// How frames get to the peer at present, with the latest round-trip time.
    pub fn route(&self, peer: NodeId) -> Option<&Route> {
        self.peers.get(&peer)?.route()
    }

    /// The nodes that may reach the peer for this one, the likeliest first: for datagrams to a peer
    /// that there is no session with. After a [`cannot_relay`](Self::cannot_relay) that one comes
    /// last for a while.
    pub fn relays(&self, now: Instant, peer: NodeId) -> Vec<NodeId> {
        let Some(known) = self.peers.get(&peer) else { return Vec::new() };
        let mut relays = known.relays().order(now, &self.offers);
        relays.retain(|&relay| relay != peer);
        relays
    }

    /// The route by which this node passes on to `to` what `from` asked it to: a sealed packet of
    /// `len` bytes, as it came and as it goes on. `via` is how it came.
    ///
    /// # Errors
    ///
    /// If it must not be, or cannot.
    pub fn admit(
        &self,
        from: NodeId,
        via: Via,
        to: NodeId,
        len: usize,
    ) -> Result<&Route, Unrelayed> {
        if matches!(via, Via::Relay(_)) {
            return Err(Unrelayed::Again);
        }
        if !self.config.relay {
            return Err(Unrelayed::Off);
        }
        if to == from || to == self.config.own {
            return Err(Unrelayed::Loop);
        }
        let peer = self.peers.get(&to).ok_or(Unrelayed::Stranger(to))?;
        let direct = |route: &&Route| route.up && route.relay.is_none();
        let route = peer.route().filter(direct).ok_or(Unrelayed::NoDirectPath(to))?;
        if len > usize::from(route.packet) {
            return Err(Unrelayed::TooBig { node: to, len, packet: route.packet });
        }
        Ok(route)
    }

    fn tell(&mut self, now: Instant, id: NodeId, news: impl FnOnce(&mut Peer)) {
        if let Some(peer) = self.peers.get_mut(&id) {
            news(peer);
            self.wake(now, id);
            self.tick(now);
        }
    }

    fn step(&mut self, now: Instant, id: NodeId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let around = Surroundings { now, config: &self.config, offers: &self.offers };
        let mut out = Outbox { peer: id, ids: &mut self.ids, actions: &mut self.actions };
        let changed = peer.step(&around, &mut out);
        self.due.insert((peer.wake(), id));
        if changed {
            let route = peer.route().cloned();
            self.actions.push(Action::Route { peer: id, route });
        }
        let offer = peer.offer();
        self.set_offer(now, id, offer);
    }

    /// Whoever is reached by a relay must know when it changes.
    fn set_offer(&mut self, now: Instant, relay: NodeId, offer: Option<Offer>) {
        let before = match offer {
            Some(offer) => self.offers.insert(relay, offer),
            None => self.offers.remove(&relay),
        };
        let packet = |offer: Option<Offer>| offer.map(|offer| offer.packet);
        if packet(before) != packet(offer) {
            let uses = |peer: &Peer| peer.route().is_some_and(|route| route.relay == Some(relay));
            let users: Vec<_> =
                self.peers.iter().filter(|(_, peer)| uses(peer)).map(|(&id, _)| id).collect();
            for id in users {
                self.wake(now, id);
            }
        }
    }

    fn forget(&mut self, now: Instant, id: NodeId) {
        if let Some(peer) = self.peers.remove(&id) {
            self.due.remove(&(peer.wake(), id));
            if peer.route().is_some() {
                self.actions.push(Action::Route { peer: id, route: None });
            }
            self.set_offer(now, id, None);
        }
    }

    /// Has a peer stepped by the next tick, whatever it waits for.
    fn wake(&mut self, now: Instant, id: NodeId) {
        if let Some(peer) = self.peers.get(&id) {
            self.due.remove(&(peer.wake(), id));
            self.due.insert((now, id));
        }
    }
}
