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
    /// How this node takes part in encrypted networks; absent if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealing: Option<Sealing>,
    /// Where others find this agent's metrics; absent if nobody but its own host does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
}

/// What a node offers to those who share an encrypted network with it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Sealing {
    /// The UDP port of lane 0, at the node's VTEP address; lane N is at this port plus N.
    pub port: u16,
    /// How many sockets, with as many consecutive ports, the node receives sealed packets at; at
    /// least one.
    pub lanes: u8,
    /// What the node can open, the one it likes best first.
    #[serde(deserialize_with = "known_suites")]
    pub suites: Vec<Suite>,
    /// Whether it passes on sealed packets between nodes that do not reach each other.
    #[serde(default)]
    pub relay: bool,
}

/// An AEAD for sealed packets (RFC 5116).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum Suite {
    Aes128Gcm,
    Aes256Gcm,
    /// RFC 8439; for CPUs without AES instructions.
    Chacha20Poly1305,
}

impl Suite {
    pub const ALL: [Self; 3] = [Self::Aes128Gcm, Self::Aes256Gcm, Self::Chacha20Poly1305];

    /// The name in records, configuration and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "aes128-gcm",
            Self::Aes256Gcm => "aes256-gcm",
            Self::Chacha20Poly1305 => "chacha20-poly1305",
        }
    }

    /// The suite that [`as_str`](Self::as_str) names so.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|suite| suite.as_str() == name)
    }
}

impl From<Suite> for &'static str {
    fn from(suite: Suite) -> Self {
        suite.as_str()
    }
}

impl TryFrom<String> for Suite {
    type Error = UnknownSuite;

    fn try_from(name: String) -> Result<Self, UnknownSuite> {
        Self::named(&name).ok_or(UnknownSuite(name))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no cipher suite of weft: choose aes128-gcm, aes256-gcm or chacha20-poly1305")]
pub struct UnknownSuite(String);

/// A newer node may know suites that this one does not: they are passed over.
fn known_suites<'de, D: serde::Deserializer<'de>>(names: D) -> Result<Vec<Suite>, D::Error> {
    let names = Vec::<String>::deserialize(names)?;
    Ok(names.iter().filter_map(|name| Suite::named(name)).collect())
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    Up,
    /// Announced before a graceful stop: peers hide the node at once.
    Leaving,
}
