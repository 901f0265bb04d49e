//! The rules of a network's namespace.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use super::{BRIDGE_TABLE, Ruleset, chain, hook, ip};
use crate::{OverlayNetwork, Port, bridge::BRIDGE, uplink::UPLINK};

impl Ruleset {
    /// The rules of a network's namespace: what may pass the uplink, and what each port may send
    /// from. `ports` names the bridge's ports.
    pub(crate) fn of_network(
        network: &OverlayNetwork,
        pools: &[IpNet],
        ports: &BTreeMap<String, Port>,
    ) -> Self {
        // Neither the other ends of uplinks nor the host by its end are for containers.
        let kept_from_stations = pools.iter().map(|pool| format!("{} daddr {pool} drop", ip(pool)));
        let between = if network.isolated { "counter drop" } else { "accept" };
        let stations: Vec<_> = [
            format!("oifname \"{BRIDGE}\" {between}"),
            // What came in by a port of the host may be its own: then the answer is for an uplink.
            format!("oifname \"{UPLINK}\" ct direction reply ct status dnat accept"),
        ]
        .into_iter()
        .chain(kept_from_stations.clone())
        .collect();
        let outside = [
            format!("oifname \"{BRIDGE}\" ct state established,related accept"),
            format!("oifname \"{BRIDGE}\" ct status dnat accept"),
            "drop".into(),
        ];
        let forward = [
            format!("iifname \"{BRIDGE}\" goto stations"),
            format!("iifname \"{UPLINK}\" goto outside"),
        ];
        let mut input: Vec<_> =
            kept_from_stations.map(|rule| format!("iifname \"{BRIDGE}\" {rule}")).collect();
        input.extend(
            [
                "ct state established,related accept",
                "ct status dnat accept",
                "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
                "drop",
            ]
            .map(|rule| format!("iifname \"{UPLINK}\" {rule}")),
        );
        let clamp = ["oifname", "iifname"]
            .map(|side| format!("{side} \"{UPLINK}\" tcp option maxseg size set rt mtu"));

        let mut body = String::new();
        body += &chain("input", Some(&hook("filter", "input", "filter")), &input);
        // What goes out where it came in is translated, or is for a router: nobody but the gateway
        // can send it there. IPv4 has a setting for that.
        let redirects = [format!("oifname \"{BRIDGE}\" icmpv6 type nd-redirect drop")];
        body += &chain("output", Some(&hook("filter", "output", "filter")), &redirects);
        body += &chain("clamp", None, &clamp);
        let begins = ["tcp flags syn goto clamp".to_owned()];
        body += &chain("mangle", Some(&hook("filter", "forward", "mangle")), &begins);
        body += &chain("stations", None, &stations);
        body += &chain("outside", None, &outside);
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
}

/// Drops what a port sends from an address that is not its own, as Ethernet, ARP, IP or neighbour
/// discovery source, and what only a router may say. If the ports are `isolated`, nothing passes
/// between them.
fn bridge_rules(isolated: bool) -> String {
    let checked = ["iifname vmap @ports".to_owned(), "counter drop".to_owned()];
    let mut body = chain("prerouting", Some(&hook("filter", "prerouting", "-300")), &checked);
    if isolated {
        // What is for the gateway is not forwarded.
        let hook = hook("filter", "forward", "-300");
        body += &chain("forward", Some(&hook), &["counter drop".to_owned()]);
    }
    body
}

fn port_chain(name: &str, port: &Port) -> (String, String) {
    (name.to_owned(), chain(&format!("port-{name}"), None, &port_rules(port)))
}

pub(super) fn verdict(port: &str) -> String {
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
    let mut rules = vec![format!("ether saddr != {mac} counter drop")];
    if !v4.is_empty() {
        rules.push(format!("ip saddr != {{ {} }} counter drop", v4.join(", ")));
        rules.push("ether type ip accept".into());
    }
    rules.extend([
        format!("arp saddr ether != {mac} counter drop"),
        format!("arp saddr ip != {{ {arp} }} counter drop"),
        "ether type arp accept".into(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Transport,
        ruleset::tests::{network, port},
    };

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
        let between = "chain stations {\n\t\toifname \"br0\" counter drop";
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
}
