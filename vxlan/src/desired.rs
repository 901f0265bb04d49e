use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use weft_model::{
    EndpointId, InterfaceName, Label, MacAddr, MacvlanMode, NetworkId, NodeId, Vni, VtepAddr,
};

use crate::Prefix;

/// What the data plane of this host shall be: the whole of it, every time.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Desired {
    /// The networks that have endpoints on this host or are wanted here for another reason.
    ///
    /// Shared pointers, so that publishing a change of one network costs nothing for the others.
    pub networks: BTreeMap<NetworkId, Arc<OverlayNetwork>>,
    pub host: HostRules,
}

/// One network as this host carries it, for all hosts or for itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OverlayNetwork {
    pub id: NetworkId,
    /// For people; decides nothing.
    pub name: Label,
    pub transport: Transport,
    /// Bytes: the MTU of bridge, ports, and VXLAN device or TAP.
    pub mtu: u16,
    /// The anycast gateway's MAC, which is the bridge's on every host.
    pub gateway_mac: MacAddr,
    /// The anycast gateway's addresses with the prefix length of their subnet, one a family.
    pub gateways: Vec<Prefix>,
    /// Virtual addresses of services: the gateway answers for them on every host, and whoever
    /// translates them finds their packets there.
    pub vips: BTreeSet<IpAddr>,
    /// No egress: never gets an uplink, even if `uplink` is set.
    pub internal: bool,
    /// Replicate broadcast and multicast to `flood`.
    pub multicast: bool,
    /// Nothing passes from one local port to another, neither by the bridge nor by the gateway.
    pub isolated: bool,
    /// Whether `remotes` and `flood` may lack some that exist: then none is taken out of the
    /// kernel. So an agent that has just started cuts off nobody that it has not heard of yet.
    pub provisional: bool,
    /// Stations on other hosts. A MAC that is also a local port's is ignored: the port wins.
    pub remotes: BTreeMap<MacAddr, Station>,
    /// The other nodes that have endpoints in the network, and their VTEPs. Used only if
    /// `multicast` is set.
    pub flood: BTreeMap<NodeId, VtepAddr>,
    /// What the local ports may send from. A port that was attached but is not listed here keeps
    /// the addresses it was attached with; listing a port does not create it.
    pub ports: BTreeMap<EndpointId, Port>,
    /// The way out of the network; absent on internal networks.
    pub uplink: Option<Uplink>,
    /// How clients from outside that came in by one host reach a station of another and get its
    /// answers; absent if none do.
    pub transit: Option<Transit>,
}

/// The routers by which the hosts of a network hand each other what clients from outside say, and
/// the answers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Transit {
    /// This node.
    pub own: NodeId,
    /// The other nodes that have the network, and their VTEPs.
    pub routers: BTreeMap<NodeId, VtepAddr>,
    /// This host's own addresses, one a family at most. Its processes and those containers that
    /// come in by its ports are seen under them in the network: the addresses of uplinks, which
    /// they would have otherwise, are the same on other hosts.
    pub addresses: BTreeSet<IpAddr>,
}

/// How the frames of a network get to other hosts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    /// In clear, by a VXLAN device of the kernel.
    Vxlan {
        vni: Vni,
        /// This host's VTEP. Its family is the family of every other VTEP of the network.
        local: VtepAddr,
        /// The UDP port of the VXLAN socket, the same on all hosts; usually 4789.
        port: u16,
    },
    /// Sealed, by the tunnel that [`Config`](crate::Config) has, or not at all: a TAP is in the
    /// place of the VXLAN device, and nothing in the host's namespace has to do with it.
    Sealed,
    /// Not at all: the network is this host's alone. It has no remote stations, whatever is said.
    Local,
    /// Not by weft: each port is a part of an interface of the host, which is on a link with
    /// machines that weft knows nothing of. There is no bridge port, no rule, no gateway and no
    /// uplink; the network's namespace only says which sandboxes are on it.
    Macvlan {
        /// In the host's namespace. Without one the ports have a segment of their own, in the
        /// network's.
        parent: Option<InterfaceName>,
        mode: MacvlanMode,
        /// Bytes; the parent's when absent.
        mtu: Option<u16>,
    },
}

impl Transport {
    /// The VNI, if there is one on the wire.
    pub fn vni(self) -> Option<Vni> {
        match self {
            Self::Vxlan { vni, .. } => Some(vni),
            Self::Sealed | Self::Local | Self::Macvlan { .. } => None,
        }
    }
}

/// A station on another host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Station {
    /// Whose it is: only under this node's keys may its frames come, and go.
    pub node: NodeId,
    /// Where that node is.
    pub vtep: VtepAddr,
    pub ips: BTreeSet<IpAddr>,
}

/// The identity of a local port: what its sandbox may use as source.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Port {
    pub mac: MacAddr,
    pub ips: BTreeSet<IpAddr>,
}

/// The addresses of the veth between a network's namespace and the host's.
///
/// The caller takes them from [`HostRules::uplink_pools`]; no two networks of a host may share a
/// pair.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Uplink {
    /// A /31 (RFC 3021).
    pub v4: Option<AddressPair<Ipv4Addr>>,
    /// A /127 (RFC 6164).
    pub v6: Option<AddressPair<Ipv6Addr>>,
}

/// The two ends of an uplink.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AddressPair<A> {
    /// The end in the host's namespace: the network's default gateway.
    pub host: A,
    /// The end in the network's namespace: what its egress is translated to.
    pub network: A,
}

/// What protects the host's namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostRules {
    /// The UDP port of all VXLAN sockets of this cluster.
    pub vxlan_port: u16,
    /// This host's own VTEPs.
    pub local: BTreeSet<VtepAddr>,
    /// The VTEPs of present peers: nobody else's VXLAN packets are accepted.
    pub vteps: BTreeSet<VtepAddr>,
    /// The UDP ports at which this host's tunnel receives sealed packets; none if it has no tunnel.
    pub sealed_ports: BTreeSet<u16>,
    /// The prefixes that all uplink pairs come from.
    pub uplink_pools: Vec<IpNet>,
}

impl Default for HostRules {
    fn default() -> Self {
        Self {
            vxlan_port: 4789,
            local: BTreeSet::new(),
            vteps: BTreeSet::new(),
            sealed_ports: BTreeSet::new(),
            uplink_pools: Vec::new(),
        }
    }
}
