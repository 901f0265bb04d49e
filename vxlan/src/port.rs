use std::{fmt, net::IpAddr, path::PathBuf};

use weft_model::{EndpointId, MacAddr, NetworkId};

/// An address and the prefix length of the subnet it lies in. Unlike `IpNet` the host bits matter.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Prefix {
    pub ip: IpAddr,
    /// Bits: up to 32 for IPv4, up to 128 for IPv6.
    pub len: u8,
}

impl Prefix {
    /// That of one address alone.
    pub(crate) fn of_host(ip: IpAddr) -> Self {
        Self { ip, len: if ip.is_ipv4() { 32 } else { 128 } }
    }

    pub(crate) fn is_host(self) -> bool {
        self == Self::of_host(self.ip)
    }
}

/// The network namespace that a port leads into.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Sandbox {
    /// That of a process.
    Pid(u32),
    /// A bind mount of one, such as `/run/netns/web` or `/var/run/docker/netns/8940ce25c163`.
    Path(PathBuf),
    /// None yet: the port's inner end waits, down and without addresses, in the host's namespace
    /// until an engine moves it into a sandbox. So Docker's remote drivers work.
    Engine,
    /// The host's own: its processes are on the network then, and nothing is forwarded.
    Host,
}

/// Asks for a sandbox to be connected to a network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AttachSpec {
    pub network: NetworkId,
    pub endpoint: EndpointId,
    pub sandbox: Sandbox,
    /// The interface's name in the sandbox, at most 15 bytes; the first free `ethN` when absent.
    /// With [`Sandbox::Engine`], its name while it waits in the host's namespace. With
    /// [`Sandbox::Host`] it is always [`exposed_name`].
    pub ifname: Option<String>,
    pub mac: MacAddr,
    /// The interface's addresses. With [`Sandbox::Engine`] the engine sets them.
    pub addresses: Vec<Prefix>,
    /// Default routes, one a family at most. Empty for a sandbox that has one already, on its
    /// first network.
    pub gateways: Vec<IpAddr>,
    /// Bytes; the network's when absent.
    pub mtu: Option<u16>,
}

/// A port as it was made, or found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Attached {
    /// The interface's name in the sandbox.
    pub ifname: String,
    /// The bridge port's name in the network's namespace.
    pub host_ifname: String,
}

/// The name of the host's own interface on `network`.
pub fn exposed_name(network: NetworkId) -> String {
    format!("{EXPOSED_PREFIX}{}", network.short())
}

/// What the names of the host's own interfaces on its networks begin with.
pub(crate) const EXPOSED_PREFIX: &str = "wfx";

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.len)
    }
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "process {pid}"),
            Self::Path(path) => path.display().fmt(f),
            Self::Engine => f.write_str("the engine's"),
            Self::Host => f.write_str("the host's own"),
        }
    }
}
