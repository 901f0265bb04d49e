//! What goes over the API's socket: JSON bodies of requests and answers. The CLI reads the same.

mod drain;
mod services;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weft_model::{
    DnsName, Driver, EndpointId, Family, Label, Labels, MacAddr, Network, NetworkId, NodeId,
    SandboxId, Sealing, Subnet, Suite, VtepAddr,
};

pub use self::drain::{Drain, DrainStatus, WaitedFor};
pub use self::services::{
    BackendStatus, CreateService, PortRequest, PublicationStatus, PublishedPort, ServiceMode,
    ServiceStatus, UpdateService, Vip,
};

/// `POST /v1/networks`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CreateNetwork {
    pub name: Label,
    /// `overlay`, for all hosts; `bridge`, for this one alone; or `macvlan`, for the link of one of its
    /// interfaces.
    #[serde(default)]
    pub driver: Driver,
    /// At most one a family; an IPv4 one is picked when there is none.
    #[serde(default)]
    pub subnets: Vec<Subnet>,
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    #[serde(default)]
    pub ip_ranges: Vec<IpNet>,
    #[serde(default)]
    pub aux_addresses: BTreeMap<String, IpAddr>,
    #[serde(default)]
    pub internal: bool,
    /// Seals what goes between hosts. A host that cannot do so gets no endpoint in it.
    #[serde(default)]
    pub encrypted: bool,
    /// Adds an IPv6 subnet where none is given.
    #[serde(default)]
    pub ipv6: bool,
    #[serde(default)]
    pub labels: Labels,
    /// `mtu` (bytes), `multicast`, `encrypted` (true, false, or empty for true), `icc`; of macvlan
    /// `parent` and `macvlan_mode`.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
}

/// A network as `network ls` and `network inspect` show it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct NetworkStatus {
    #[serde(flatten)]
    pub network: Network,
    pub state: NetworkState,
    /// Bytes, as containers that are attached now get it.
    pub mtu: u16,
    pub endpoints: Vec<EndpointStatus>,
    /// This node's address space, a row a family.
    pub addresses: Vec<SpaceStatus>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkState {
    Ready,
    /// Another network has its name or VNI and goes before it; nothing new can be attached.
    Conflict,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SpaceStatus {
    pub family: Family,
    /// Addresses that this node may give out without asking.
    pub owned: u64,
    pub free: u64,
    pub leased: u64,
    pub resting: u64,
}

/// `POST /v1/endpoints`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// A network's name or id.
    pub network: String,
    pub name: Label,
    pub sandbox: Sandbox,
    #[serde(default)]
    pub aliases: Vec<DnsName>,
    /// Fixed addresses, one a family at most.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    #[serde(default)]
    pub mac: Option<MacAddr>,
    /// The interface's name in the sandbox; the first free `ethN` when absent.
    #[serde(default)]
    pub ifname: Option<String>,
    /// Whether the sandbox's default route may lead through it, unless its network is internal.
    #[serde(default = "yes")]
    pub default_route: bool,
    /// The endpoint of the highest priority has the sandbox's default route.
    #[serde(default)]
    pub gateway_priority: i32,
    #[serde(default)]
    pub service: Option<Label>,
    #[serde(default)]
    pub labels: Labels,
    /// Ports of this host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortRequest>,
}

fn yes() -> bool {
    true
}

/// `POST /v1/exposures`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Expose {
    /// A network's name or id.
    pub network: String,
    /// Fixed addresses, one a family at most.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// A network namespace on this host.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sandbox {
    Pid(u32),
    Path(PathBuf),
    /// One that a container engine names and need not have made yet: the engine moves the interface
    /// in by itself. Not for requests.
    Engine(PathBuf),
    /// The host's own. For exposures only.
    Host,
}

