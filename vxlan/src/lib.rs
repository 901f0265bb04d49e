//! The data plane of one host: namespaces, links, FDB, neighbours, ports, uplinks and rules.
//!
//! State flows one way. The owner publishes a whole [`Desired`] state on a `watch` channel; one task
//! per network and one for the host read the kernel, plan the difference (pure functions), apply
//! it, and publish a [`Status`]. Everything in the kernel that is ours carries our mark, so that a
//! restarted agent adopts what its predecessor left and writes only what differs.
//!
//! Plain networks are carried by the kernel. Encrypted ones are carried by the tunnel of weft-seal,
//! which gets of each a TAP and a snapshot of what it forwards; all else is the same for both.

mod attach;
mod board;
mod bridge;
mod carrier;
mod cookie;
mod desired;
mod destinations;
mod docker;
mod elsewhere;
mod events;
mod fdb;
mod generation;
mod guard;
mod handover;
mod host;
mod link;
mod links;
mod macvlan;
mod mtu;
mod namespace;
mod neighbours;
mod netlink;
mod network;
mod nft;
mod plane;
mod port;
mod ports;
mod probe;
mod process;
mod redirect;
mod rules;
mod ruleset;
mod status;
mod sysctl;
mod table;
mod task;
mod transit;
mod underlay;
mod uplink;
mod way_out;
mod work;

pub use attach::AttachError;
pub use desired::{
    AddressPair, Desired, HostRules, OverlayNetwork, Port, Station, Transit, Transport, Uplink,
};
pub use macvlan::{ParentError, Parents};
pub use namespace::{Namespace, NamespaceError, namespace_name};
pub use netlink::NetlinkError;
pub use nft::{list as list_rules, load as load_rules};
pub use plane::{Config, DataPlane, DetachError, Gone, StartError};
pub use port::{AttachSpec, Attached, Prefix, Sandbox, exposed_name};
pub use probe::{Missing, probe};
pub use process::Process;
pub use redirect::{DnsRedirect, redirect_dns};
pub use status::{Carriage, NetworkStatus, Status, Table, TableStatus};
pub use table::KernelError;
pub use underlay::{Underlay, UnderlayError, advertise_address};
pub use way_out::lead_out;
