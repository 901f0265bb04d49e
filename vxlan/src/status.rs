use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use weft_model::{EndpointId, NetworkId};

use crate::OverlayNetwork;

/// What the data plane holds and how it gets on, as last seen by its reconcilers.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Status {
    /// Every network that has a namespace here, desired or left over.
    pub networks: BTreeMap<NetworkId, NetworkStatus>,
    /// The tables of the host's namespace.
    pub host: BTreeMap<Table, TableStatus>,
    /// Host settings that had to be changed, such as `net.ipv4.ip_forward=1`, since this start.
    pub sysctls_changed: BTreeSet<String>,
}

/// One network's tables and ports.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NetworkStatus {
    /// The namespace's name under the runtime directory.
    pub namespace: String,
    /// False for a leftover: its namespace goes with its last port.
    pub desired: bool,
    /// What carries it between hosts; absent for a leftover that nothing is known of.
    pub carriage: Option<Carriage>,
    /// The last desired state that the kernel held whole: what it can reach.
    pub reached: Option<Arc<OverlayNetwork>>,
    pub tables: BTreeMap<Table, TableStatus>,
    pub ports: BTreeSet<EndpointId>,
}

/// What carries a network between hosts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Carriage {
    Vxlan,
    /// The tunnel, through a TAP.
    Sealed {
        /// Whether the tunnel has the TAP's queues: if not, nothing leaves the host.
        served: bool,
    },
    /// Nothing: it is this host's alone.
    Local,
    /// An interface of the host, and whatever is behind it.
    Macvlan,
}

impl Carriage {
    /// The word in status and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Sealed { .. } => "sealed",
            Self::Local => "local",
            Self::Macvlan => "macvlan",
        }
    }
}

/// A kernel table with a reconciler of its own.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Table {
    /// Bridge, and VXLAN device or TAP.
    Links,
    /// The host ends of the ports.
    Ports,
    /// The MTU of the ports, at both ends.
    Mtu,
    /// MAC → bridge port, and VTEP.
    Fdb,
    /// IP → MAC, on networks that the kernel carries.
    Neighbours,
    /// The veth to the host's namespace, its addresses and routes.
    Uplink,
    /// The ways between this host's router and others', for clients from outside.
    Transit,
    /// nftables.
    Rules,
    /// Kernel settings.
    Sysctls,
    /// The exceptions in Docker's firewall, where there is one.
    Docker,
}

/// Counts since the agent's start; the label values of its metrics.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct TableStatus {
    /// Operations applied.
    pub applied: u64,
    /// Of these, the ones that no change of the desired state had asked for: repairs.
    pub drift: u64,
    /// Operations or readings that failed.
    pub failed: u64,
    /// From the last change of the desired state to the pass that had nothing left to do.
    pub lag: Option<Duration>,
    /// Why the last pass was incomplete, if it was.
    pub error: Option<String>,
}

impl Table {
    /// The table's name as metrics and logs show it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Links => "links",
            Self::Ports => "ports",
            Self::Mtu => "mtu",
            Self::Fdb => "fdb",
            Self::Neighbours => "neighbours",
            Self::Uplink => "uplink",
            Self::Transit => "transit",
            Self::Rules => "rules",
            Self::Sysctls => "sysctls",
            Self::Docker => "docker",
        }
    }
}
