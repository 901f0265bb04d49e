//! Finds out what the kernel and the system lack, by trying it where it does no harm.

use std::{fmt, net::Ipv4Addr, thread};

use netlink_packet_route::link::InfoVxlan;
use nix::sched::{CloneFlags, unshare};

use crate::{
    link,
    namespace::Namespace,
    netlink::Netlink,
    nft,
    table::{Chain, KernelError},
};

/// Something that the data plane cannot do without, and does not find.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Missing {
    /// What is missing, such as `VXLAN devices`.
    pub feature: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
    /// What the system said.
    pub reason: String,
}

/// Tries everything that the data plane needs, in a namespace that vanishes afterwards. Empty if
/// nothing is missing. Blocks for some 50 ms.
pub fn probe() -> Vec<Missing> {
    // A thread of its own, whose namespace ends with it.
    thread::scope(|scope| {
        scope.spawn(attempts).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn attempts() -> Vec<Missing> {
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
        return vec![Missing {
            feature: "network namespaces",
            remedy: "run as root, or grant CAP_SYS_ADMIN and CAP_NET_ADMIN",
            reason: errno.to_string(),
        }];
    }
    let mut missing = Vec::new();
    let mut note = |feature, remedy, result: Result<(), KernelError>| {
        if let Err(error) = result {
            missing.push(Missing { feature, remedy, reason: Chain(&error).to_string() });
        }
    };
    let namespace = match Namespace::current() {
        Ok(namespace) => namespace,
        Err(error) => {
            note("/proc", "mount procfs on /proc", Err(error.into()));
            return missing;
        }
    };
    let create = |message| -> Result<(), KernelError> {
        Ok(Netlink::open(&namespace)?.create_link(message)?)
    };
    let tunnel =
        vec![InfoVxlan::Id(1), InfoVxlan::Local(Ipv4Addr::LOCALHOST), InfoVxlan::Port(4789)];
    note("bridges", "load the kernel module bridge", create(link::bridge("probe0", Vec::new())));
    note(
        "VXLAN devices",
        "load the kernel module vxlan",
        create(link::vxlan("probe1", &namespace, tunnel)),
    );
    let pair = link::veth("probe2", link::named("probe3"));
    note("veth pairs", "load the kernel module veth", create(pair));
    if let Err(error) = nft::version() {
        note("nft", "install nftables", Err(error));
        return missing;
    }
    for (feature, remedy, rules) in RULES {
        note(feature, remedy, nft::load(&namespace, rules));
    }
    missing
}

/// What our rules use beyond the plainest, each tried by itself.
const RULES: [(&str, &str, &str); 5] = [
    (
        "nftables for bridges",
        "use a kernel with CONFIG_NF_TABLES_BRIDGE",
        "table bridge probe {\n chain a {\n type filter hook prerouting priority -300;\n \
         iifname vmap { \"a\" : accept }\n }\n}\n",
    ),
    (
        "nftables' route lookup",
        "use a kernel with CONFIG_NFT_FIB_INET",
        "table inet probe1 {\n chain a {\n type filter hook input priority 0;\n \
         fib saddr . iif oif exists accept\n }\n}\n",
    ),
    (
        "sets of VNIs in nftables",
        "use nftables 1.0.1 or later",
        "table inet probe4 {\n set a {\n typeof @th,96,24\n elements = { 1 }\n }\n}\n",
    ),
    (
        "masquerading",
        "use a kernel with CONFIG_NFT_MASQ and CONFIG_NFT_NAT",
        "table inet probe2 {\n chain a {\n type nat hook postrouting priority 100;\n \
         oifname \"a\" masquerade\n }\n}\n",
    ),
    (
        "connection tracking in nftables",
        "use a kernel with CONFIG_NFT_CT",
        "table inet probe3 {\n chain a {\n type filter hook forward priority 0;\n \
         ct state established accept\n ct status dnat accept\n }\n}\n",
    ),
];

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} not available ({}): {}", self.feature, self.reason, self.remedy)
    }
}
