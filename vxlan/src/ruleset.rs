//! The text of our nftables, by pure functions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
};

use ipnet::IpNet;
use sha2::{Digest, Sha256};
use weft_model::{Vni, VtepAddr};

use crate::{
    HostRules, OverlayNetwork, Port,
    bridge::BRIDGE,
    port::EXPOSED_PREFIX,
    uplink::{HOST_PREFIX, UPLINK},
};

/// All of our tables in one namespace. Loading it is one transaction.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Ruleset {
    /// Family and name of each, with its chains and sets.
    tables: Vec<(&'static str, String)>,
    /// The bridge's port to other hosts, whose frames are checked before they come in by it.
    carrier: Option<&'static str>,
    /// The chain of each of the bridge's other ports, in the bridge's table.
    ports: BTreeMap<String, String>,
}

impl Ruleset {
    /// The rules of the host's namespace.
    ///
    /// VXLAN packets of `vnis` are accepted from present peers only, and only by the interface
    /// through which the route to that peer leads: a container that forges a peer's address comes in
    /// by another one. Other VNIs may be somebody else's on the same port, who has rules of his own.
    /// And none is forwarded to a peer, whatever its VNI, which the peer may have and we not: a
    /// container's packet that the host masquerades would arrive there with the host's own address,
    /// and pass for the host's.
    ///
    /// Sealed packets need none of this: the tunnel opens what its peer's key has sealed, and
    /// nothing else.
    pub(crate) fn of_host(host: &HostRules, vnis: &BTreeSet<Vni>) -> Self {
        let HostRules { vxlan_port: port, local, vteps, sealed_ports, uplink_pools } = host;
        let mut body = String::new();
        if !local.is_empty() {
            let (vteps4, vteps6) = by_family(vteps);
            let (local4, local6) = by_family(local);
            body += &set("vteps4", "ipv4_addr", &vteps4);
            body += &set("vteps6", "ipv6_addr", &vteps6);
            body += &set("local4", "ipv4_addr", &local4);
            body += &set("local6", "ipv6_addr", &local6);
            let vnis: Vec<_> = vnis.iter().map(ToString::to_string).collect();
            body += &typeof_set("vnis", VNI, &vnis);
            body += &chain(
                "vxlan",
                None,
                &[
                    "ip daddr @local4 ip saddr @vteps4 fib saddr . iif oif exists accept".into(),
                    "ip6 daddr @local6 ip6 saddr @vteps6 fib saddr . iif oif exists accept".into(),
                    // A packet that is too short to have a VNI does not match, and is dropped.
                    format!("{VNI} != @vnis accept"),
                    "counter drop".into(),
                ],
            );
            let mut input = vec![format!("udp dport {port} goto vxlan")];
            let (mut prerouting, mut output) = (Vec::new(), Vec::new());
            if !sealed_ports.is_empty() {
                let ports: Vec<_> = sealed_ports.iter().map(ToString::to_string).collect();
                body += &set("sealed", "inet_service", &ports);
                // Every packet proves whose it is, so the sender's address proves nothing: peers
                // may be behind a NAT, or move. Only the networks' own workloads have no business
                // here.
                for prefix in [HOST_PREFIX, EXPOSED_PREFIX] {
                    input.push(format!("iifname \"{prefix}*\" udp dport @sealed counter drop"));
                }
                for ip in ["ip", "ip6"] {
                    let n = if ip == "ip" { 4 } else { 6 };
                    prerouting.push(format!("udp dport @sealed {ip} daddr @local{n} notrack"));
                    output.push(format!("udp sport @sealed {ip} saddr @local{n} notrack"));
                }
            }
            let hook = "type filter hook input priority mangle; policy accept;";
            body += &chain("input", Some(hook), &input);
            // Every inner flow has an outer source port of its own: tracked, they would fill the
            // host's connection table, and each packet would pay for it.
            for (hooked, from, to, sealed) in
                [("prerouting", "vteps", "local", prerouting), ("output", "local", "vteps", output)]
            {
                let hook = format!("type filter hook {hooked} priority raw; policy accept;");
                let rule = |ip: &str, n: u8| {
                    format!("udp dport {port} {ip} saddr @{from}{n} {ip} daddr @{to}{n} notrack")
                };
                let name = format!("untracked-{hooked}");
                let plain = [rule("ip", 4), rule("ip6", 6)];
                body += &chain(&name, Some(&hook), &[&plain, sealed.as_slice()].concat());
            }
        }
        let mut forward = Vec::new();
        if !local.is_empty() {
            forward.push(format!("udp dport {port} ip daddr @vteps4 counter drop"));
            forward.push(format!("udp dport {port} ip6 daddr @vteps6 counter drop"));
        }
        // One network's namespace is no way into another's, except by a port of the host.
        forward.push(format!("oifname \"{HOST_PREFIX}*\" ct status dnat accept"));
        forward.push(format!("iifname \"{HOST_PREFIX}*\" oifname \"{HOST_PREFIX}*\" drop"));
        forward.push(format!("oifname \"{HOST_PREFIX}*\" ct state established,related accept"));
        forward.push(format!("oifname \"{HOST_PREFIX}*\" drop"));
        // The host is on a network for itself, not for whom it routes for; what its operator
        // translates is meant to pass.
        for side in ["iifname", "oifname"] {
            forward.push(format!("{side} \"{EXPOSED_PREFIX}*\" ct status dnat accept"));
            forward.push(format!("{side} \"{EXPOSED_PREFIX}*\" drop"));
        }
        let hook = "type filter hook forward priority mangle; policy accept;";
        body += &chain("forward", Some(hook), &forward);

        // An uplink lets loopback addresses pass, for the host's own clients of published ports.
        let loopback = [
            format!("iifname \"{HOST_PREFIX}*\" ip saddr 127.0.0.0/8 counter drop"),
            format!("iifname \"{HOST_PREFIX}*\" ip daddr 127.0.0.0/8 counter drop"),
        ];
        let hook = "type filter hook prerouting priority raw; policy accept;";
        body += &chain("loopback", Some(hook), &loopback);

        let masquerade: Vec<_> = uplink_pools
            .iter()
            .map(|pool| {
                format!("{} saddr {pool} oifname != \"{HOST_PREFIX}*\" masquerade", ip(pool))
            })
            .collect();
        let hook = "type nat hook postrouting priority srcnat; policy accept;";
        body += &chain("postrouting", Some(hook), &masquerade);
        Self { tables: vec![("inet weft", body)], carrier: None, ports: BTreeMap::new() }
    }

