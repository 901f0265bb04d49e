//! From TLS sessions and records to the tunnel's members.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use time::OffsetDateTime;
use tokio::{sync::watch, time as clock};
use tokio_util::sync::CancellationToken;
use weft_gossip::quic::{ExportError, QuicCarrier, Session};
use weft_model::{Family, NodeId, VtepAddr};
use weft_seal::{
    Members, Peer,
    key::{Role, Root},
};
use zeroize::Zeroizing;

use super::{
    faults::Standing,
    keyring::{Keyring, SessionKey},
};
use crate::{chain::Chain, cluster::Cluster, ledger::Snapshots};

/// Gives the tunnel the keys of every live session, and says why there are none.
pub(super) struct Sessions {
    pub(super) me: NodeId,
    pub(super) local: VtepAddr,
    pub(super) carrier: Arc<QuicCarrier>,
    pub(super) snapshots: Snapshots,
    /// Nodes that were removed: nothing is shared with them any more.
    pub(super) revoked: watch::Receiver<BTreeSet<NodeId>>,
    pub(super) members: watch::Sender<Arc<Members>>,
}

impl Sessions {
    /// Follows the carrier and the records until `stop`.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.carrier.changes();
        let mut keyring = Keyring::default();
        let mut understood = None;
        loop {
            let cluster = Arc::clone(&self.snapshots.borrow_and_update().cluster);
            if !understood.as_ref().is_some_and(|before| Arc::ptr_eq(before, &cluster)) {
                self.carrier.keep(partners(self.me, &cluster));
            }
            self.look(&mut keyring, &cluster);
            understood = Some(cluster);
            let woken = async {
                // Every arm is cancel-safe and none awaits in its body.
                tokio::select! {
                    () = changes.next() => true,
                    changed = self.snapshots.changed() => changed.is_ok(),
                    Ok(()) = self.revoked.changed() => true,
                    () = clock::sleep(INTERVAL) => true,
                }
            };
            if stop.run_until_cancelled(woken).await != Some(true) {
                return;
            }
            // What comes together is looked at once.
            clock::sleep(SETTLE).await;
        }
    }

    /// Brings the keyring up to date, and the tunnel's members with it.
    fn look(&mut self, keyring: &mut Keyring, cluster: &Cluster) {
        let removed = self.revoked.borrow_and_update().clone();
        let now = Instant::now();
        let mut live = BTreeSet::new();
        for peer in cluster.members().map(|member| member.id).filter(|id| *id != self.me) {
            for session in self.carrier.sessions(peer) {
                match hold(keyring, peer, &session, now) {
                    Ok(session) => live.extend([session]),
                    Err(error) => tracing::error!(%peer, error = %Chain(&error), "no key"),
                };
            }
        }
        keyring.settle(now, &live, &removed);

        let members = self.members(cluster, keyring);
        self.members.send_if_modified(|current| {
            let changed = !is_same(current, &members);
            if changed {
                *current = Arc::new(members);
            }
            changed
        });
    }

    fn members(&self, cluster: &Cluster, keyring: &Keyring) -> Members {
        let failures = self.carrier.last_failures();
        let others = cluster.members().filter(|member| member.id != self.me);
        let peers = others.filter_map(|member| {
            let node = member.node.as_ref()?;
            let roots = keyring.roots(member.id);
            let standing = Standing {
                peer: node,
                family: Family::of(self.local.ip()),
                has_root: !roots.is_empty(),
                expired: keyring.has_expired(member.id),
                failure: failures.get(&node.address),
            };
            let peer = Peer {
                name: node.name.clone(),
                address: node.vtep.ip(),
                offer: node.sealing.clone(),
                fault: standing.fault(),
                roots,
            };
            Some((member.id, peer))
        });
        Members { peers: peers.collect() }
    }
}

/// The nodes with which this one shares an encrypted network: connections to them are kept even
/// where gossip has nothing to say.
fn partners(me: NodeId, cluster: &Cluster) -> BTreeSet<NodeId> {
    let mut partners = BTreeSet::new();
    for network in cluster.networks().filter(|network| network.encrypted) {
        let nodes = cluster.carriers(network.id);
        if nodes.contains(&me) {
            partners.extend(nodes);
        }
    }
    partners.remove(&me);
    partners
}

