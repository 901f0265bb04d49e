//! The calls of Docker's IPAM plugin.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_ipam::Ask;
use weft_model::{Network, NetworkId};

use super::{
    driver::Driver,
    pools,
    protocol::{AddressGiven, PoolGiven, ReleaseAddress, ReleasePool, RequestAddress, RequestPool},
    registry::Pool,
};
use crate::{
    clock,
    refusal::{Refusal, RefusalKind},
};

impl Driver {
    /// Gives out a range of addresses for a network to come.
    pub(super) async fn request_pool(&self, asked: RequestPool) -> Result<PoolGiven, Refusal> {
        let snapshot = self.snapshot();
        let (random, now) = (rand::random(), clock::unix_seconds());
        let granted = self
            .change(|known| pools::grant(known, &snapshot.cluster, &asked, random, now))
            .await?;
        let (pool_id, subnet) = granted?;
        Ok(PoolGiven { pool_id, pool: subnet.net(), data: Default::default() })
    }

    /// Takes a range back. Succeeds if it is gone already.
    pub(super) async fn release_pool(&self, asked: ReleasePool) -> Result<(), Refusal> {
        self.change(|known| known.pools.remove(&asked.pool_id)).await.map(drop)
    }

    /// Gives out an address: a network's gateway, one that is kept from containers, or a
    /// container's.
    pub(super) async fn request_address(
        &self,
        asked: RequestAddress,
    ) -> Result<AddressGiven, Refusal> {
        let pool = self.pool(&asked.pool_id).await?;
        let answer =
            |net: IpNet| AddressGiven { address: net.to_string(), data: Default::default() };
        if asked.is_gateway() {
            return self.request_gateway(&asked, &pool).await.map(answer);
        }
        let Some(network) = &pool.network else {
            return self.request_auxiliary(&asked, &pool).map(answer);
        };
        let network = self.bind(network).await?;
        let family = pool.range.subnet.family();
        let ask = asked.address.map_or(Ask::Any(family), Ask::Fixed);
        let reservation = self.ledger.reserve(network.id, ask).await?;
        self.keep_reservation(network.id, reservation.ip, reservation.id);
        within(&network, reservation.ip).map(answer)
    }

    /// Takes an address back. An endpoint that still has it is one of which Docker did not say that
    /// it has ended.
    pub(super) async fn release_address(&self, asked: ReleaseAddress) -> Result<(), Refusal> {
        let holder = self
            .registry
            .read(|known| {
                let docker = known.pools.get(&asked.pool_id)?.network.clone()?;
                let network = known.networks.get(&docker)?.network?;
                let endpoint = known
                    .endpoints_of(&docker)
                    .find(|(_, endpoint)| endpoint.addresses.contains(&asked.address))
                    .map(|(id, _)| id.clone());
                Some((network, endpoint))
            })
            .await;
        let Some((network, endpoint)) = holder else { return Ok(()) };
        if let Some(endpoint) = endpoint {
            tracing::info!(%endpoint, address = %asked.address, "Docker takes back the address of an endpoint that it did not end");
            self.forget_endpoint(&endpoint).await?;
        }
        self.release_reservation(network, asked.address).await
    }

    pub(super) async fn release_reservation(
        &self,
        network: NetworkId,
        ip: IpAddr,
    ) -> Result<(), Refusal> {
        match self.take_reservation(network, ip) {
            Some(reservation) => self.ledger.release(reservation).await,
            None => Ok(()),
        }
    }

    async fn request_gateway(&self, asked: &RequestAddress, pool: &Pool) -> Result<IpNet, Refusal> {
        let range = &pool.range;
        let Some(ip) = asked.address else {
            let snapshot = self.snapshot();
            let named = pool.name.as_ref().and_then(|name| pools::by_name(&snapshot.cluster, name));
            let offered = snapshot.cluster.networks().find(|network| {
                range.picked && network.pools.iter().any(|own| own.subnet == range.subnet)
            });
            let network = named.or(offered);
            let own = network.and_then(|n| n.pools.iter().find(|own| own.subnet == range.subnet));
            let ip = own.map_or_else(|| range.subnet.first_host(), |own| own.gateway);
            return inside(pool, ip);
        };
        let net = inside(pool, ip)?;
        self.change(|known| {
            if let Some(pool) = known.pools.get_mut(&asked.pool_id) {
                pool.range.gateway = Some(ip);
            }
        })
        .await?;
        Ok(net)
    }

    /// While a network is being made, Docker asks for the addresses that containers shall not have.
    /// What they are called comes with the network.
    fn request_auxiliary(&self, asked: &RequestAddress, pool: &Pool) -> Result<IpNet, Refusal> {
        let ip = asked.address.ok_or_else(|| {
            Refusal::new(
                RefusalKind::Unavailable,
                format!("pool {} belongs to no network: create the network again", asked.pool_id),
            )
        })?;
        inside(pool, ip)
    }

    async fn pool(&self, id: &str) -> Result<Pool, Refusal> {
        let pool = self.registry.read(|known| known.pools.get(id).cloned()).await;
        pool.ok_or_else(|| {
            Refusal::missing(format!(
                "weft does not know pool {id}: remove the network with docker network rm, and create it again"
            ))
        })
    }
}

fn inside(pool: &Pool, ip: IpAddr) -> Result<IpNet, Refusal> {
    let subnet = pool.range.subnet;
    match subnet.is_host(ip) {
        true => Ok(IpNet::new(ip, subnet.prefix_len()).expect("the length is of the same family")),
        false => Err(Refusal::field(
            "addresses",
            format!("{ip} is no host address of {subnet}: give one inside it"),
        )),
    }
}

/// An address with the length of its subnet.
fn within(network: &Network, ip: IpAddr) -> Result<IpNet, Refusal> {
    let pool = network.pool_of(ip).ok_or_else(|| {
        Refusal::field("addresses", format!("{ip} lies outside network {}", network.name))
    })?;
    Ok(IpNet::new(ip, pool.subnet.prefix_len()).expect("the length is of the same family"))
}
