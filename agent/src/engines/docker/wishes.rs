//! Networks that Docker shall have on all hosts. The wish is a label of the network, so it reaches
//! every host with the network's definition, and hosts that come later too.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time;
use weft_model::{Family, Network, NetworkId};

use super::{DOCKER_LABEL, PLUGIN, driver::Driver, protocol::EngineId};
use crate::{
    api::types::CreateNetwork,
    chain::Chain,
    cluster::Cluster,
    refusal::{Refusal, RefusalKind},
};

/// How long this host's Docker may take to take up a network.
const PATIENCE: Duration = Duration::from_secs(10);

/// The networks that all hosts' Docker shall have.
pub(super) fn marked(cluster: &Cluster) -> BTreeSet<NetworkId> {
    let wanted = cluster.networks().filter(|network| is_marked(network));
    wanted.filter(|n| cluster.conflict(n.id).is_none()).map(|network| network.id).collect()
}

fn is_marked(network: &Network) -> bool {
    network.labels.get(DOCKER_LABEL).is_some_and(|value| value == "true")
}

/// What Docker would not do, and need not be asked again at once.
#[derive(Default)]
pub(super) struct Refused {
    creations: BTreeSet<NetworkId>,
    removals: BTreeSet<EngineId>,
}

impl Driver {
    /// Creates a marked network, and waits until this host's Docker has it.
    pub(super) async fn create_everywhere(
        &self,
        mut request: CreateNetwork,
    ) -> Result<NetworkId, Refusal> {
        let unavailable = |why: String| Refusal::new(RefusalKind::Unavailable, why);
        self.client.ping().await.map_err(|error| unavailable(Chain(&error).to_string()))?;
        request.labels.insert(DOCKER_LABEL.into(), "true".into());
        let id = self.ledger.create_network(request).await?;
        let mut changed = self.changed.subscribe();
        let made = time::timeout(PATIENCE, async {
            // The task that follows Docker makes it here, as its like do on the other hosts.
            while !self.bound().await.contains(&id) {
                changed.changed().await.expect("the sender is in this value");
            }
        });
        made.await.map_err(|_| {
            unavailable(format!(
                "the network was created, but Docker on this host did not take it within {PATIENCE:?}: see the agent's log"
            ))
        })?;
        Ok(id)
    }

    /// Makes the marked networks in this host's Docker, and removes there those that were made so and
    /// have ended; but for what is in `refused`, to which it adds what Docker refuses.
    pub(super) async fn fulfil(&self, refused: &mut Refused) {
        let snapshot = self.snapshot();
        let cluster = &snapshot.cluster;
        let bound = self.bound().await;
        for id in marked(cluster).difference(&bound) {
            if refused.creations.contains(id) {
                continue;
            }
            let Some(network) = cluster.network(*id) else { continue };
            match self.client.create_network(&creation(network)).await {
                Ok(()) => tracing::info!(network = %network.name, "made the network in Docker"),
                Err(error) => {
                    refused.creations.insert(*id);
                    tracing::warn!(network = %network.name, error = %Chain(&error), "cannot make the network in Docker");
                }
            }
        }
        let ended: Vec<EngineId> = self
            .registry
            .read(|known| {
                let made = known.networks.iter().filter(|(_, docker)| docker.wanted.wished);
                made.filter(|(_, docker)| docker.network.is_some_and(|id| cluster.is_removed(id)))
                    .map(|(id, _)| id.clone())
                    .collect()
            })
            .await;
        for id in ended {
            if refused.removals.contains(&id) {
                continue;
            }
            match self.client.remove_network(&id).await {
                Ok(()) => tracing::info!(network = %id, "removed the network from Docker"),
                Err(error) => {
                    refused.removals.insert(id.clone());
                    tracing::warn!(network = %id, error = %Chain(&error), "cannot remove the network from Docker");
                }
            }
        }
    }
}

/// The body of `POST /networks/create`.
fn creation(network: &Network) -> Value {
    let ranges: Vec<Value> = network
        .pools
        .iter()
        .map(|pool| {
            let mut range = BTreeMap::from([
                ("Subnet", json!(pool.subnet)),
                ("Gateway", json!(pool.gateway)),
                ("AuxiliaryAddresses", json!(pool.aux)),
            ]);
            if let Some(part) = pool.range {
                range.insert("IPRange", json!(part));
            }
            json!(range)
        })
        .collect();
    json!({
        "Name": network.name,
        "CheckDuplicate": true,
        "Driver": PLUGIN,
        "Internal": network.internal,
        "EnableIPv6": network.pool(Family::V6).is_some(),
        "IPAM": {"Driver": PLUGIN, "Config": ranges},
        "Options": {"weft.network": network.name, "weft.wished": "true"},
    })
}
