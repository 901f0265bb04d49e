use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use weft_model::NodeId;
use weft_seal::key::Root;

/// What tells TLS sessions apart: the same bytes at both ends.
pub(super) type SessionKey = [u8; 16];

/// The secrets that this node shares with others, one a TLS session. Pure.
///
/// A root may outlive its session: packets that were sealed under it are on their way, and where
/// no newer one works, it is what the two nodes have.
#[derive(Debug, Default)]
pub(super) struct Keyring {
    /// By peer, in the order in which they were made.
    peers: BTreeMap<NodeId, Vec<Held>>,
    /// Sessions whose root was let go of, and when. A second root of one secret would seal with
    /// the nonces of the first.
    spent: BTreeMap<SessionKey, Instant>,
    /// Peers whose last root has expired.
    expired: BTreeSet<NodeId>,
}

#[derive(Debug)]
struct Held {
    session: SessionKey,
    root: Arc<Root>,
    /// When the session was found closed.
    ended: Option<Instant>,
    /// Since when, besides, another session is open whose root the peer is known to have.
    superseded: Option<Instant>,
}

impl Keyring {
    /// Whether a root is to be made for a session of `peer`: it has none and never had one.
    pub(super) fn lacks(&self, peer: NodeId, session: &SessionKey) -> bool {
        !self.spent.contains_key(session)
            && !self.held(peer).iter().any(|held| held.session == *session)
    }

    /// Adds the newest root of `peer`.
    pub(super) fn add(&mut self, peer: NodeId, session: SessionKey, root: Root) {
        let held = Held { session, root: Arc::new(root), ended: None, superseded: None };
        self.expired.remove(&peer);
        self.peers.entry(peer).or_default().push(held);
    }

    /// Lets go of what is of no more use: `live` are the sessions that are open.
    ///
    /// Both nodes must keep what the other one may seal with, and neither knows which of several
    /// that is. So the root of a closed session stays until the two have an open one that works,
    /// and [`OVERLAP`] longer; if the peer never proved that it has it, for [`OVERLAP`] only, unless
    /// there is no other. Expired ones go, and all of `removed` nodes.
    pub(super) fn settle(
        &mut self,
        now: Instant,
        live: &BTreeSet<SessionKey>,
        removed: &BTreeSet<NodeId>,
    ) {
        self.expired.retain(|peer| !removed.contains(peer));
        for (peer, held) in &mut self.peers {
            for held in held.iter_mut() {
                let ended = !live.contains(&held.session);
                held.ended = ended.then(|| *held.ended.get_or_insert(now));
            }
            let works = held.iter().any(|held| held.ended.is_none() && held.root.is_confirmed());
            for held in held.iter_mut() {
                let superseded = works && held.ended.is_some();
                held.superseded = superseded.then(|| *held.superseded.get_or_insert(now));
            }
            let mut count = held.len();
            held.retain(|held| {
                let expired = held.root.expires() <= now;
                let kept = !expired && !removed.contains(peer) && held.is_of_use(now, count);
                if !kept {
                    self.spent.insert(held.session, now);
                    count -= 1;
                }
                if expired && count == 0 && !removed.contains(peer) {
                    self.expired.insert(*peer);
                }
                kept
            });
        }
        self.peers.retain(|_, held| !held.is_empty());
        self.spent.retain(|session, since| live.contains(session) || now < *since + REMEMBERED);
    }

    /// The roots that are shared with `peer`, the one to be preferred last: the newest, but none
    /// of a closed session before one of an open session, which both nodes see alike.
    pub(super) fn roots(&self, peer: NodeId) -> Vec<Arc<Root>> {
        let (ended, open): (Vec<_>, Vec<_>) =
            self.held(peer).iter().partition(|held| held.ended.is_some());
        ended.into_iter().chain(open).map(|held| Arc::clone(&held.root)).collect()
    }

    /// Whether there would be a root with `peer`, had the last one not expired.
    pub(super) fn has_expired(&self, peer: NodeId) -> bool {
        self.expired.contains(&peer)
    }