    /// The rules of a network's namespace: what may pass the uplink, and what each port may send
    /// from. `ports` names the bridge's ports.
    pub(crate) fn of_network(
        network: &OverlayNetwork,
        pools: &[IpNet],
        ports: &BTreeMap<String, Port>,
    ) -> Self {
        let mut input = Vec::new();
        let between = if network.isolated { "counter drop" } else { "accept" };
        let mut forward = vec![
            format!("iifname \"{BRIDGE}\" oifname \"{BRIDGE}\" {between}"),
            // What came in by a port of the host may be its own: then the answer is for an uplink.
            format!(
                "iifname \"{BRIDGE}\" oifname \"{UPLINK}\" ct direction reply ct status dnat accept"
            ),
        ];
        for pool in pools {
            // Neither the other ends of uplinks nor the host by its end are for containers.
            input.push(format!("iifname \"{BRIDGE}\" {} daddr {pool} drop", ip(pool)));
            forward.push(format!("iifname \"{BRIDGE}\" {} daddr {pool} drop", ip(pool)));
        }
        for (chain, out) in
            [(&mut input, String::new()), (&mut forward, format!(" oifname \"{BRIDGE}\""))]
        {
            chain.push(format!("iifname \"{UPLINK}\"{out} ct state established,related accept"));
            chain.push(format!("iifname \"{UPLINK}\"{out} ct status dnat accept"));
        }
        input.push(format!(
            "iifname \"{UPLINK}\" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept"
        ));
        for chain in [&mut input, &mut forward] {
            chain.push(format!("iifname \"{UPLINK}\" drop"));
        }
        let clamp =
            |side| format!("{side} \"{UPLINK}\" tcp flags syn tcp option maxseg size set rt mtu");
        let mangle = [clamp("oifname"), clamp("iifname")];

        let mut body = String::new();
        let hook = |kind, hook, priority| {
            format!("type {kind} hook {hook} priority {priority}; policy accept;")
        };
        body += &chain("input", Some(&hook("filter", "input", "filter")), &input);
        // What goes out where it came in is translated, or is for a router: nobody but the gateway
        // can send it there. IPv4 has a setting for that.
        let redirects = [format!("oifname \"{BRIDGE}\" icmpv6 type nd-redirect drop")];
        body += &chain("output", Some(&hook("filter", "output", "filter")), &redirects);
        body += &chain("mangle", Some(&hook("filter", "forward", "mangle")), &mangle);
        body += &chain("forward", Some(&hook("filter", "forward", "filter")), &forward);
        if network.uplink.is_some() && !network.internal {
            let masquerade = [format!("oifname \"{UPLINK}\" masquerade")];
            body += &chain("postrouting", Some(&hook("nat", "postrouting", "srcnat")), &masquerade);
        }
        let tables = vec![("inet weft", body), (BRIDGE_TABLE, bridge_rules(network.isolated))];
        Self {
            tables,
            carrier: network.transport.device(),
            ports: ports.iter().map(|(name, port)| port_chain(name, port)).collect(),
        }
    }

