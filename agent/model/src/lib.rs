//! The vocabulary of weft: identifiers, addresses, names and the records that nodes replicate.
//!
//! No async, no IO. A value of one of these types is valid by construction: constructors and
//! deserialisation go through the same checks, so neither the wire nor a file can bypass them.

mod endpoint;
mod id;
mod ipam;
mod mac;
mod macvlan;
mod name;
mod network;
mod node;
mod service;
mod subnet;
mod vni;
mod vtep;

pub use endpoint::{AddressGrant, Endpoint, InvalidEndpoint, SandboxId};
pub use id::{ClusterId, EndpointId, InvalidId, NetworkId, NodeId};
pub use ipam::{BlockIndex, Family, Hold, HoldRecord, Loan, LoanRecord, Unit, WantRecord};
pub use mac::{InvalidMac, MacAddr};
pub use macvlan::{InterfaceName, InvalidInterfaceName, Macvlan, MacvlanMode};
pub use name::{DnsName, InvalidName, Label};
pub use network::{
    Driver, InvalidNetwork, InvalidPool, Network, NetworkOptions, NetworkRecord, Pool,
};
pub use node::{Node, NodeState, Sealing, Suite, UnknownSuite};
pub use service::{
    Check, Condition, Probe, Protocol, Publication, PublishMode, Service, ServicePort,
    ServiceRecord, ServiceState, Source, Spread, UnknownProtocol, Verdict, VipLease,
};
pub use subnet::{InvalidSubnet, Subnet};
pub use vni::{InvalidVni, Vni};
pub use vtep::VtepAddr;

/// Labels that a user puts on an object: free-form keys and values, as in Docker.
pub type Labels = std::collections::BTreeMap<String, String>;
