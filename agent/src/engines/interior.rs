//! What a sandbox has inside, whoever made it: interfaces, addresses, default routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::Path,
};

use ipnet::IpNet;
use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    sys::socket::SockaddrStorage,
};
use weft_model::{Family, SandboxId};
use weft_vxlan::{Namespace, NamespaceError};

/// A sandbox as it is at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Interior {
    /// What the agent calls the sandbox.
    pub(crate) sandbox: SandboxId,
    pub(crate) interfaces: BTreeMap<String, Inside>,
    /// Where default routes lead out: a family and an interface each.
    pub(crate) default_routes: BTreeSet<(Family, String)>,
}

/// One interface in a sandbox.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Inside {
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) addresses: BTreeSet<IpNet>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum InteriorError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("cannot look into the namespace {path}")]
    Unreadable { path: String, source: io::Error },
}

impl Interior {
    /// Looks into the namespace at `path`.
    ///
    /// # Errors
    ///
    /// There is none, or it cannot be entered.
    pub(crate) fn read(path: &Path) -> Result<Self, InteriorError> {
        let namespace = Namespace::open(path)?;
        let sandbox = namespace.cookie()?.to_string();
        let failed =
            |source| InteriorError::Unreadable { path: path.display().to_string(), source };
        namespace.run(|| {
            let addresses = getifaddrs().map_err(|errno| failed(errno.into()))?;
            let v4 = fs::read_to_string("/proc/thread-self/net/route").map_err(failed)?;
            // Absent where the kernel has no IPv6.
            let v6 = fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap_or_default();
            Ok(Self {
                sandbox,
                interfaces: interfaces(addresses),
                default_routes: default_routes(&v4, &v6),
            })
        })
    }
}

fn interfaces(addresses: impl Iterator<Item = InterfaceAddress>) -> BTreeMap<String, Inside> {
    let mut interfaces: BTreeMap<String, Inside> = BTreeMap::new();
    for entry in addresses {
        let inside = interfaces.entry(entry.interface_name.clone()).or_default();
        let Some(address) = entry.address else { continue };
        if let Some(link) = address.as_link_addr() {
            inside.mac = link.addr();
        } else if let Some(ip) = ip_of(&address) {
            let length = entry.netmask.as_ref().and_then(ip_of).map_or(0, ones);
            inside.addresses.extend(IpNet::new(ip, length));
        }
    }
    interfaces
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

fn ones(mask: IpAddr) -> u8 {
    let ones = match mask {
        IpAddr::V4(mask) => mask.to_bits().count_ones(),
        IpAddr::V6(mask) => mask.to_bits().count_ones(),
    };
    u8::try_from(ones).expect("at most 128")
}

/// Reads the kernel's tables of routes (net/ipv4/fib_trie.c, net/ipv6/route.c).
fn default_routes(v4: &str, v6: &str) -> BTreeSet<(Family, String)> {
    let v4 = v4.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let everything = ["00000000"; 2] == [*fields.get(1)?, *fields.get(7)?];
        everything.then(|| (Family::V4, fields[0].to_owned()))
    });
    let v6 = v6.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let everything = fields.first()?.bytes().all(|b| b == b'0') && *fields.get(1)? == "00";
        // The kernel's own entry for what has no route names the loopback interface.
        let interface = fields.last().filter(|name| **name != "lo")?;
        everything.then(|| (Family::V6, (*interface).to_owned()))
    });
    v4.chain(v6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_route_is_told_from_that_of_a_subnet_and_from_none() {
        let head =
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let subnet = "eth0\t0000200A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let default = "eth0\t00000000\t0100200A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        let zeros = "0".repeat(32);
        let none6 =
            format!("{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200 lo\n");
        let default6 = none6.replace("lo", "eth0");
        assert!(default_routes(&format!("{head}{subnet}"), &none6).is_empty());
        let both =
            default_routes(&format!("{head}{default}{subnet}"), &format!("{none6}{default6}"));
        let eth0 = |family| (family, "eth0".to_owned());
        assert_eq!(both, BTreeSet::from([eth0(Family::V4), eth0(Family::V6)]));
        assert!(default_routes("", "").is_empty());
    }

    #[test]
    fn this_threads_own_namespace_can_be_read() {
        let interior = Interior::read(Path::new("/proc/thread-self/ns/net")).unwrap();
        assert!(interior.interfaces.contains_key("lo"), "{interior:?}");
        assert!(Interior::read(Path::new("/nonexistent")).is_err());
    }
}
