//! What other nodes last said, kept on disk: an agent that starts again takes up the kernel's
//! state as it is, before it has heard anybody.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time};
use tokio_util::sync::CancellationToken;
use weft_gossip::{
    ClusterView, Liveness, Member,
    identity::{read, write_atomic},
};
use weft_model::{
    Condition, Endpoint, HoldRecord, LoanRecord, NetworkId, NetworkRecord, Node, NodeId,
    ServiceRecord, WantRecord,
};

use crate::{chain::Chain, clock};

/// How long a node that is never heard is remembered. Long: its forwarding entries and its part
/// of the address space stay as long.
const KEPT_SECONDS: u64 = 7 * 86_400;
/// The least time between two writes; large clusters write less often.
const SETTLE: Duration = Duration::from_millis(200);

/// The records of other nodes, as they were last seen.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Remembered {
    nodes: BTreeMap<NodeId, Memory>,
}

/// One node's records.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Memory {
    /// Seconds since the Unix epoch by this host's clock.
    heard: u64,
    node: Node,
    networks: BTreeMap<NetworkId, NetworkRecord>,
    endpoints: BTreeMap<NetworkId, Vec<Endpoint>>,
    loans: BTreeMap<NetworkId, LoanRecord>,
    holds: BTreeMap<NetworkId, HoldRecord>,
    wants: BTreeMap<NetworkId, WantRecord>,
    #[serde(default)]
    services: BTreeMap<NetworkId, Vec<ServiceRecord>>,
    #[serde(default)]
    conditions: BTreeMap<NetworkId, Vec<Condition>>,
}

impl Remembered {
    /// Reads what was kept. A file that is absent or not understood is no memory, not an error:
    /// everything in it will be heard again.
    pub fn load(state_dir: &Path) -> Self {
        let path = path_in(state_dir);
        match read(&path) {
            Ok(Some(bytes)) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "cannot read what was remembered");
                Self::default()
            }),
            Ok(None) => Self::default(),
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "cannot read what was remembered");
                Self::default()
            }
        }
    }

    /// The view, with every node in it that is remembered and has not been heard yet.
    pub fn complete(&self, view: &Arc<ClusterView>) -> Arc<ClusterView> {
        let missing: Vec<_> = self.nodes.iter().filter(|(id, _)| !is_heard(view, **id)).collect();
        if missing.is_empty() {
            return Arc::clone(view);
        }
        let mut whole = ClusterView::clone(view);
        for (id, memory) in missing {
            whole.members.insert(*id, Arc::new(memory.member(*id)));
        }
        Arc::new(whole)
    }

    /// Drops the nodes that have been heard: from then on the view alone knows them, also when it
    /// forgets them.
    pub fn forget_heard(&mut self, view: &ClusterView) {
        self.nodes.retain(|id, _| !is_heard(view, *id));
    }

    /// Whether every node that is remembered has been heard.
    pub fn are_all_in(&self, view: &ClusterView) -> bool {
        self.nodes.keys().all(|id| is_heard(view, *id))
    }

    /// Takes in what is heard now; forgets who was silent too long.
    pub fn learn(&mut self, view: &ClusterView, me: NodeId, now: u64) {
        for member in view.members.values().filter(|member| member.id != me) {
            let Some(node) = &member.node else { continue };
            let silent = member.liveness != Liveness::Alive;
            let heard = self.nodes.get(&member.id).filter(|_| silent).map_or(now, |m| m.heard);
            self.nodes.insert(member.id, Memory::of(member, node, heard));
        }
        self.nodes.retain(|_, memory| memory.heard.saturating_add(KEPT_SECONDS) > now);
    }
}

/// Whether the node itself has been heard since this agent started.
fn is_heard(view: &ClusterView, id: NodeId) -> bool {
    view.members.get(&id).is_some_and(|member| member.node.is_some())
}

impl Memory {
    fn of(member: &Member, node: &Node, heard: u64) -> Self {
        Self {
            heard,
            node: node.clone(),
            networks: member.networks.clone(),
            endpoints: listed(&member.endpoints),
            loans: member.loans.clone(),
            holds: member.holds.clone(),
            wants: member.wants.clone(),
            services: listed(&member.services),
            conditions: listed(&member.conditions),
        }
    }

