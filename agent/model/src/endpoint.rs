use std::{collections::BTreeSet, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{DnsName, EndpointId, Family, Label, Labels, MacAddr, NetworkId, Unit};

/// Names the sandbox (a container's network namespace) on its host: endpoints with the same value
/// on one node share it. Opaque outside that node.
pub type SandboxId = String;

/// One attachment of a sandbox to a network, as its host publishes it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "unchecked::Endpoint")]
pub struct Endpoint {
    pub id: EndpointId,
    pub network: NetworkId,
    pub name: Label,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<DnsName>,
    pub mac: MacAddr,
    /// One a family at most, IPv4 first; at least one.
    pub addresses: Vec<AddressGrant>,
    pub sandbox: SandboxId,
    /// Mobility sequence number (as RFC 7432 §7.7): of two hosts that claim the same endpoint, the
    /// higher wins.
    #[serde(default)]
    pub seq: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Label>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Whether the sandbox's default route leads through it, so that what it answers to the world
    /// comes by the network's gateway.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub default_route: bool,
}

impl Endpoint {
    /// Returns the endpoint if it can be reached at all.
    ///
    /// # Errors
    ///
    /// It has no address, or two of one family.
    pub fn checked(self) -> Result<Self, InvalidEndpoint> {
        let families: BTreeSet<_> = self.ips().map(Family::of).collect();
        let why = match () {
            () if self.addresses.is_empty() => "it has no address",
            () if families.len() < self.addresses.len() => "it has two addresses of one family",
            () => return Ok(self),
        };
        Err(InvalidEndpoint { name: self.name, why })
    }

    pub fn ips(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().map(|grant| grant.ip)
    }
}

/// An address and the loan under which its host may use it. Other nodes accept the address only
/// if the lender's register says the same.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct AddressGrant {
    pub ip: IpAddr,
    pub unit: Unit,
    pub seq: u64,
}

#[derive(Debug, thiserror::Error)]
#[error("endpoint {name} cannot be reached: {why}")]
pub struct InvalidEndpoint {
    name: Label,
    why: &'static str,
}

/// The same fields before their check; what serde reads.
mod unchecked {
    use super::*;

    #[derive(Deserialize)]
    pub(super) struct Endpoint {
        id: EndpointId,
        network: NetworkId,
        name: Label,
        #[serde(default)]
        aliases: Vec<DnsName>,
        mac: MacAddr,
        addresses: Vec<AddressGrant>,
        sandbox: SandboxId,
        #[serde(default)]
        seq: u64,
        #[serde(default)]
        service: Option<Label>,
        #[serde(default)]
        labels: Labels,
        #[serde(default)]
        default_route: bool,
    }

    impl TryFrom<Endpoint> for super::Endpoint {
        type Error = InvalidEndpoint;

        fn try_from(raw: Endpoint) -> Result<Self, InvalidEndpoint> {
            let Endpoint { id, network, name, aliases, mac, addresses, .. } = raw;
            let Endpoint { sandbox, seq, service, labels, default_route, .. } = raw;
            let endpoint = Self {
                id,
                network,
                name,
                aliases,
                mac,
                addresses,
                sandbox,
                seq,
                service,
                labels,
                default_route,
            };
            endpoint.checked()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_that_nobody_could_reach_is_not_read_from_the_wire() {
        let grant = |ip: &str| AddressGrant {
            ip: ip.parse().unwrap(),
            unit: Unit::Address(ip.parse().unwrap()),
            seq: 1,
        };
        let good = Endpoint {
            id: EndpointId::from([1; 16]),
            network: NetworkId::from([2; 16]),
            name: "web".parse().unwrap(),
            aliases: vec!["www".parse().unwrap()],
            mac: "02:00:00:00:00:01".parse().unwrap(),
            addresses: vec![grant("10.1.0.8"), grant("fd00::8")],
            sandbox: "7".into(),
            seq: 3,
            service: Some("web".parse().unwrap()),
            labels: Labels::from([("a".into(), "b".into())]),
            default_route: true,
        };
        let read = |endpoint: &Endpoint| {
            serde_json::from_value::<Endpoint>(serde_json::to_value(endpoint).unwrap())
        };
        assert_eq!(read(&good).unwrap(), good);
        for addresses in [vec![], vec![grant("10.1.0.8"), grant("10.1.0.9")]] {
            let bad = Endpoint { addresses, ..good.clone() };
            assert!(read(&bad).is_err(), "{bad:?}");
        }
    }
}
