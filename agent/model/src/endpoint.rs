use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{DnsName, EndpointId, Label, Labels, MacAddr, NetworkId, Unit};

/// Names the sandbox (a container's network namespace) on its host: endpoints with the same value
/// on one node share it. Opaque outside that node.
pub type SandboxId = String;

/// One attachment of a sandbox to a network, as its host publishes it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
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
}

impl Endpoint {
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
