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
    /// By peer, the oldest first.
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
}

impl Keyring {
    /// Whether a root is to be made for a session of `peer`: it has none and never had one.
    pub(super) fn lacks(&self, peer: NodeId, session: &SessionKey) -> bool {
        !self.spent.contains_key(session)
            && !self.held(peer).iter().any(|held| held.session == *session)
    }

    /// Adds the newest root of `peer`.
    pub(super) fn add(&mut self, peer: NodeId, session: SessionKey, root: Root) {
        let held = Held { session, root: Arc::new(root), ended: None };
        self.expired.remove(&peer);
        self.peers.entry(peer).or_default().push(held);
    }

    /// Lets go of what is of no more use: `live` are the sessions that are open.
    ///
    /// Of a closed session the root stays for [`OVERLAP`], and longer if it is the newest of all
    /// or the newest that the peer is known to have. Expired ones go, and all of `removed` nodes.
    pub(super) fn settle(
        &mut self,
        now: Instant,
        live: &BTreeSet<SessionKey>,
        removed: &BTreeSet<NodeId>,
    ) {
        self.expired.retain(|peer| !removed.contains(peer));
        for (peer, held) in &mut self.peers {
            let newest = held.last().map(|held| held.session);
            let proved = held.iter().rev().find(|held| held.root.is_confirmed());
            let proved = proved.map(|held| held.session);
            held.retain_mut(|held| {
                let open = live.contains(&held.session);
                held.ended = (!open).then(|| *held.ended.get_or_insert(now));
                let recent = held.ended.is_none_or(|ended| now < ended + OVERLAP);
                let session = Some(held.session);
                let kept = now < held.root.expires()
                    && !removed.contains(peer)
                    && (recent || session == newest || session == proved);
                if !kept {
                    self.spent.insert(held.session, now);
                }
                if session == newest && held.root.expires() <= now && !removed.contains(peer) {
                    self.expired.insert(*peer);
                }
                kept
            });
        }
        self.peers.retain(|_, held| !held.is_empty());
        self.spent.retain(|session, since| live.contains(session) || now < *since + REMEMBERED);
    }

    /// The roots that are shared with `peer`, the oldest first.
    pub(super) fn roots(&self, peer: NodeId) -> Vec<Arc<Root>> {
        self.held(peer).iter().map(|held| Arc::clone(&held.root)).collect()
    }

    /// Whether there would be a root with `peer`, had the last one not expired.
    pub(super) fn has_expired(&self, peer: NodeId) -> bool {
        self.expired.contains(&peer)
    }

    fn held(&self, peer: NodeId) -> &[Held] {
        self.peers.get(&peer).map_or(&[], Vec::as_slice)
    }
}

/// How long a root is kept after its session was closed, while there is a newer one.
const OVERLAP: Duration = Duration::from_secs(30);
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
        confirm(&ring, 2, now);
        ring.settle(now, &open([2]), &BTreeSet::new());
        ring.settle(now + OVERLAP - Duration::from_secs(1), &open([2]), &BTreeSet::new());
        assert_eq!(sessions(&ring), [1, 2]);
        ring.settle(now + OVERLAP, &open([2]), &BTreeSet::new());
        assert_eq!(sessions(&ring), [2]);
    }

    #[test]
    fn what_the_peer_is_known_to_have_stays_until_it_proves_that_it_has_a_newer_one() {
        let now = Instant::now();
        let mut ring = ring(3, now);
        confirm(&ring, 1, now);
        for at in [now, now + 2 * OVERLAP] {
            ring.settle(at, &open([3]), &BTreeSet::new());
        }
        assert_eq!(sessions(&ring), [1, 3]);
        confirm(&ring, 3, now);
        ring.settle(now + 2 * OVERLAP, &open([3]), &BTreeSet::new());
        assert_eq!(sessions(&ring), [3]);
    }

    #[test]
    fn without_any_session_the_newest_root_goes_on_until_it_expires() {
        let now = Instant::now();
        let mut ring = ring(2, now);
        for at in [now, now + LONG - Duration::from_secs(1)] {
            ring.settle(at, &open([]), &BTreeSet::new());
        }
        assert_eq!(sessions(&ring), [2]);
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
