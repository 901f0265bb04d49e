//! The calls of Docker's network plugin that are about networks.

use std::collections::{BTreeMap, BTreeSet};

use weft_model::Family;

use super::{
    ADDRESS_SPACE,
    driver::Driver,
    protocol::{CreateNetwork, DeleteNetwork, EngineId, IpamData},
    registry::{DockerNetwork, Known},
    wanted::{Range, Wanted},
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
        let network = match &wanted.name {
            Some(name) => Some(self.find_or_create(&wanted, name.clone()).await?.id),
            None => None,
        };
        let since = clock::unix_seconds();
        self.change(|known| {
            for pool in pools.keys() {
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
        self.change(|known| {
            known.networks.remove(id);
            known.pools.retain(|_, pool| pool.network.as_ref() != Some(id));
        })
        .await
    }
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
