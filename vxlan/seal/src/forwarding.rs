use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use weft_model::{MacAddr, NetworkId, NodeId};

/// Where the frames of one network go: an immutable snapshot, of the same records that plain
/// networks program into the kernel's tables.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Forwarding {
    pub network: NetworkId,
    /// Bytes of an IP packet in the network, as its bridge and its ports have it.
    pub mtu: u16,
    /// The anycast gateway's, the same on all hosts.
    pub gateway_mac: MacAddr,
    /// The gateway's addresses: sources of what the tunnel itself says to a container (ICMP).
    pub gateways: Vec<IpAddr>,
    /// The stations that other nodes have.
    pub stations: BTreeMap<MacAddr, Station>,
    /// The answers to ARP and neighbour solicitations for them.
    pub neighbours: BTreeMap<IpAddr, MacAddr>,
    /// Who gets a copy of broadcast and multicast. Empty where the network has none.
    pub flood: BTreeSet<NodeId>,
}

impl Forwarding {
    /// Whether `ip` is that of a station of another node than `node`, as far as it is known.
    pub(crate) fn is_elsewhere(&self, ip: IpAddr, node: NodeId) -> bool {
        let holder = self.neighbours.get(&ip);
        holder.and_then(|mac| self.stations.get(mac)).is_some_and(|station| station.node != node)
    }
}

/// One endpoint of another node, or its router.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Station {
    pub node: NodeId,
    /// What it may send from.
    pub ips: Vec<IpAddr>,
    /// Whether it forwards for others: for its node's stations and for the world, as the gateway
    /// does, and gets what is for these.
    pub router: bool,
}