    /// Whatever tables, without ports.
    pub(crate) fn of_tables(tables: Vec<(&'static str, String)>) -> Self {
        Self { tables, carrier: None, ports: BTreeMap::new() }
    }

    /// What `nft -f` loads: our tables anew, in place of what they held.
    pub(crate) fn script(&self) -> String {
        let digest = self.digest_rule();
        self.tables.iter().fold(String::new(), |mut script, (table, body)| {
            // Declared first, because only a table that is there can be deleted.
            let _ = writeln!(script, "table {table}\ndelete table {table}\ntable {table} {{");
            script += &chain("digest", None, std::slice::from_ref(&digest));
            if *table == BRIDGE_TABLE {
                let carrier = self.carrier.map(|name| format!("\"{name}\" : accept"));
                let ports = self.ports.keys().map(|name| verdict(name));
                let elements: Vec<_> = carrier.into_iter().chain(ports).collect();
                script += &map("ports", "ifname : verdict", &elements);
                script.extend(self.ports.values().map(String::as_str));
            }
            script += body;
            script + "}\n"
        })
    }

    /// What `nft -f` loads to get here from `older`, if that takes nothing but further ports.
    ///
    /// Whoever deletes anything waits for the kernel to be rid of it, ten times as long as the rest
    /// takes. So the digest is added, too: the last one counts.
    pub(crate) fn addition(&self, older: &Self) -> Option<String> {
        let kept = older.ports.iter().all(|(name, chain)| self.ports.get(name) == Some(chain));
        let same = older.tables == self.tables && older.carrier == self.carrier;
        if !same || !kept || older.ports.len() == self.ports.len() {
            return None;
        }
        let mut script = format!("table {BRIDGE_TABLE} {{\n");
        let new = || self.ports.iter().filter(|(name, _)| !older.ports.contains_key(*name));
        script.extend(new().map(|(_, chain)| chain.as_str()));
        script += "}\n";
        let verdicts: Vec<_> = new().map(|(name, _)| verdict(name)).collect();
        let _ = writeln!(script, "add element {BRIDGE_TABLE} ports {{ {} }}", verdicts.join(", "));
        for (table, _) in &self.tables {
            let _ = writeln!(script, "add rule {table} digest {}", self.digest_rule());
        }
        Some(script)
    }

    fn digest_rule(&self) -> String {
        format!("return comment \"{}\"", self.digest())
    }

    /// Whether `listing`, which nft printed, says that this was loaded.
    pub(crate) fn is_in(&self, listing: &str) -> bool {
        let (digest, found) = (self.digest(), digests(listing));
        found.len() == self.tables.len() && found.iter().all(|found| *found == digest)
    }

    /// Tells rulesets apart.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (table, body) in &self.tables {
            hash.update(table);
            hash.update(body);
        }
        hash.update(self.carrier.unwrap_or_default());
        for (port, chain) in &self.ports {
            hash.update(port);
            hash.update(chain);
        }
        let [a, b, c, d, e, f, g, h, ..]: [u8; 32] = hash.finalize().into();
        format!("weft {:016x}", u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }
}

