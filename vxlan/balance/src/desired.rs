use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use weft_model::{EndpointId, Family, Label, MacAddr, NetworkId, NodeId, Protocol, Source, Spread};

/// What services this host shall know: the whole of it, every time.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Desired {
    /// The networks that have a namespace on this host and a service.
    ///
    /// Shared pointers, so that a change of one network costs nothing for the others.
    pub networks: BTreeMap<NetworkId, Arc<NetworkBalance>>,
    pub host: Arc<HostPublish>,
}

/// The services of one network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NetworkBalance {
    /// The anycast gateway's MAC, which is the bridge's on every host.
    pub gateway_mac: MacAddr,
    /// The anycast gateway's addresses, one a family at most.
    pub gateways: BTreeSet<IpAddr>,
    /// By where connections come to.
    pub frontends: BTreeMap<Frontend, Arc<Pool>>,
}

/// Where connections come to: a virtual address of a service, or the network's end of the uplink.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Frontend {
    pub ip: IpAddr,
    pub protocol: Protocol,
    /// Every port that has no frontend of its own when absent; the backends get it unchanged.
    pub port: Option<u16>,
}

/// Whom a frontend's connections go to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pool {
    pub service: Label,
    /// Those that may get new connections, all of the frontend's family. The choice does not
    /// depend on their order.
    pub backends: BTreeMap<EndpointId, Backend>,
    pub spread: Spread,
    /// How long a client's address keeps its backend after its last new connection.
    pub affinity: Option<Duration>,
    /// What source address backends see; [`Source::Preserve`] for virtual addresses.
    pub source: Source,
}

/// One member of a pool.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Backend {
    pub ip: IpAddr,
    /// The port that it listens at; the frontend's when absent.
    pub port: Option<u16>,
    /// Its share: 1 is normal, 0 is none.
    pub weight: u16,
    /// The host that it is on.
    pub node: NodeId,
    /// Whether that is this host.
    pub local: bool,
}

/// The published ports of the host.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct HostPublish {
    /// Where each leads to: the network's end of an uplink, and a frontend's port there.
    pub ports: BTreeMap<HostPort, SocketAddr>,
    /// TCP ports by which a proxy leads there, that tells the backend who its client is (PROXY
    /// protocol, version 2). None of them is among `ports`.
    pub proxies: BTreeMap<HostPort, SocketAddr>,
}

/// A port of the host.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct HostPort {
    /// Every address of the host of that family when absent.
    pub ip: Option<IpAddr>,
    pub family: Family,
    pub protocol: Protocol,
    pub port: u16,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ip, protocol, port } = self;
        match port {
            Some(port) => write!(f, "{}/{protocol}", SocketAddr::new(*ip, *port)),
            None => write!(f, "{ip}/{protocol}"),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ip, family, protocol, port } = self;
        match (ip, family) {
            (Some(ip), _) => write!(f, "{}/{protocol}", SocketAddr::new(*ip, *port)),
            (None, Family::V4) => write!(f, "0.0.0.0:{port}/{protocol}"),
            (None, Family::V6) => write!(f, "[::]:{port}/{protocol}"),
        }
    }
}
