//! The calls of Docker's network plugin that are about networks.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;
use weft_model::{Family, Label, Subnet};

use super::{
    ADDRESS_SPACE,
    driver::Driver,
    protocol::{AllocateNetwork, CreateNetwork, DeleteNetwork, EngineId, IpamData},
    registry::{DockerNetwork, Known},
    wanted::{GENERIC, Range, Wanted},
};
use crate::{
    clock,
    refusal::{Refusal, RefusalKind, refuse},
};

impl Driver {
    /// Takes up a network of Docker's. One that names the cluster's network is bound at once; of
    /// another the name is not known yet.
    ///
    /// # Errors
    ///
    /// Its options are of no use, its addresses would not come from weft, or the cluster's network
    /// is another one.
    pub(super) async fn create_network(&self, asked: CreateNetwork) -> Result<(), Refusal> {
        let id = &asked.network_id;
        if self.registry.read(|known| known.networks.contains_key(id)).await {
            return Ok(());
        }
        let data: Vec<&IpamData> = asked.ipv4.iter().chain(&asked.ipv6).collect();
        let pools = self.registry.read(|known| pools_of(known, &data)).await?;
        let ranges = pools.values().cloned().collect();
        let wanted = Wanted::read(&asked.options, ranges)?;
        self.take_up(id, wanted, pools.into_keys().collect()).await
    }

    /// Takes up a network that is the same on all nodes of a swarm.
    pub(super) async fn create_swarm_network(&self, asked: CreateNetwork) -> Result<(), Refusal> {
        let id = &asked.network_id;
        if self.registry.read(|known| known.networks.contains_key(id)).await {
            return Ok(());
        }
        let ranges = swarm_ranges(asked.ipv4.iter().chain(&asked.ipv6))?;
        let mut wanted = Wanted::read(&asked.options, ranges)?;
        wanted.name = Some(swarm_name(wanted.name, id));
        self.take_up(id, wanted, Vec::new()).await
    }

    /// Makes the cluster's network of a swarm's network, on one of its managers, before any node uses
    /// it. Returns the options that the nodes get.
    pub(super) async fn allocate_network(
        &self,
        asked: AllocateNetwork,
    ) -> Result<BTreeMap<String, String>, Refusal> {
        let generic = BTreeMap::from([(GENERIC.to_owned(), json!(asked.options))]);
        let ranges = swarm_ranges(asked.ipv4.iter().chain(&asked.ipv6))?;
        let wanted = Wanted::read(&generic, ranges)?;
        let name = swarm_name(wanted.name.clone(), &asked.network_id);
        self.find_or_create(&wanted, name.clone()).await?;
        // The nodes find it by its name, whatever the swarm calls it.
        let mut options = asked.options;
        options.insert("weft.network".into(), name.to_string());
        Ok(options)
    }

    /// Removes the cluster's network of a swarm's network, unless somebody named it.
    pub(super) async fn free_network(&self, asked: DeleteNetwork) -> Result<(), Refusal> {
        let name = swarm_name(None, &asked.network_id);
        match self.ledger.remove_network(name.to_string(), false).await {
            Err(refusal) if refusal.kind == RefusalKind::Missing => Ok(()),
            other => other,
        }
    }

    async fn take_up(
        &self,
        id: &EngineId,
        wanted: Wanted,
        pools: Vec<String>,
    ) -> Result<(), Refusal> {
        let network = match &wanted.name {
            Some(name) => Some(self.find_or_create(&wanted, name.clone()).await?.id),
            None => None,
        };
        let since = clock::unix_seconds();
        self.change(|known| {
            for pool in &pools {
                if let Some(pool) = known.pools.get_mut(pool) {
                    pool.network = Some(id.clone());
                }
            }
            known.networks.insert(id.clone(), DockerNetwork { wanted, network, since });
        })
        .await
    }

    /// Lets go of a network and whatever of it is left. The cluster's network stays: other hosts
    /// may use it.
    pub(super) async fn delete_network(&self, asked: DeleteNetwork) -> Result<(), Refusal> {
        self.forget_network(&asked.network_id).await
    }

    pub(super) async fn forget_network(&self, id: &EngineId) -> Result<(), Refusal> {
        let endpoints: Vec<EngineId> = self
            .registry
            .read(|known| known.endpoints_of(id).map(|(endpoint, _)| endpoint.clone()).collect())
            .await;
        for endpoint in &endpoints {
            self.forget_endpoint(endpoint).await?;
        }
        self.forget_finding(id);
        self.change(|known| {
            known.networks.remove(id);
            known.pools.retain(|_, pool| pool.network.as_ref() != Some(id));
        })
        .await
    }
}

/// What a swarm's network is called in the cluster, if nobody gave a name.
fn swarm_name(given: Option<Label>, id: &EngineId) -> Label {
    given.unwrap_or_else(|| {
        format!("swarm-{}", id.short()).parse().expect("a short id is letters and digits")
    })
}

/// The address ranges of a swarm's network. Its addresses come from the swarm, which gives out each
/// once.
fn swarm_ranges<'a>(data: impl Iterator<Item = &'a IpamData>) -> Result<Vec<Range>, Refusal> {
    data.map(|data| {
        let subnet = Subnet::try_from(data.pool)
            .map_err(|error| Refusal::field("subnets", error.to_string()))?;
        Ok(Range {
            subnet,
            picked: false,
            part: None,
            gateway: data.gateway.map(|net| net.addr()),
            aux: BTreeMap::new(),
        })
    })
    .collect()
}

/// The pools that a new network is made of, and what it says about them.
fn pools_of(known: &Known, data: &[&IpamData]) -> Result<BTreeMap<String, Range>, Refusal> {
    let mut pools = BTreeMap::new();
    let mut families = BTreeSet::new();
    for data in data {
        let net = data.pool;
        if data.address_space != ADDRESS_SPACE {
            return refuse(
                "options",
                format!(
                    "the addresses of {net} would come from Docker's own IPAM, which gives out the same ones on every host: add --ipam-driver weft"
                ),
            );
        }
        // Of several, the newest: those before it were never used.
        let (id, pool) = known
            .pools
            .iter()
            .filter(|(_, pool)| pool.network.is_none() && pool.range.subnet.net() == net)
            .max_by_key(|(_, pool)| pool.since)
            .ok_or_else(|| {
                Refusal::new(
                    RefusalKind::Unavailable,
                    format!("weft did not give out pool {net}, or took it back: try again"),
                )
            })?;
        let family = Family::of(net.addr());
        if !families.insert(family) {
            return refuse(
                "subnets",
                format!("{net} is the second {family} subnet: give one a family"),
            );
        }
        let aux = data.aux_addresses.iter().map(|(name, net)| (name.clone(), net.addr()));
        pools.insert(id.clone(), Range { aux: aux.collect(), ..pool.range.clone() });
    }
    Ok(pools)
}