/// Drops what a port sends from an address that is not its own, as Ethernet, ARP, IP or neighbour
/// discovery source, and what only a router may say. If the ports are `isolated`, nothing passes
/// between them.
fn bridge_rules(isolated: bool) -> String {
    let hook = "type filter hook prerouting priority -300; policy accept;";
    let checked = ["iifname vmap @ports".to_owned(), "counter drop".to_owned()];
    let mut body = chain("prerouting", Some(hook), &checked);
    if isolated {
        // What is for the gateway is not forwarded.
        let hook = "type filter hook forward priority -300; policy accept;";
        body += &chain("forward", Some(hook), &["counter drop".to_owned()]);
    }
    body
}

fn port_chain(name: &str, port: &Port) -> (String, String) {
    (name.to_owned(), chain(&format!("port-{name}"), None, &port_rules(port)))
}

fn verdict(port: &str) -> String {
    format!("\"{port}\" : goto port-{port}")
}

fn port_rules(Port { mac, ips }: &Port) -> Vec<String> {
    let v4: Vec<_> = ips.iter().filter(|ip| ip.is_ipv4()).map(ToString::to_string).collect();
    let v6: Vec<_> = ips
        .iter()
        .filter_map(|ip| match ip {
            IpAddr::V6(ip) => Some(*ip),
            IpAddr::V4(_) => None,
        })
        .collect();
    let arp = [&["0.0.0.0".to_owned()], v4.as_slice()].concat().join(", ");
    let nd: Vec<_> = [String::from("::"), "fe80::/10".into()]
        .into_iter()
        .chain(v6.iter().map(ToString::to_string))
        .collect();
    // The target of an advertisement, which nft 1.0 cannot name (RFC 4861 §4.4).
    let targets: Vec<_> = v6.iter().map(|ip| format!("{:#034x}", u128::from(*ip))).collect();
    let target = match targets.is_empty() {
        true => String::new(),
        false => format!(" @th,64,128 != {{ {} }}", targets.join(", ")),
    };
    let mut rules = vec![
        format!("ether saddr != {mac} counter drop"),
        format!("arp saddr ether != {mac} counter drop"),
        format!("arp saddr ip != {{ {arp} }} counter drop"),
        "ether type arp accept".into(),
    ];
    if !v4.is_empty() {
        rules.push(format!("ip saddr != {{ {} }} counter drop", v4.join(", ")));
        rules.push("ether type ip accept".into());
    }
    rules.extend([
        "icmpv6 type { nd-router-advert, nd-redirect } counter drop".into(),
        "ip6 saddr fe80::1 counter drop".into(),
        format!("ip6 saddr != {{ {} }} counter drop", nd.join(", ")),
        "icmpv6 type nd-neighbor-advert @th,64,128 0xfe800000000000000000000000000001 counter drop"
            .into(),
        format!("icmpv6 type nd-neighbor-advert @th,64,10 != 0x3fa{target} counter drop"),
        "ether type ip6 accept".into(),
        "counter drop".into(),
    ]);
    rules
}

/// The last digest of each table in `listing`.
fn digests(listing: &str) -> Vec<&str> {
    let chains = listing.split("chain digest {").skip(1);
    chains.filter_map(|rest| rest.split('}').next()?.rsplit('"').nth(1)).collect()
}