/// Sees that there is a root for `session`; returns what tells the session apart.
fn hold(
    keyring: &mut Keyring,
    peer: NodeId,
    session: &Session,
    now: Instant,
) -> Result<SessionKey, ExportError> {
    let key = *session.id()?.as_bytes();
    if keyring.lacks(peer, &key) {
        let secret = Zeroizing::new(session.export::<32>(LABEL, b"")?);
        let role = if session.dialled() { Role::Dialler } else { Role::Acceptor };
        let left = session.expires() - OffsetDateTime::now_utc();
        let left = Duration::try_from(left).unwrap_or(Duration::ZERO);
        let root = Root::new(&secret, role, now + left);
        tracing::debug!(%peer, root = %root.id(), ?role, "a session gave a key");
        keyring.add(peer, key, root);
    }
    Ok(key)
}

/// Whether the tunnel would make no difference between the two.
fn is_same(one: &Members, other: &Members) -> bool {
    let alike = |a: &Peer, b: &Peer| {
        let same_roots = a.roots.len() == b.roots.len()
            && a.roots.iter().zip(&b.roots).all(|(a, b)| Arc::ptr_eq(a, b));
        let plain = |peer: &Peer| (peer.name.clone(), peer.address, peer.fault.clone());
        same_roots && plain(a) == plain(b) && a.offer == b.offer
    };
    let others: BTreeMap<_, _> = other.peers.iter().collect();
    one.peers.len() == others.len()
        && one.peers.iter().all(|(id, peer)| others.get(id).is_some_and(|other| alike(peer, other)))
}

/// The exporter's label under which both ends of a session find the root of its keys.
const LABEL: &str = "weft data root";
/// How often roots are looked at although nothing happened: they expire, and are proved.
const INTERVAL: Duration = Duration::from_secs(5);
const SETTLE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Builder, network, node_id};

    #[test]
    fn connections_are_kept_to_those_who_share_an_encrypted_network() {
        let plain = network(1, "app");
        let secret = weft_model::Network { encrypted: true, ..network(2, "secret") };
        let foreign = weft_model::Network { encrypted: true, ..network(3, "foreign") };
        let cluster = [1, 2, 3, 4].into_iter().fold(Builder::default(), Builder::node);
        let cluster = [&plain, &secret, &foreign]
            .into_iter()
            .fold(cluster, |cluster, network| cluster.network(1, network))
            .endpoint(1, &plain, "a", "10.1.0.8")
            .endpoint(2, &plain, "b", "10.1.0.9")
            .endpoint(1, &secret, "c", "10.2.0.8")
            .endpoint(3, &secret, "d", "10.2.0.9")
            .endpoint(3, &foreign, "e", "10.3.0.8")
            .endpoint(4, &foreign, "f", "10.3.0.9")
            .build();
        assert_eq!(partners(node_id(1), &cluster), BTreeSet::from([node_id(3)]));
        assert!(partners(node_id(2), &cluster).is_empty());
    }

    #[test]
    fn members_are_the_same_only_with_the_very_same_roots() {
        let expires = Instant::now() + Duration::from_secs(60);
        let root = || Arc::new(Root::new(&[1; 32], Role::Dialler, expires));
        let members = |roots: &[Arc<Root>], fault: Option<&str>| {
            let peer = Peer {
                name: "h2".parse().unwrap(),
                address: [192, 0, 2, 2].into(),
                offer: None,
                roots: roots.to_vec(),
                fault: fault.map(Into::into),
            };
            Members { peers: BTreeMap::from([(node_id(2), peer)]) }
        };
        let (first, second) = (root(), root());
        let one = members(std::slice::from_ref(&first), None);
        assert!(is_same(&one, &members(std::slice::from_ref(&first), None)));
        assert!(!is_same(&one, &members(&[second], None)));
        assert!(!is_same(&one, &members(&[first], Some("gone"))));
        assert!(!is_same(&one, &Members::default()));
    }
}
