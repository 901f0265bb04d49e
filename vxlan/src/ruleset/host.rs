//! The rules of the host's namespace.

use std::collections::BTreeSet;

use weft_model::{Vni, VtepAddr};

use super::{Ruleset, chain, hook, ip, set, set_of};
use crate::{HostRules, port::EXPOSED_PREFIX, uplink::HOST_PREFIX};

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
            body += &set_of("vnis", &format!("typeof {VNI}"), &vnis);
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
            body += &chain("input", Some(&hook("filter", "input", "mangle")), &input);
            // Every inner flow has an outer source port of its own: tracked, they would fill the
            // host's connection table, and each packet would pay for it.
            for (hooked, from, to, sealed) in
                [("prerouting", "vteps", "local", prerouting), ("output", "local", "vteps", output)]
            {
                let rule = |ip: &str, n: u8| {
                    format!("udp dport {port} {ip} saddr @{from}{n} {ip} daddr @{to}{n} notrack")
                };
                let name = format!("untracked-{hooked}");
                let plain = ["meta l4proto != udp accept".into(), rule("ip", 4), rule("ip6", 6)];
                let rules = [&plain, sealed.as_slice()].concat();
                body += &chain(&name, Some(&hook("filter", hooked, "raw")), &rules);
            }
        }
        let mut forward = Vec::new();
        if !local.is_empty() {
            forward.push(format!("udp dport {port} ip daddr @vteps4 counter drop"));
            forward.push(format!("udp dport {port} ip6 daddr @vteps6 counter drop"));
        }
        // A device's name is what a rule takes longest to look at, so few rules do that to each
        // packet.
        forward.push(format!("oifname \"{HOST_PREFIX}*\" goto networks"));
        forward.push(format!("iifname \"{HOST_PREFIX}*\" oifname != \"{EXPOSED_PREFIX}*\" accept"));
        // The host is on a network for itself, not for whom it routes for; what its operator
        // translates is meant to pass.
        for side in ["oifname", "iifname"] {
            forward.push(format!("{side} \"{EXPOSED_PREFIX}*\" goto exposed"));
        }
        // One network's namespace is no way into another's, except by a port of the host.
        let networks = [
            "ct status dnat accept".into(),
            format!("iifname \"{HOST_PREFIX}*\" drop"),
            "ct state established,related accept".into(),
            "drop".into(),
        ];
        body += &chain("networks", None, &networks);
        body += &chain("exposed", None, &["ct status dnat accept".into(), "drop".into()]);
        body += &chain("forward", Some(&hook("filter", "forward", "mangle")), &forward);

        // An uplink lets loopback addresses pass, for the host's own clients of published ports.
        let loopback = ["saddr", "daddr"]
            .map(|side| format!("ip {side} 127.0.0.0/8 iifname \"{HOST_PREFIX}*\" counter drop"));
        body += &chain("loopback", Some(&hook("filter", "prerouting", "raw")), &loopback);

        let masquerade: Vec<_> = uplink_pools
            .iter()
            .map(|pool| {
                format!("{} saddr {pool} oifname != \"{HOST_PREFIX}*\" masquerade", ip(pool))
            })
            .collect();
        body += &chain("postrouting", Some(&hook("nat", "postrouting", "srcnat")), &masquerade);
        Self::of_tables(vec![("inet weft", body)])
    }
}

fn by_family(vteps: &BTreeSet<VtepAddr>) -> (Vec<String>, Vec<String>) {
    let (v4, v6): (Vec<_>, Vec<_>) = vteps.iter().partition(|vtep| vtep.ip().is_ipv4());
    let print = |vteps: Vec<&VtepAddr>| vteps.iter().map(ToString::to_string).collect();
    (print(v4), print(v6))
}

/// Where a VXLAN packet has its VNI (RFC 7348 §5): behind 8 bytes of UDP header and 4 of flags.
const VNI: &str = "@th,96,24";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::tests::vnis;

    fn vteps(texts: &[&str]) -> BTreeSet<VtepAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
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
}