/// The tables of the two kinds of namespace.
pub(crate) const HOST_TABLES: &[&str] = &["inet weft"];
pub(crate) const NETWORK_TABLES: &[&str] = &["inet weft", BRIDGE_TABLE];
const BRIDGE_TABLE: &str = "bridge weft";
/// Where a VXLAN packet has its VNI (RFC 7348 §5): behind 8 bytes of UDP header and 4 of flags.
const VNI: &str = "@th,96,24";

pub(crate) fn ip(net: &IpNet) -> &'static str {
    match net {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}

fn by_family(vteps: &BTreeSet<VtepAddr>) -> (Vec<String>, Vec<String>) {
    let (v4, v6): (Vec<_>, Vec<_>) = vteps.iter().partition(|vtep| vtep.ip().is_ipv4());
    let print = |vteps: Vec<&VtepAddr>| vteps.iter().map(ToString::to_string).collect();
    (print(v4), print(v6))
}

fn set(name: &str, kind: &str, elements: &[String]) -> String {
    set_of(name, &format!("type {kind}"), elements)
}

fn typeof_set(name: &str, expression: &str, elements: &[String]) -> String {
    set_of(name, &format!("typeof {expression}"), elements)
}

fn set_of(name: &str, key: &str, elements: &[String]) -> String {
    container(&format!("set {name}"), key, elements)
}

pub(crate) fn map(name: &str, kind: &str, elements: &[String]) -> String {
    container(&format!("map {name}"), &format!("type {kind}"), elements)
}

fn container(head: &str, key: &str, elements: &[String]) -> String {
    let elements = match elements.is_empty() {
        true => String::new(),
        false => format!("\t\telements = {{ {} }}\n", elements.join(", ")),
    };
    format!("\t{head} {{\n\t\t{key}\n{elements}\t}}\n")
}

pub(crate) fn chain(name: &str, hook: Option<&str>, rules: &[String]) -> String {
    let mut text = format!("\tchain {name} {{\n");
    for line in hook.into_iter().chain(rules.iter().map(String::as_str)) {
        let _ = writeln!(text, "\t\t{line}");
    }
    text + "\t}\n"
}

#[cfg(test)]
pub(crate) mod tests {
    use weft_model::{MacAddr, NetworkId};

    use super::*;
    use crate::{Transport, Uplink};

    fn vteps(texts: &[&str]) -> BTreeSet<VtepAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    pub(crate) fn vnis(numbers: &[u32]) -> BTreeSet<Vni> {
        numbers.iter().map(|&vni| Vni::try_from(vni).unwrap()).collect()
    }

    pub(crate) fn network(internal: bool) -> OverlayNetwork {
        let id = NetworkId::from([1; 16]);
        OverlayNetwork {
            id,
            name: "app".parse().unwrap(),
            transport: Transport::Vxlan {
                vni: Vni::try_from(4097).unwrap(),
                local: "192.0.2.1".parse().unwrap(),
                port: 4789,
            },
            mtu: 1450,
            gateway_mac: MacAddr::for_gateway(id),
            gateways: Vec::new(),
            vips: BTreeSet::new(),
            internal,
            multicast: false,
            isolated: false,
            provisional: false,
            remotes: BTreeMap::new(),
            flood: BTreeMap::new(),
            ports: BTreeMap::new(),
            uplink: Some(Uplink::default()),
            transit: None,
        }
    }