/// An endpoint as `attach`, `ps` and `inspect` show it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct EndpointStatus {
    pub id: EndpointId,
    pub name: Label,
    pub aliases: Vec<DnsName>,
    pub network: Label,
    pub network_id: NetworkId,
    pub node: Label,
    pub node_id: NodeId,
    pub mac: MacAddr,
    /// With the subnet's prefix length.
    pub addresses: Vec<IpNet>,
    /// In the sandbox; known on its own node only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ifname: Option<String>,
    /// Ports of its host that lead to it; known on its own node only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishedPort>,
    /// Whether names are answered with it: its node is alive and its lender agrees.
    pub reachable: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Label>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// What `attach` returns: an endpoint of this host, and what a sandbox needs to resolve names.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Attached {
    #[serde(flatten)]
    pub endpoint: EndpointStatus,
    pub gateways: Vec<IpAddr>,
    /// Where names are answered, as seen from the sandbox.
    pub resolvers: Vec<IpAddr>,
    pub mtu: u16,
    pub domain: DnsName,
    /// Whether the sandbox's default route leads through it.
    pub default_route: bool,
    /// Names the sandbox on this host.
    pub sandbox: SandboxId,
    /// What it was attached by, and where it can be found as long as it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<Sandbox>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct NodeStatus {
    pub id: NodeId,
    pub name: Label,
    pub state: NodeLiveness,
    /// Whether this is the node that answers.
    pub this: bool,
    pub address: SocketAddr,
    pub vtep: VtepAddr,
    pub version: String,
    pub underlay_mtu: u16,
    pub endpoints: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    /// How it takes part in encrypted networks; absent if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealing: Option<Sealing>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeLiveness {
    Alive,
    Suspect,
    Left,
}

/// `GET /v1/status`
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Status {
    pub version: String,
    pub cluster: weft_model::ClusterId,
    pub node: NodeStatus,
    pub nodes: BTreeMap<NodeLiveness, usize>,
    pub networks: usize,
    pub endpoints: usize,
    pub local_endpoints: usize,
    /// When this node's certificate ends, RFC 3339.
    pub certificate_expires: String,
    pub tables: Vec<TableStatus>,
    pub encryption: EncryptionStatus,
    /// What an operator should look at; empty when all is well.
    pub findings: Vec<String>,
}

/// How one kernel table stands against its desired state.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct TableStatus {
    pub table: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Label>,
    pub operations: u64,
    pub drift_repaired: u64,
    pub lag_ms: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How this node takes part in encrypted networks.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct EncryptionStatus {
    pub available: bool,
    /// Why it is not available, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offer: Option<Sealing>,
    /// Where sealed packets come, a socket a lane.
    pub sockets: Vec<SocketAddr>,
    /// What works, but not as well as it could: small socket buffers, for one.
    pub warnings: Vec<String>,
    pub offloads: Vec<OffloadReport>,
    /// Every other node.
    pub peers: Vec<SealedPeer>,
    /// Those with endpoints on this host.
    pub networks: Vec<SealedNetwork>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct OffloadReport {
    pub offload: String,
    pub on: bool,
    /// In words; why it is not on.
    pub state: String,
    /// How often it carried several packets at once.
    pub used: u64,
    /// How often the kernel refused it.
    pub refused: u64,
}

/// How one node is reached by sealed packets.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SealedPeer {
    pub node: Label,
    pub node_id: NodeId,
    /// `direct`, `observed` (it is behind a NAT), `relay` or `down`.
    pub path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// The node that relays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// Whether the node has proved that it has the key.
    pub confirmed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<Suite>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    /// Bytes of the largest packet that the underlay carries there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_mtu: Option<u16>,
    /// The generation of the key that is sealed with.
    pub epoch: u16,
    /// How often keys were replaced, in both directions.
    pub rekeys: u64,
    /// Why nothing goes there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// How one encrypted network gets on.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SealedNetwork {
    pub network: Label,
    pub network_id: NetworkId,
    /// Whether it is carried to other hosts; if not, it has failed closed.
    pub carried: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// Nodes with endpoints in it that are not reached, and why.
    pub unreachable: BTreeMap<Label, String>,
    pub sealed_packets: u64,
    pub opened_packets: u64,
    /// By reason.
    pub drops: BTreeMap<String, u64>,
}

/// `POST /v1/tokens`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    pub ttl_seconds: u64,
    pub uses: u32,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct CreatedToken {
    pub id: String,
    pub token: String,
    pub expires: String,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct TokenStatus {
    pub id: String,
    pub expires: String,
    pub uses_left: u32,
}

/// `GET /v1/resolve?name=…&network=…`
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Resolved {
    pub name: String,
    pub answers: Vec<ResolvedAddress>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ResolvedAddress {
    pub address: IpAddr,
    pub network: Label,
    /// The endpoint, or the service whose virtual address it is.
    pub endpoint: Label,
    /// Where the endpoint is; a virtual address is everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Label>,
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Problem {
    /// What went wrong, with object and value, and what to do.
    pub error: String,
    /// The field of the request that is to blame, where one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}