    fn member(&self, id: NodeId) -> Member {
        Member {
            id,
            liveness: Liveness::Suspect,
            node: Some(self.node.clone()),
            networks: self.networks.clone(),
            endpoints: keyed(&self.endpoints, |endpoint| endpoint.id),
            loans: self.loans.clone(),
            holds: self.holds.clone(),
            wants: self.wants.clone(),
            services: keyed(&self.services, |service| service.name.clone()),
            conditions: keyed(&self.conditions, |condition| condition.endpoint),
            drained: BTreeMap::new(),
            unknown_keys: 0,
            undecodable: 0,
        }
    }
}

fn listed<K, T: Clone>(
    networks: &BTreeMap<NetworkId, BTreeMap<K, T>>,
) -> BTreeMap<NetworkId, Vec<T>> {
    networks.iter().map(|(id, records)| (*id, records.values().cloned().collect())).collect()
}

fn keyed<K: Ord, T: Clone>(
    networks: &BTreeMap<NetworkId, Vec<T>>,
    key: impl Fn(&T) -> K,
) -> BTreeMap<NetworkId, BTreeMap<K, T>> {
    let by_key = |records: &Vec<T>| records.iter().map(|r| (key(r), r.clone())).collect();
    networks.iter().map(|(id, records)| (*id, by_key(records))).collect()
}

/// Keeps the file up to date until `stop`.
pub async fn keep(
    mut remembered: Remembered,
    me: NodeId,
    state_dir: PathBuf,
    mut view: watch::Receiver<Arc<ClusterView>>,
    stop: CancellationToken,
) {
    let path = path_in(&state_dir);
    let mut saved = remembered.clone();
    let mut settle = SETTLE;
    loop {
        let stopping = match stop.run_until_cancelled(view.changed()).await {
            None => true,
            Some(Ok(())) => false,
            Some(Err(_)) => return,
        };
        let heard = Arc::clone(&view.borrow_and_update());
        remembered.learn(&heard, me, clock::unix_seconds());
        if remembered != saved {
            let begun = time::Instant::now();
            let bytes = serde_json::to_vec(&remembered).expect("records are plain data");
            match write_atomic(&path, &bytes) {
                Ok(()) => saved = remembered.clone(),
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot keep what other nodes said");
                }
            }
            // A large file takes its time: at most a twentieth of it is spent on writing.
            settle = SETTLE.max(begun.elapsed() * 20);
        }
        if stopping {
            return;
        }
        // A change is kept at once; a flood of them is kept now and then.
        let _ = stop.run_until_cancelled(time::sleep(settle)).await;
    }
}

fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("remembered.json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Builder, network, node_id};

    fn heard() -> Arc<ClusterView> {
        let app = network(1, "app");
        let cluster = Builder::default().node(1).node(2).network(1, &app);
        cluster.endpoint(2, &app, "web", "10.1.0.8").view()
    }

    #[test]
    fn a_node_that_was_heard_before_is_there_again_but_not_alive() {
        let mut remembered = Remembered::default();
        remembered.learn(&heard(), node_id(1), 100);
        let text = serde_json::to_vec(&remembered).unwrap();
        let remembered: Remembered = serde_json::from_slice(&text).unwrap();

        let alone = Builder::default().node(1).view();
        let whole = remembered.complete(&alone);
        let member = &whole.members[&node_id(2)];
        assert_eq!(member.liveness, Liveness::Suspect);
        assert_eq!(member.endpoints, heard().members[&node_id(2)].endpoints);
        assert_eq!(remembered.complete(&heard()), heard());
    }

    #[test]
    fn a_node_that_was_heard_does_not_come_back_as_it_once_was() {
        let mut remembered = Remembered::default();
        remembered.learn(&heard(), node_id(1), 100);
        let alone = Builder::default().node(1).view();
        remembered.forget_heard(&alone);
        assert!(remembered.complete(&alone).members.contains_key(&node_id(2)));
        remembered.forget_heard(&heard());
        assert_eq!(remembered.complete(&alone), alone);
        assert!(remembered.are_all_in(&alone));
    }

    #[test]
    fn a_node_is_forgotten_after_a_week_of_silence_and_oneself_is_never_remembered() {
        let mut remembered = Remembered::default();
        remembered.learn(&heard(), node_id(1), 100);
        assert_eq!(remembered.nodes.keys().copied().collect::<Vec<_>>(), [node_id(2)]);
        let alone = Builder::default().node(1).view();
        remembered.learn(&alone, node_id(1), 99 + KEPT_SECONDS);
        assert_eq!(remembered.nodes.len(), 1);
        remembered.learn(&alone, node_id(1), 100 + KEPT_SECONDS);
        assert!(remembered.nodes.is_empty());
    }
}