    pub(crate) fn port(ips: &[&str]) -> Port {
        Port {
            mac: "02:00:00:00:00:07".parse().unwrap(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn the_host_lets_its_networks_frames_in_from_present_peers_only() {
        let rules = HostRules {
            vxlan_port: 4789,
            local: vteps(&["192.0.2.1"]),
            vteps: vteps(&["192.0.2.2", "192.0.2.3"]),
            sealed_ports: BTreeSet::new(),
            uplink_pools: vec!["169.254.192.0/18".parse().unwrap()],
        };
        insta::assert_snapshot!(Ruleset::of_host(&rules, &vnis(&[4097, 70_000])).script());
    }

    #[test]
    fn the_host_takes_sealed_packets_from_everywhere_but_its_networks() {
        let rules = HostRules {
            local: vteps(&["192.0.2.1", "2001:db8::1"]),
            sealed_ports: [6791, 6792].into(),
            ..HostRules::default()
        };
        let script = Ruleset::of_host(&rules, &BTreeSet::new()).script();
        let named: Vec<_> = script.lines().filter(|line| line.contains("sealed")).collect();
        insta::assert_snapshot!(named.join("\n").replace('\t', ""), @r#"
        set sealed {
        iifname "wfu*" udp dport @sealed counter drop
        iifname "wfx*" udp dport @sealed counter drop
        udp dport @sealed ip daddr @local4 notrack
        udp dport @sealed ip6 daddr @local6 notrack
        udp sport @sealed ip saddr @local4 notrack
        udp sport @sealed ip6 saddr @local6 notrack
        "#);
        let untouched = HostRules { sealed_ports: BTreeSet::new(), ..rules };
        let script = Ruleset::of_host(&untouched, &BTreeSet::new()).script();
        assert!(!script.contains("sealed"), "{script}");
    }

    #[test]
    fn a_host_without_a_vtep_leaves_the_tunnels_ports_alone() {
        let rules = HostRules { sealed_ports: [6791].into(), ..HostRules::default() };
        let script = Ruleset::of_host(&rules, &vnis(&[4097])).script();
        assert!(!script.contains("4789") && !script.contains("6791"), "{script}");
    }

    #[test]
    fn only_what_carries_a_network_may_bring_in_others_frames() {
        let plain = network(false);
        let sealed = OverlayNetwork { transport: Transport::Sealed, ..plain.clone() };
        let script = |network| Ruleset::of_network(network, &[], &BTreeMap::new());
        let (plain, sealed) = (script(&plain), script(&sealed));
        assert!(plain.script().contains("\"vx0\" : accept"), "{}", plain.script());
        assert!(
            sealed.script().contains("elements = { \"tap0\" : accept }"),
            "{}",
            sealed.script()
        );
        assert_ne!(plain.digest(), sealed.digest());
    }

    #[test]
    fn a_port_may_send_from_its_own_addresses_only() {
        let ports = [("v01".to_owned(), port(&["10.0.0.7", "fd00::7"]))].into();
        let pools = ["169.254.192.0/18".parse().unwrap()];
        insta::assert_snapshot!(Ruleset::of_network(&network(false), &pools, &ports).script());
    }

    #[test]
    fn isolated_ports_meet_neither_on_the_bridge_nor_by_the_gateway() {
        let script = |isolated| {
            let network = OverlayNetwork { isolated, ..network(false) };
            Ruleset::of_network(&network, &[], &BTreeMap::new()).script()
        };
        let between = "iifname \"br0\" oifname \"br0\" counter drop";
        let bridged = "hook forward priority -300; policy accept;\n\t\tcounter drop";
        let (isolated, open) = (script(true), script(false));
        assert!(isolated.contains(between) && isolated.contains(bridged), "{isolated}");
        assert!(!open.contains(between) && !open.contains(bridged), "{open}");
    }

    #[test]
    fn an_internal_network_translates_nothing() {
        let script = Ruleset::of_network(&network(true), &[], &BTreeMap::new()).script();
        assert!(!script.contains("masquerade"), "{script}");
    }

    #[test]
    fn of_several_digests_the_last_one_counts() {
        let listing = "table inet weft {\n\tchain digest {\n\t\treturn comment \"weft 1\"\n\t\treturn \
                       comment \"weft 2\"\n\t}\n}\ntable bridge weft {\n\tchain digest {\n\t\treturn \
                       comment \"weft 3\"\n\t}\n}\n";
        assert_eq!(digests(listing), ["weft 2", "weft 3"]);
    }
}
