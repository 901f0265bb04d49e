//! The cluster's network that an engine's configuration speaks of.

use std::collections::BTreeMap;

use ipnet::IpNet;
use weft_model::{InvalidName, Subnet};

use crate::api::{
    client::{Client, ClientError, encode},
    types::{CreateNetwork, NetworkStatus},
};

/// A network by name, and what it has to be like.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct WantedNetwork {
    pub(crate) name: String,
    /// Whether it is made where it is not there.
    pub(crate) create: bool,
    pub(crate) subnets: Vec<Subnet>,
    pub(crate) gateways: Vec<std::net::IpAddr>,
    pub(crate) internal: Option<bool>,
    pub(crate) encrypted: Option<bool>,
    pub(crate) ipv6: bool,
    pub(crate) mtu: Option<u16>,
}

/// Why there is no such network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WantedError {
    #[error("there is no network {name}: weft network create {name}, or set {remedy}")]
    Missing { name: String, remedy: &'static str },
    #[error(
        "network {name} has {has}, not {wanted}: change the configuration, or name another network"
    )]
    Differs { name: String, wanted: String, has: String },
    #[error("network {name:?} cannot be made: name one with the key network")]
    Name { name: String, source: InvalidName },
    #[error(transparent)]
    Agent(#[from] ClientError),
}

impl WantedNetwork {
    /// Whether nothing is said of it but its name.
    pub(crate) fn is_only_named(&self) -> bool {
        let name = self.name.clone();
        *self == Self { name, ..Self::default() }
    }

    /// Finds the network, or makes it if that is wanted. `remedy` is what makes it wanted.
    ///
    /// # Errors
    ///
    /// It is not there, it is another one, or the agent refuses.
    pub(crate) async fn ensure(
        &self,
        agent: &Client,
        remedy: &'static str,
    ) -> Result<NetworkStatus, WantedError> {
        if let Some(found) = self.find(agent).await? {
            return Ok(found);
        }
        let name = || self.name.clone();
        if !self.create {
            return Err(WantedError::Missing { name: name(), remedy });
        }
        match agent.post("/v1/networks", &self.definition()?).await {
            Ok(created) => Ok(created),
            // Another call was quicker.
            Err(error) if error.is_conflict() => {
                self.find(agent).await?.ok_or_else(|| error.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Finds the network.
    ///
    /// # Errors
    ///
    /// It is another one than is wanted, or the agent does not answer.
    pub(crate) async fn find(&self, agent: &Client) -> Result<Option<NetworkStatus>, WantedError> {
        match agent.get::<NetworkStatus>(&format!("/v1/networks/{}", encode(&self.name))).await {
            Ok(found) => {
                self.check(&found)?;
                Ok(Some(found))
            }
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn check(&self, found: &NetworkStatus) -> Result<(), WantedError> {
        let network = &found.network;
        let differs = |wanted: String, has: String| {
            Err(WantedError::Differs { name: self.name.clone(), wanted, has })
        };
        let has: Vec<String> =
            network.pools.iter().map(|pool| format!("subnet {}", pool.subnet)).collect();
        for subnet in &self.subnets {
            if !network.pools.iter().any(|pool| pool.subnet == *subnet) {
                return differs(format!("subnet {subnet}"), has.join(", "));
            }
        }
        for gateway in &self.gateways {
            if !network.pools.iter().any(|pool| pool.gateway == *gateway) {
                let has = network.pools.iter().map(|pool| format!("gateway {}", pool.gateway));
                return differs(format!("gateway {gateway}"), has.collect::<Vec<_>>().join(", "));
            }
        }
        let pairs = [
            ("internal", self.internal, network.internal),
            ("encrypted", self.encrypted, network.encrypted),
        ];
        for (what, wanted, has) in pairs {
            if let Some(wanted) = wanted.filter(|wanted| *wanted != has) {
                return differs(format!("{what} {wanted}"), format!("{what} {has}"));
            }
        }
        Ok(())
    }

    fn definition(&self) -> Result<CreateNetwork, WantedError> {
        let name = self
            .name
            .parse()
            .map_err(|source| WantedError::Name { name: self.name.clone(), source })?;
        let mtu = self.mtu.map(|mtu| ("mtu".to_owned(), mtu.to_string()));
        Ok(CreateNetwork {
            name,
            driver: weft_model::Driver::Overlay,
            subnets: self.subnets.clone(),
            gateways: self.gateways.clone(),
            ip_ranges: Vec::<IpNet>::new(),
            aux_addresses: BTreeMap::new(),
            internal: self.internal.unwrap_or_default(),
            encrypted: self.encrypted.unwrap_or_default(),
            ipv6: self.ipv6,
            labels: BTreeMap::new(),
            options: mtu.into_iter().collect(),
        })
    }
}
