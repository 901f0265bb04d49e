//! What all handlers share, and which network of the cluster one of Docker's stands for.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{self, Instant},
};
use weft_model::{EndpointId, Label, Network, NetworkId};

use super::{
    client::Client,
    pools,
    protocol::EngineId,
    registry::{DockerNetwork, Registry, RegistryError},
    wanted::{Wanted, network_name},
};
use crate::{
    chain::Chain,
    cluster::Cluster,
    health::EngineContainers,
    ledger::{Ledger, Snapshot, Snapshots},
    refusal::{Refusal, RefusalKind},
};

/// The driver behind Docker's two plugins. One for all calls.
pub(super) struct Driver {
    pub(super) registry: Registry,
    pub(super) ledger: Ledger,
    pub(super) client: Client,
    snapshots: Snapshots,
    /// Addresses that Docker has and no endpoint yet.
    reserved: Mutex<BTreeMap<(NetworkId, IpAddr), Reserved>>,
    /// Docker's networks that cannot be used, and why.
    unusable: Mutex<BTreeMap<EngineId, String>>,
    /// Held while a network is looked for or made: Docker's calls overlap.
    binding: tokio::sync::Mutex<()>,
    /// Tells of every network, endpoint or sandbox that came or went.
    pub(super) changed: watch::Sender<()>,
    /// Docker's containers behind endpoints, with what their health checks say.
    pub(super) containers: watch::Sender<Arc<EngineContainers>>,
}

#[derive(Clone, Copy)]
struct Reserved {
    id: EndpointId,
    since: Instant,
}

impl Driver {
    pub(super) fn new(
        registry: Registry,
        ledger: Ledger,
        snapshots: Snapshots,
        client: Client,
    ) -> Self {
        Self {
            registry,
            ledger,
            client,
            snapshots,
            reserved: Mutex::default(),
            unusable: Mutex::default(),
            binding: tokio::sync::Mutex::default(),
            changed: watch::channel(()).0,
            containers: watch::Sender::default(),
        }
    }

