use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Label, VtepAddr};

/// What a node says about itself.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Node {
    pub name: Label,
    pub vtep: VtepAddr,
    /// Where other agents reach this one.
    pub address: SocketAddr,
    pub version: String,
    pub state: NodeState,
    /// Bytes that one packet may have on this node's underlay interface.
    pub underlay_mtu: u16,
    /// Prefixes that this node's host routes elsewhere: a network may not overlap them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<IpNet>,
    /// The host's DNS resolvers: a network may not contain them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resolvers: Vec<IpAddr>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    Up,
    /// Announced before a graceful stop: peers hide the node at once.
    Leaving,
}
