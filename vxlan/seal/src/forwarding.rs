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

/// One endpoint of another node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Station {
    pub node: NodeId,
    /// What it may send from.
    pub ips: Vec<IpAddr>,
}

impl Forwarding {
    /// The four bytes that name the network inside a sealed packet.
    pub fn short_id(&self) -> u32 {
        short_id(self.network)
    }
}

/// The first four bytes of `network`, which name it inside a sealed packet.
///
/// Two networks of one cluster may collide: then neither is carried.
pub fn short_id(network: NetworkId) -> u32 {
    let [a, b, c, d, ..] = *network.as_bytes();
    u32::from_le_bytes([a, b, c, d])
}
