use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize};
use weft_model::{
    Check, EndpointId, Label, Labels, NetworkId, NodeId, Protocol, Publication, ServicePort,
    Source, Spread,
};

/// `POST /v1/services`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CreateService {
    pub name: Label,
    /// A network's name or id.
    pub network: String,
    #[serde(default)]
    pub vip: Vip,
    /// What of the virtual address is translated; every TCP and UDP port, unchanged, if none is
    /// given.
    #[serde(default)]
    pub ports: Vec<ServicePort>,
    #[serde(default)]
    pub spread: Spread,
    /// Seconds for which a client address keeps its backend.
    #[serde(default)]
    pub affinity: Option<u32>,
    #[serde(default)]
    pub check: Option<Check>,
    #[serde(default)]
    pub published: Vec<Publication>,
    #[serde(default)]
    pub labels: Labels,
}

/// Which virtual addresses a service has.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Vip {
    /// One of each family of the network.
    #[default]
    Auto,
    /// None: the name resolves to the backends.
    None,
    /// These, one a family at most, and one for each family that is not among them.
    Addresses(Vec<IpAddr>),
}

/// `PATCH /v1/services/SERVICE?network=…`: what is absent stays as it is.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateService {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vip: Option<Vip>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<ServicePort>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<Spread>,
    /// `null` takes it away.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Option<u32>>,
    /// `null` takes it away.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub check: Option<Option<Check>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<Vec<Publication>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
}

/// Tells a field that is `null` from one that is absent.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// A service as `service ls` and `service inspect` show it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ServiceStatus {
    pub name: Label,
    pub network: Label,
    pub network_id: NetworkId,
    pub mode: ServiceMode,
    /// Those that are confirmed and answered with.
    pub vips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub spread: Spread,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<Check>,
    pub published: Vec<PublicationStatus>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    pub backends: Vec<BackendStatus>,
    /// Of the definition; grows with every change.
    pub revision: u64,
    /// The node that made the last change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writer: Option<Label>,
}

/// How the name of a service is answered.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceMode {
    /// With its virtual addresses.
    Vip,
    /// With the addresses of its backends.
    Dnsrr,
    /// The same; nobody declared it, endpoints call themselves members of it.
    Implied,
}

/// A published port, and what became of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PublicationStatus {
    #[serde(flatten)]
    pub publication: Publication,
    /// What source address backends see now.
    pub in_force: Source,
    /// Why, for people.
    pub reason: String,
    /// Whether the port is open on the host that answers, or why not.
    pub here: String,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct BackendStatus {
    pub id: EndpointId,
    pub name: Label,
    pub node: Label,
    pub node_id: NodeId,
    pub addresses: Vec<IpAddr>,
    /// `ready`, `starting`, `unhealthy`, `draining` or `unreachable`.
    pub state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its share of new connections: 1 is normal, 0 is none.
    pub weight: u16,
    /// The connections that come by the host that answers at this moment; absent where it does not
    /// carry the service, or was not asked for this one alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
}

/// A port of the host that leads to one endpoint, as it is asked for.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PortRequest {
    /// The one address of the host; every address where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The first port of which any will do; a free one of the ephemeral range where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_port: Option<u16>,
    /// The last one; the first where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_port_last: Option<u16>,
    pub container_port: u16,
    #[serde(default)]
    pub protocol: Protocol,
}

/// A port of the host that leads to one endpoint.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct PublishedPort {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
    #[serde(default)]
    pub protocol: Protocol,
}
