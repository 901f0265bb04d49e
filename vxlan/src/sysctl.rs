use std::{collections::BTreeMap, fmt, fs, io};

use crate::{
    Table,
    namespace::Namespace,
    table::{KernelError, KernelTable},
};

/// Kernel settings of one namespace: path under `/proc/sys` → value.
pub(crate) type Settings = BTreeMap<String, String>;

/// One change; prints as a `sysctl` assignment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Assign {
    pub(crate) path: String,
    pub(crate) value: String,
}

/// What a network's namespace needs: it routes between its bridge and its uplink, and its bridge
/// does not pass frames to the IP firewall.
pub(crate) fn network() -> Settings {
    [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        // Next to nothing is for itself: not worth a look for a socket with each packet.
        ("net/ipv4/ip_early_demux", "0"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/br0/send_redirects", "0"),
        // What a client from outside says may come in by another host, and so by the bridge. What
        // the ports send is checked there.
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/br0/rp_filter", "0"),
        // Connections of services pass the connection table by once they have lasted: it must know
        // how long they have, take what it sees of them for good, and keep those of which it saw a
        // packet and not its acknowledgement, or the same probe again and again, as long as others.
        ("net/netfilter/nf_conntrack_acct", "1"),
        ("net/netfilter/nf_conntrack_tcp_be_liberal", "1"),
        ("net/netfilter/nf_conntrack_tcp_ignore_invalid_rst", "1"),
        ("net/netfilter/nf_conntrack_tcp_timeout_max_retrans", "432000"),
        ("net/netfilter/nf_conntrack_tcp_timeout_unacknowledged", "432000"),
        ("net/bridge/bridge-nf-call-iptables", "0"),
        ("net/bridge/bridge-nf-call-ip6tables", "0"),
        ("net/bridge/bridge-nf-call-arptables", "0"),
    ]
    .map(|(path, value)| (path.to_owned(), value.to_owned()))
    .into()
}

/// Lists the assignments that turn `actual` into `desired`. A setting that the kernel does not
/// have is not assigned: the feature that it steers is not there either.
pub(crate) fn plan(desired: &Settings, actual: &Settings) -> Vec<Assign> {
    desired
        .iter()
        .filter(|(path, value)| actual.get(*path).is_some_and(|found| found != *value))
        .map(|(path, value)| Assign { path: path.clone(), value: value.clone() })
        .collect()
}

/// Lists the assignments that make the host forward what its networks send out.
///
/// A host that forwards IPv6 stops listening to router advertisements unless `accept_ra` is 2, and
/// would lose its own default route; so that comes first.
pub(crate) fn plan_forwarding(v4: bool, v6: bool, actual: &Settings) -> Vec<Assign> {
    const V4: &str = "net/ipv4/ip_forward";
    const V6: &str = "net/ipv6/conf/all/forwarding";
    let is = |path: &str, value: &str| actual.get(path).is_some_and(|found| found == value);
    let mut ops = Vec::new();
    if v4 && is(V4, "0") {
        ops.push(Assign { path: V4.into(), value: "1".into() });
    }
    if v6 && is(V6, "0") {
        let listening =
            actual.iter().filter(|(path, value)| path.ends_with("/accept_ra") && *value == "1");
        ops.extend(listening.map(|(path, _)| Assign { path: path.clone(), value: "2".into() }));
        ops.push(Assign { path: V6.into(), value: "1".into() });
    }
    ops
}

/// The kernel settings of `namespace`; which of them is chosen by the two constructors.
pub(crate) struct KernelSettings<'a> {
    namespace: &'a Namespace,
    paths: Vec<String>,
    interfaces: bool,
}

impl<'a> KernelSettings<'a> {
    pub(crate) fn of_network(namespace: &'a Namespace) -> Self {
        Self { namespace, paths: network().into_keys().collect(), interfaces: false }
    }

    /// The forwarding switches, and each interface's `accept_ra`.
    pub(crate) fn of_host(namespace: &'a Namespace) -> Self {
        let paths = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"].map(String::from);
        Self { namespace, paths: paths.into(), interfaces: true }
    }
}

impl KernelTable for KernelSettings<'_> {
    const TABLE: Table = Table::Sysctls;
    type State = Settings;
    type Op = Assign;

    fn read(&mut self) -> Result<Settings, KernelError> {
        let (mut paths, interfaces) = (self.paths.clone(), self.interfaces);
        self.namespace.run(move || {
            if interfaces {
                paths.extend(accept_ra_paths());
            }
            let read = |path: String| match fs::read_to_string(absolute(&path)) {
                Ok(value) => Some(Ok((path, value.trim().to_owned()))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(source) => Some(Err(KernelError::Sysctl { path, source })),
            };
            paths.into_iter().filter_map(read).collect()
        })
    }

    fn apply(&mut self, ops: &[Assign]) -> Vec<Result<(), KernelError>> {
        if ops.is_empty() {
            return Vec::new();
        }
        let assign = |Assign { path, value }: &Assign| {
            fs::write(absolute(path), value)
                .map_err(|source| KernelError::Sysctl { path: path.clone(), source })
        };
        let results = self.namespace.run(|| Ok(ops.iter().map(assign).collect()));
        results.unwrap_or_else(|error: KernelError| vec![Err(error)])
    }
}

fn accept_ra_paths() -> Vec<String> {
    let Ok(entries) = fs::read_dir(absolute("net/ipv6/conf")) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names
        .filter(|name| name != "all")
        .map(|name| format!("net/ipv6/conf/{name}/accept_ra"))
        .collect()
}

/// `/proc/sys/net` shows the namespace of the thread that opens it.
fn absolute(path: &str) -> String {
    format!("/proc/sys/{path}")
}

impl fmt::Display for Assign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An interface's name may contain dots, so the path keeps its slashes.
        write!(f, "{}={}", self.path, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        pairs.iter().map(|(path, value)| ((*path).into(), (*value).into())).collect()
    }

    #[test]
    fn a_host_that_starts_to_forward_ipv6_keeps_listening_to_routers() {
        let actual = settings(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "0"),
            ("net/ipv6/conf/eth0/accept_ra", "1"),
            ("net/ipv6/conf/eth1/accept_ra", "0"),
        ]);
        let ops: Vec<_> =
            plan_forwarding(true, true, &actual).iter().map(ToString::to_string).collect();
        assert_eq!(ops, ["net/ipv6/conf/eth0/accept_ra=2", "net/ipv6/conf/all/forwarding=1"]);
        assert!(plan_forwarding(true, false, &actual).is_empty());
    }

    #[test]
    fn a_setting_that_the_kernel_lacks_is_left_alone() {
        let desired = settings(&[("net/bridge/x", "0"), ("net/ipv4/ip_forward", "1")]);
        let actual = settings(&[("net/ipv4/ip_forward", "0")]);
        let ops: Vec<_> = plan(&desired, &actual).iter().map(ToString::to_string).collect();
        assert_eq!(ops, ["net/ipv4/ip_forward=1"]);
    }
}
