use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
    time::Instant,
};

use weft_model::{NodeId, Suite};

use crate::{
    DropReason, Members, Peer,
    key::{Header, Lane, Limits, Opener, Root, RootId, Sealer, Unsealed, choose},
    routes::{Session, Sessions},
    worker::reason,
};

/// The sessions with all peers, and their control lanes.
pub(super) struct Keyring {
    suites: Vec<Suite>,
    limits: Limits,
    peers: BTreeMap<NodeId, Ring>,
    sessions: Arc<Sessions>,
    sealers: BTreeMap<RootId, Sealer>,
    openers: BTreeMap<RootId, Opener>,
}

/// What is shared with one peer.
struct Ring {
    /// None if the two have no suite in common, or the peer offers none.
    suite: Option<Suite>,
    /// Oldest first.
    roots: Vec<Arc<Root>>,
}

impl Keyring {
    pub(super) fn new(suites: Vec<Suite>, limits: Limits) -> Self {
        Self {
            suites,
            limits,
            peers: BTreeMap::new(),
            sessions: Arc::default(),
            sealers: BTreeMap::new(),
            openers: BTreeMap::new(),
        }
    }

    /// Takes the roots of all members, and gives back what belongs to others.
    pub(super) fn update(&mut self, members: &Members) {
        let ring = |peer: &Peer| Ring {
            suite: peer.offer.as_ref().and_then(|offer| choose(&self.suites, &offer.suites)),
            roots: peer.roots.clone(),
        };
        self.peers = members.peers.iter().map(|(&id, peer)| (id, ring(peer))).collect();

        let mut known = BTreeMap::new();
        for session in self.sessions.by_tag.values().flatten() {
            known.insert(session.root.id(), Arc::clone(session));
        }
        let mut sessions = Sessions::default();
        for (&peer, ring) in &self.peers {
            for root in &ring.roots {
                let session = match known.get(&root.id()) {
                    // Another object of the same secret has another counter: only one may live.
                    Some(session) if Arc::ptr_eq(&session.root, root) => Arc::clone(session),
                    _ => Arc::new(Session::new(peer, Arc::clone(root))),
                };
                sessions.by_tag.entry(root.inbound_tag()).or_default().push(session);
            }
        }
        self.sessions = Arc::new(sessions);

        let live: BTreeSet<_> =
            self.peers.values().flat_map(|ring| &ring.roots).map(|root| root.id()).collect();
        self.sealers.retain(|root, _| live.contains(root));
        self.openers.retain(|root, _| live.contains(root));
    }

    pub(super) fn sessions(&self) -> &Arc<Sessions> {
        &self.sessions
    }

    pub(super) fn suite(&self, peer: NodeId) -> Option<Suite> {
        self.peers.get(&peer)?.suite
    }

    /// The root that frames to `peer` are sealed under: the newest one that the peer has proved to
    /// have.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub(super) fn sending_root(
        &self,
        now: Instant,
        peer: NodeId,
    ) -> Result<&Arc<Root>, DropReason> {
        let roots = self.peers.get(&peer).map(|ring| ring.roots.as_slice()).unwrap_or_default();
        let valid = |root: &&Arc<Root>| now < root.expires();
        match roots.iter().rev().filter(valid).find(|root| root.is_confirmed()) {
            Some(root) => Ok(root),
            None if !roots.is_empty() && !roots.iter().any(|root| valid(&root)) => {
                Err(DropReason::Expired)
            }
            None => Err(DropReason::NoKey),
        }
    }

    /// The roots that `peer` has not proved to have.
    pub(super) fn unconfirmed(&self, now: Instant, peer: NodeId) -> BTreeSet<RootId> {
        let roots = self.peers.get(&peer).map(|ring| ring.roots.as_slice()).unwrap_or_default();
        let open = |root: &&Arc<Root>| !root.is_confirmed() && now < root.expires();
        roots.iter().filter(open).map(|root| root.id()).collect()
    }

    /// Seals a control packet for `peer`: under `root`, or the newest one that is confirmed, or
    /// the newest one.
    ///
    /// # Errors
    ///
    /// Why it must not be sent.
    pub(super) fn seal(
        &mut self,
        now: Instant,
        peer: NodeId,
        root: Option<RootId>,
        packet: &mut [u8],
    ) -> Result<(), DropReason> {
        let ring = self.peers.get(&peer).ok_or(DropReason::UnknownPeer)?;
        let suite = ring.suite.ok_or(DropReason::NoOffer)?;
        let root = match root {
            Some(id) => ring.roots.iter().find(|root| root.id() == id).ok_or(DropReason::NoKey)?,
            None => match self.sending_root(now, peer) {
                Ok(root) => root,
                Err(_) => ring.roots.last().ok_or(DropReason::NoKey)?,
            },
        };
        let root = Arc::clone(root);
        if self.sealers.get(&root.id()).is_some_and(|sealer| sealer.suite() != suite) {
            self.sealers.remove(&root.id());
        }
        let sealer = match self.sealers.entry(root.id()) {
            Entry::Occupied(sealer) => sealer.into_mut(),
            Entry::Vacant(place) => {
                let lent = root.sealer(Lane::CONTROL, suite, self.limits);
                place.insert(lent.map_err(|_| DropReason::NoKey)?)
            }
        };
        sealer.seal(now, packet).map_err(|error| match error {
            Unsealed::Expired => DropReason::Expired,
            Unsealed::Exhausted => DropReason::NoKey,
            Unsealed::Size { .. } => DropReason::TooBig,
        })
    }

    /// Opens a packet of a peer's control lane in place, and tells whose it is.
    ///
    /// # Errors
    ///
    /// Why it must be dropped.
    pub(super) fn open(
        &mut self,
        now: Instant,
        packet: &mut [u8],
    ) -> Result<Arc<Session>, DropReason> {
        let header = Header::decode(packet).map_err(|_| DropReason::Malformed)?;
        if header.lane != Lane::CONTROL {
            return Err(DropReason::Malformed);
        }
        let candidates = self.sessions.by_tag.get(&header.tag).cloned().unwrap_or_default();
        let sealed = packet.to_vec();
        let mut refused = DropReason::UnknownPeer;
        for session in candidates {
            // A wrong key destroys the packet: each gets it as it came.
            packet.copy_from_slice(&sealed);
            match self.opener(&session.root).map(|opener| opener.open(now, packet)) {
                Some(Ok(_)) => return Ok(session),
                Some(Err(error)) => refused = reason(error),
                None => refused = DropReason::NoKey,
            }
        }
        Err(refused)
    }

    fn opener(&mut self, root: &Arc<Root>) -> Option<&mut Opener> {
        match self.openers.entry(root.id()) {
            Entry::Occupied(opener) => Some(opener.into_mut()),
            Entry::Vacant(place) => {
                let opener = root.opener(Lane::CONTROL, &self.suites).ok()?;
                Some(place.insert(opener))
            }
        }
    }
}
