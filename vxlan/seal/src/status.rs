use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use weft_model::{Label, NetworkId, NodeId, Suite};

use crate::OffloadStatus;

/// What a tunnel is doing, for people.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct TunnelStatus {
    /// Where the sockets are, lane 0 first.
    pub sockets: Vec<SocketAddr>,
    pub peers: BTreeMap<NodeId, PeerStatus>,
    pub offloads: Vec<OffloadStatus>,
    pub networks: BTreeMap<NetworkId, CarriedStatus>,
    /// What an operator should mend: socket buffers that the kernel keeps small, a worker that
    /// was started again.
    pub warnings: Vec<String>,
}

/// How one peer is reached.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerStatus {
    pub name: Label,
    /// Its VTEP's.
    pub address: IpAddr,
    pub path: PathStatus,
    /// Whether the peer has proved that it holds the keys that are sent with.
    pub confirmed: bool,
    pub suite: Option<Suite>,
    /// Smoothed.
    pub rtt: Option<Duration>,
    /// Bytes of the largest IP packet that the underlay carries to the peer.
    pub path_mtu: Option<u16>,
    /// The generation of lane 0's sending key.
    pub epoch: u16,
    /// Steps to a next key, of all lanes, both directions, since the agent started.
    pub rekeys: u64,
    /// Why nothing can be sent to the peer: a sentence.
    pub fault: Option<String>,
}

/// The way that packets to a peer take.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PathStatus {
    /// Straight to the address that its record has.
    Direct(SocketAddr),
    /// Straight to the address that its packets come from: it is behind a NAT.
    Observed(SocketAddr),
    /// By another node, which sees sealed bytes only.
    Relay { via: NodeId },
    /// None was found to work.
    Down,
}

impl PathStatus {
    /// The word in status and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Direct(_) => "direct",
            Self::Observed(_) => "observed",
            Self::Relay { .. } => "relay",
            Self::Down => "down",
        }
    }
}

/// One encrypted network on this node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CarriedStatus {
    /// Its TAP's name.
    pub tap: String,
    pub queues: usize,
    /// Why it carries nothing: a sentence.
    pub fault: Option<String>,
}
