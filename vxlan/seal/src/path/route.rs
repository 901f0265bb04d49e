use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use weft_model::NodeId;

use super::message::RELAY_OVERHEAD;

/// One of this node's sockets and where to send from it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Way {
    /// Index of the local socket: the lane it was opened for.
    pub socket: u8,
    pub remote: SocketAddr,
}

/// How one packet gets to a peer.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Via {
    /// Straight from a socket to an address.
    Way(Way),
    /// Sealed for the peer, then handed to this node in a [`Relayed`]. The route to that node is
    /// always a direct one.
    Relay(NodeId),
}

/// How frames get to a peer at present.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// Lane N takes entry N modulo the length. Empty if and only if a relay is used.
    pub ways: Vec<Way>,
    /// The node that passes packets on.
    pub relay: Option<NodeId>,
    pub kind: Kind,
    /// Whether it answers. A route that does not is used only because there is no better one.
    pub up: bool,
    /// Bytes of the largest sealed packet (the payload of the UDP datagram, or of the
    /// [`Relayed`]) that gets through.
    pub packet: u16,
    /// Round-trip time, smoothed (RFC 6298); none before the first reply.
    pub rtt: Option<Duration>,
}

/// Where a route's addresses come from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// All from the peer's record.
    Direct,
    /// At least one is where the peer's packets come from: it is behind a NAT.
    Observed,
    Relay,
}

impl Route {
    /// The way that a lane's packets take; none if they are relayed.
    #[inline]
    pub fn way(&self, lane: u8) -> Option<Way> {
        match self.ways.len() {
            0 => None,
            count => Some(self.ways[usize::from(lane) % count]),
        }
    }

    /// How any packet gets to the peer.
    pub fn via(&self) -> Option<Via> {
        let way = self.ways.first().copied().map(Via::Way);
        self.relay.map(Via::Relay).or(way)
    }

    /// Bytes of the largest IP packet that the underlay carries to the peer. Of a relayed route:
    /// as if the relay were not there.
    pub fn path_mtu(&self, underlay: IpAddr) -> u16 {
        let relayed = if self.relay.is_some() { RELAY_OVERHEAD } else { 0 };
        self.packet.saturating_add(relayed).saturating_add(datagram_overhead(underlay))
    }
}

/// For people: where packets go, and whether they are known to arrive.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.relay, self.ways.first()) {
            (Some(relay), _) => write!(f, "by node {relay}")?,
            (None, Some(way)) => write!(f, "straight to {}", way.remote)?,
            (None, None) => f.write_str("none")?,
        }
        match self.up {
            true => Ok(()),
            false => f.write_str(", which does not answer"),
        }
    }
}

/// Bytes of the IP and UDP headers around a sealed packet.
pub(super) fn datagram_overhead(underlay: IpAddr) -> u16 {
    match underlay {
        IpAddr::V4(_) => 20 + 8,
        IpAddr::V6(_) => 40 + 8,
    }
}