    pub(super) fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshots.borrow())
    }

    pub(super) fn snapshots(&self) -> Snapshots {
        self.snapshots.clone()
    }

    /// What the keeper knows once it has done everything that it was asked for before.
    async fn newest(&self) -> Result<Arc<Snapshot>, Refusal> {
        self.ledger.usage().await?;
        Ok(self.snapshot())
    }

    /// The cluster's network that one of Docker's stands for. It is looked for, and made if need be,
    /// when it is first asked for: only then does Docker tell its name.
    ///
    /// # Errors
    ///
    /// Docker's network is unknown, or the cluster's is another one or was removed.
    pub(super) async fn bind(&self, id: &EngineId) -> Result<Arc<Network>, Refusal> {
        // One that is unknown is no network of ours to speak of.
        self.docker_network(id).await?;
        let bound = self.look_up(id).await;
        match &bound {
            Ok(_) => self.forget_finding(id),
            Err(refusal) => {
                self.unusable_mut().insert(id.clone(), refusal.message.clone());
            }
        }
        bound
    }

    /// What an operator should look at.
    pub(super) fn findings(&self) -> Vec<String> {
        let unusable = self.unusable_mut();
        unusable
            .iter()
            .map(|(id, why)| format!("Docker's network {id} cannot be used: {why}"))
            .collect()
    }

    pub(super) fn forget_finding(&self, network: &EngineId) {
        self.unusable_mut().remove(network);
    }

    fn unusable_mut(&self) -> MutexGuard<'_, BTreeMap<EngineId, String>> {
        self.unusable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look_up(&self, id: &EngineId) -> Result<Arc<Network>, Refusal> {
        let _one = self.binding.lock().await;
        let docker = self.docker_network(id).await?;
        let Some(bound) = docker.network else {
            let name = match &docker.wanted.name {
                Some(name) => name.clone(),
                None => self.docker_name(id).await?,
            };
            let network = self.find_or_create(&docker.wanted, name).await?;
            self.note_binding(id, network.id).await?;
            return Ok(network);
        };
        let snapshot = self.snapshot();
        let Some(network) = snapshot.cluster.network(bound) else {
            return Err(Refusal::missing(format!(
                "the cluster's network {} of Docker's network {id} was removed: remove Docker's with docker network rm, and create it again",
                bound.short()
            )));
        };
        match snapshot.cluster.conflict(bound) {
            // Two hosts created it in the same moment; the other one has the name.
            Some(other) if other.name == network.name && self.is_unused(bound) => {
                docker.wanted.check_same(other)?;
                self.note_binding(id, other.id).await?;
                self.remove_superseded(bound).await;
                Ok(Arc::clone(other))
            }
            // A request says what the conflict is.
            Some(_) | None => Ok(Arc::clone(network)),
        }
    }

    /// The cluster's network called `name`, made as `wanted` if there is none.
    pub(super) async fn find_or_create(
        &self,
        wanted: &Wanted,
        name: Label,
    ) -> Result<Arc<Network>, Refusal> {
        for _ in 0..2 {
            let snapshot = self.newest().await?;
            if let Some(network) = pools::by_name(&snapshot.cluster, &name) {
                wanted.check_same(network)?;
                return Ok(Arc::clone(network));
            }
            let wanted = self.with_free_subnets(wanted, &snapshot.cluster).await?;
            match self.ledger.create_network(wanted.definition(name.clone())).await {
                Ok(id) => {
                    let snapshot = self.newest().await?;
                    if let Some(network) = snapshot.cluster.network(id) {
                        return Ok(Arc::clone(network));
                    }
                }
                // Somebody else was quicker.
                Err(refusal) if refusal.field == Some("name") => {}
                Err(refusal) => return Err(refusal),
            }
        }
        Err(Refusal::new(
            RefusalKind::Unavailable,
            format!("network {name} comes and goes: see weft network ls, then try again"),
        ))
    }

    /// A subnet that was picked for another network than this one turned out to be is replaced.
    async fn with_free_subnets(
        &self,
        wanted: &Wanted,
        cluster: &Cluster,
    ) -> Result<Wanted, Refusal> {
        let mut wanted = wanted.clone();
        for range in wanted.ranges.iter_mut().filter(|range| range.picked) {
            let mut others = cluster.networks().flat_map(|network| &network.pools);
            if others.any(|pool| pool.subnet.overlaps(range.subnet.net())) {
                let family = range.subnet.family();
                let random = rand::random();
                range.subnet = self
                    .registry
                    .read(|known| pools::fresh(known, cluster, family, random))
                    .await?;
                range.gateway = None;
            }
        }
        Ok(wanted)
    }

    async fn docker_name(&self, id: &EngineId) -> Result<Label, Refusal> {
        let asked = time::timeout(QUICK, self.client.network(id)).await;
        let unknown = |why: String| {
            Refusal::new(
                RefusalKind::Unavailable,
                format!(
                    "Docker does not say what its network {id} is called ({why}): create it with -o weft.network=NAME"
                ),
            )
        };
        match asked {
            Ok(Ok(network)) => network_name(&network.name),
            Ok(Err(error)) => Err(unknown(Chain(&error).to_string())),
            Err(_) => Err(unknown("no answer in time".into())),
        }
    }

    async fn note_binding(&self, id: &EngineId, network: NetworkId) -> Result<(), Refusal> {
        self.change(|known| {
            if let Some(docker) = known.networks.get_mut(id) {
                docker.network = Some(network);
            }
        })
        .await
    }

    fn is_unused(&self, network: NetworkId) -> bool {
        self.snapshot().book.endpoints_of(network).next().is_none()
    }

    async fn remove_superseded(&self, network: NetworkId) {
        if let Err(refusal) = self.ledger.remove_network(network.to_string(), false).await {
            tracing::warn!(%network, %refusal, "a superseded network stays");
        }
    }

    /// Changes the registry and tells of it.
    pub(super) async fn change<T>(
        &self,
        change: impl FnOnce(&mut super::registry::Known) -> T,
    ) -> Result<T, Refusal> {
        let changed = self.registry.change(change).await.map_err(|error| unwritable(&error))?;
        self.changed.send_replace(());
        Ok(changed)
    }

    /// Docker's network, which must be known.
    pub(super) async fn docker_network(&self, id: &EngineId) -> Result<DockerNetwork, Refusal> {
        let known = self.registry.read(|known| known.networks.get(id).cloned()).await;
        known.ok_or_else(|| {
            Refusal::missing(format!(
                "weft does not know Docker's network {id}: remove it with docker network rm, and create it again"
            ))
        })
    }

    /// Takes note of an address that waits for its endpoint.
    pub(super) fn keep_reservation(&self, network: NetworkId, ip: IpAddr, id: EndpointId) {
        self.reserved_mut().insert((network, ip), Reserved { id, since: Instant::now() });
    }

    pub(super) fn take_reservation(&self, network: NetworkId, ip: IpAddr) -> Option<EndpointId> {
        self.reserved_mut().remove(&(network, ip)).map(|reserved| reserved.id)
    }

    pub(super) fn reservation(&self, network: NetworkId, ip: IpAddr) -> Option<EndpointId> {
        self.reserved_mut().get(&(network, ip)).map(|reserved| reserved.id)
    }

    /// The addresses that have waited for longer than `age`.
    pub(super) fn old_reservations(&self, age: Duration) -> Vec<(NetworkId, IpAddr)> {
        let reserved = self.reserved_mut();
        let old = reserved.iter().filter(|(_, reserved)| reserved.since.elapsed() > age);
        old.map(|(key, _)| *key).collect()
    }

    fn reserved_mut(&self) -> MutexGuard<'_, BTreeMap<(NetworkId, IpAddr), Reserved>> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unwritable(error: &RegistryError) -> Refusal {
    Refusal::new(RefusalKind::Failed, Chain(error).to_string())
}

/// How long Docker may take for what it knows without waiting for anything.
pub(super) const QUICK: Duration = Duration::from_secs(1);