    fn held(&self, peer: NodeId) -> &[Held] {
        self.peers.get(&peer).map_or(&[], Vec::as_slice)
    }
}

impl Held {
    /// Whether the peer may still seal with it. `count` are the roots that there are with the peer.
    fn is_of_use(&self, now: Instant, count: usize) -> bool {
        let recent = |since: Option<Instant>| since.is_none_or(|since| now < since + OVERLAP);
        match (self.ended, self.root.is_confirmed()) {
            (None, _) => true,
            (Some(_), true) => recent(self.superseded) && count <= MOST,
            (Some(_), false) => recent(self.ended) || count == 1,
        }
    }
}

/// How long packets may be on their way, and the two nodes of two minds about a session.
const OVERLAP: Duration = Duration::from_secs(30);
/// How many roots there may be with one peer before those of closed sessions go at once.
const MOST: usize = 6;
/// How long a session is remembered after its root was let go of: longer than a connection that a
/// wrong clock hid could stay open.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

#[cfg(test)]
mod tests {
    use weft_model::Suite;
    use weft_seal::key::{HEADER, Lane, Limits, META, Role, TAG};

    use super::*;
    use crate::fixture::node_id;

    const LONG: Duration = Duration::from_secs(86_400);

    fn root(n: u8, role: Role, expires: Instant) -> Root {
        Root::new(&[n; 32], role, expires)
    }

    /// Sessions `1..=count` with node 2, all of which are open.
    fn ring(count: u8, now: Instant) -> Keyring {
        let mut ring = Keyring::default();
        for n in 1..=count {
            ring.add(node_id(2), [n; 16], root(n, Role::Dialler, now + LONG));
        }
        ring.settle(now, &open(1..=count), &BTreeSet::new());
        ring
    }

    fn open(sessions: impl IntoIterator<Item = u8>) -> BTreeSet<SessionKey> {
        sessions.into_iter().map(|n| [n; 16]).collect()
    }

    fn sessions(ring: &Keyring) -> Vec<u8> {
        ring.held(node_id(2)).iter().map(|held| held.session[0]).collect()
    }

    /// Lets the peer of session `n` prove that it has the root.
    fn confirm(ring: &Keyring, n: u8, now: Instant) {
        let peer = Arc::new(root(n, Role::Acceptor, now + LONG));
        let suite = Suite::Aes128Gcm;
        let mut sealer = peer.sealer(Lane::CONTROL, suite, Limits::default()).unwrap();
        let mut packet = [0; HEADER + META + TAG];
        sealer.seal(now, &mut packet).unwrap();
        let held = ring.held(node_id(2)).iter().find(|held| held.session == [n; 16]).unwrap();
        let mut opener = held.root.opener(Lane::CONTROL, &[suite]).unwrap();
        opener.open(now, &mut packet).unwrap();
        assert!(held.root.is_confirmed());
    }

    #[test]
    fn a_session_gets_one_root_and_no_other_as_long_as_it_can_be_open() {
        let now = Instant::now();
        let mut ring = ring(1, now);
        assert!(!ring.lacks(node_id(2), &[1; 16]));
        assert!(ring.lacks(node_id(2), &[2; 16]));

        ring.settle(now, &open([1]), &BTreeSet::from([node_id(2)]));
        assert!(ring.roots(node_id(2)).is_empty());
        assert!(!ring.lacks(node_id(2), &[1; 16]));
        ring.settle(now + 3 * LONG, &open([1]), &BTreeSet::new());
        assert!(!ring.lacks(node_id(2), &[1; 16]));
        ring.settle(now + 3 * LONG, &open([]), &BTreeSet::new());
        assert!(ring.lacks(node_id(2), &[1; 16]));
    }

    #[test]
    fn a_root_stays_the_same_object_for_as_long_as_it_is_held() {
        let now = Instant::now();
        let mut ring = ring(2, now);
        let before = ring.roots(node_id(2));
        ring.settle(now + OVERLAP, &open([1, 2]), &BTreeSet::new());
        let after = ring.roots(node_id(2));
        assert!(before.iter().zip(&after).all(|(a, b)| Arc::ptr_eq(a, b)));
    }

    #[test]
    fn the_root_of_a_closed_session_stays_while_packets_may_be_on_their_way() {
        let now = Instant::now();
        let mut ring = ring(2, now);
        for n in [1, 2] {
            confirm(&ring, n, now);
        }
        ring.settle(now, &open([2]), &BTreeSet::new());
        ring.settle(now + OVERLAP - Duration::from_secs(1), &open([2]), &BTreeSet::new());
        assert_eq!(sessions(&ring), [1, 2]);
        ring.settle(now + OVERLAP, &open([2]), &BTreeSet::new());
        assert_eq!(sessions(&ring), [2]);
    }

    #[test]
    fn of_two_sessions_the_open_one_is_preferred_whichever_was_made_first() {
        let now = Instant::now();
        let mut ring = ring(2, now);
        let ids = |ring: &Keyring| -> Vec<_> {
            ring.roots(node_id(2)).iter().map(|root| root.id()).collect()
        };
        let [first, second] = ids(&ring)[..] else { panic!("two roots") };
        ring.settle(now, &open([1]), &BTreeSet::new());
        assert_eq!(ids(&ring), [second, first]);
        ring.settle(now, &open([]), &BTreeSet::new());
        assert_eq!(ids(&ring), [first, second]);
    }

    #[test]
    fn what_the_peer_is_known_to_have_stays_until_an_open_session_has_worked_for_a_while() {
        let now = Instant::now();
        let mut ring = ring(4, now);
        for n in [1, 2] {
            confirm(&ring, n, now);
        }
        // Sessions 1 and 2 are closed, in either order of preference; 3 failed; 4 does not work yet.
        for at in [now, now + 10 * OVERLAP] {
            ring.settle(at, &open([4]), &BTreeSet::new());
        }
        assert_eq!(sessions(&ring), [1, 2, 4]);
        confirm(&ring, 4, now);
        let proved = now + 11 * OVERLAP;
        for at in [proved, proved + OVERLAP - Duration::from_secs(1)] {
            ring.settle(at, &open([4]), &BTreeSet::new());
            assert_eq!(sessions(&ring), [1, 2, 4]);
        }
        ring.settle(proved + OVERLAP, &open([4]), &BTreeSet::new());
        assert_eq!(sessions(&ring), [4]);
    }

    #[test]
    fn sessions_that_break_again_and_again_leave_no_heap_of_roots() {
        let now = Instant::now();
        let mut ring = ring(30, now);
        for n in 1..=30 {
            confirm(&ring, n, now);
        }
        ring.settle(now, &open([]), &BTreeSet::new());
        assert_eq!(sessions(&ring), [25, 26, 27, 28, 29, 30]);
    }

    #[test]
    fn without_any_session_the_last_root_goes_on_until_it_expires() {
        let now = Instant::now();
        let mut ring = ring(1, now);
        for at in [now, now + LONG - Duration::from_secs(1)] {
            ring.settle(at, &open([]), &BTreeSet::new());
        }
        assert_eq!(sessions(&ring), [1]);
        ring.settle(now + LONG, &open([]), &BTreeSet::new());
        assert!(sessions(&ring).is_empty());
    }

    #[test]
    fn an_expired_root_goes_although_its_session_is_open() {
        let now = Instant::now();
        let mut ring = ring(1, now);
        assert!(!ring.has_expired(node_id(2)));
        ring.settle(now + LONG, &open([1]), &BTreeSet::new());
        assert!(sessions(&ring).is_empty());
        assert!(!ring.lacks(node_id(2), &[1; 16]));
        assert!(ring.has_expired(node_id(2)));

        ring.add(node_id(2), [2; 16], root(2, Role::Dialler, now + 2 * LONG));
        assert!(!ring.has_expired(node_id(2)));
    }
}
