//! The table `inet weft-publish` of the host's namespace: where published ports lead to.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use sha2::{Digest as _, Sha256};
use weft_model::{Family, Protocol};
use weft_vxlan::{KernelError, Namespace, list_rules, load_rules};

use crate::{HostPort, skeleton::USER};

/// Ports of the host, and where each leads to.
pub(crate) type Ports = BTreeMap<HostPort, SocketAddr>;

/// What is remembered between passes: the table as it was printed when it was right, without the
/// ports.
#[derive(Debug, Default)]
pub(crate) struct Memory(Option<String>);

/// What is done to the table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Load {
    Nothing,
    /// The elements that differ, in one transaction.
    Change(String),
    /// All of it.
    Whole(String),
}

/// Lists what turns `actual` into `desired`: of an unharmed table the ports, of any other nothing.
pub(crate) fn plan(desired: &Ports, actual: Option<&Ports>) -> Load {
    let Some(actual) = actual else { return Load::Whole(whole(desired)) };
    let mut script = String::new();
    // Also those that lead elsewhere now: an element of a map cannot be changed.
    for (port, to) in actual.iter().filter(|(port, to)| desired.get(port) != Some(to)) {
        let (map, key, _) = element(port, *to);
        let _ = writeln!(script, "delete element {TABLE} {map} {{ {key} }}");
    }
    for (port, to) in desired.iter().filter(|(port, to)| actual.get(port) != Some(to)) {
        let (map, key, value) = element(port, *to);
        let _ = writeln!(script, "add element {TABLE} {map} {{ {key} : {value} }}");
    }
    if script.is_empty() { Load::Nothing } else { Load::Change(script) }
}

/// The ports in the kernel's table, if nobody has harmed it.
pub(crate) fn read(
    namespace: &Namespace,
    memory: &mut Memory,
) -> Result<Option<Ports>, KernelError> {
    let Some(listing) = list_rules(namespace, &[TABLE])? else { return Ok(None) };
    let (skeleton, ports) = dissect(&listing);
    let right = match &memory.0 {
        Some(printed) => *printed == skeleton,
        // A predecessor's: its digest is all that can be checked.
        None => skeleton.contains(&digest()),
    };
    if right {
        memory.0 = Some(skeleton);
    }
    Ok(ports.filter(|_| right))
}

/// Whether there is a table, harmed or not.
pub(crate) fn is_there(namespace: &Namespace) -> Result<bool, KernelError> {
    Ok(list_rules(namespace, &[TABLE])?.is_some())
}

/// Carries `load` out.
pub(crate) fn apply(
    namespace: &Namespace,
    memory: &mut Memory,
    load: &Load,
) -> Result<(), KernelError> {
    match load {
        Load::Nothing => Ok(()),
        Load::Change(script) => load_rules(namespace, script),
        Load::Whole(script) => {
            memory.0 = None;
            load_rules(namespace, script)
        }
    }
}

/// What `nft -f` loads: the table anew, in place of what it held.
fn whole(ports: &Ports) -> String {
    // Declared first, because only a table that is there can be deleted.
    let mut script = format!("table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let _ = writeln!(script, "\tchain digest {{\n\t\treturn comment \"{}\"\n\t}}", digest());
    script += RULES;
    script += "}\n";
    script += USER;
    for (port, to) in ports {
        let (map, key, value) = element(port, *to);
        let _ = writeln!(script, "add element {TABLE} {map} {{ {key} : {value} }}");
    }
    script
}

fn element(port: &HostPort, to: SocketAddr) -> (&'static str, String, String) {
    let HostPort { ip, family, protocol, port } = port;
    let value = format!("{} . {}", to.ip(), to.port());
    let map = match (ip, family) {
        (Some(_), Family::V4) => "bound4",
        (Some(_), Family::V6) => "bound6",
        (None, Family::V4) => "any4",
        (None, Family::V6) => "any6",
    };
    match ip {
        Some(ip) => (map, format!("{ip} . {protocol} . {port}"), value),
        None => (map, format!("{protocol} . {port}"), value),
    }
}

/// A listing without the ports, and the ports; none if there is anything else in the maps.
fn dissect(listing: &str) -> (String, Option<Ports>) {
    let (mut skeleton, mut ports) = (String::new(), Some(Ports::new()));
    let (mut map, mut elements) = (None, None::<String>);
    for line in listing.lines() {
        let text = line.trim();
        if let Some(name) = text.strip_prefix("map ").and_then(|rest| rest.strip_suffix(" {")) {
            map = Some(name.to_owned());
        }
        if let Some(first) = text.strip_prefix("elements = {") {
            elements = Some(first.to_owned());
        } else if let Some(elements) = &mut elements {
            elements.push_str(text);
        } else {
            let _ = writeln!(skeleton, "{line}");
        }
        if let Some(all) = elements.take_if(|elements| elements.ends_with('}')) {
            let of = map.as_deref().unwrap_or_default();
            let found = all.trim_end_matches('}').split(',').map(|text| parse(of, text));
            let found: Option<Ports> = found.collect();
            ports = ports.zip(found).map(|(ports, found)| ports.into_iter().chain(found).collect());
        }
    }
    (skeleton, ports)
}

fn parse(map: &str, element: &str) -> Option<(HostPort, SocketAddr)> {
    let (key, value) = element.split_once(" : ")?;
    let (to, port) = value.trim().split_once(" . ")?;
    let to = SocketAddr::new(to.parse().ok()?, port.parse().ok()?);
    let family = Family::of(to.ip());
    let words: Vec<_> = key.trim().split(" . ").collect();
    let (ip, [protocol, port]) = match *words {
        [ip, protocol, port] => (Some(ip.parse::<IpAddr>().ok()?), [protocol, port]),
        [protocol, port] => (None, [protocol, port]),
        _ => return None,
    };
    let protocol = protocol.parse::<Protocol>().ok()?;
    let port = HostPort { ip, family, protocol, port: port.parse().ok()? };
    (crate::host::table::element(&port, to).0 == map).then_some((port, to))
}

fn digest() -> String {
    let [a, b, c, d, e, f, g, h, ..]: [u8; 32] = Sha256::digest(RULES).into();
    format!("weft {:016x}", u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}

const TABLE: &str = "inet weft-publish";

/// All but the elements.
///
/// A port is published at addresses of this host alone: what another host's address is named for
/// would otherwise be taken from that host, or from anybody outside. Loopback addresses are no destination of what comes from outside, whatever it says; the kernel
/// would notice only after the translation. What the host itself sends, and what comes by one
/// uplink and leaves by another or the same, gets an address that its answers find back to.
const RULES: &str = "\
	map bound4 {
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
	}
	map bound6 {
		type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service
	}
	map any4 {
		type inet_proto . inet_service : ipv4_addr . inet_service
	}
	map any6 {
		type inet_proto . inet_service : ipv6_addr . inet_service
	}
	chain prerouting {
		type nat hook prerouting priority dstnat - 5; policy accept;
		ip daddr 127.0.0.0/8 accept
		ip6 daddr ::1 accept
		jump published
	}
	chain output {
		type nat hook output priority -105; policy accept;
		jump published
	}
	chain published {
		fib daddr type local meta nfproto ipv4 dnat ip to ip daddr . meta l4proto . th dport map @bound4
		fib daddr type local meta nfproto ipv6 dnat ip6 to ip6 daddr . meta l4proto . th dport map @bound6
		fib daddr type local meta nfproto ipv4 dnat ip to meta l4proto . th dport map @any4
		fib daddr type local meta nfproto ipv6 dnat ip6 to meta l4proto . th dport map @any6
	}
	chain postrouting {
		type nat hook postrouting priority srcnat - 5; policy accept;
		oifname \"wfu*\" ct status dnat fib saddr type local masquerade
		iifname \"wfu*\" oifname \"wfu*\" ct status dnat masquerade
	}
";

#[cfg(test)]
mod tests {
    use super::*;

    fn port(ip: Option<&str>, family: Family, port: u16) -> HostPort {
        HostPort { ip: ip.map(|ip| ip.parse().unwrap()), family, protocol: Protocol::Tcp, port }
    }

    fn some() -> Ports {
        [
            (port(None, Family::V4, 80), "169.254.192.1:4711".parse().unwrap()),
            (port(None, Family::V6, 80), "[fd77::1]:4711".parse().unwrap()),
            (port(Some("127.0.0.1"), Family::V4, 81), "169.254.192.1:4712".parse().unwrap()),
            (port(Some("2001:db8::1"), Family::V6, 81), "[fd77::1]:4712".parse().unwrap()),
        ]
        .into()
    }

    #[test]
    fn a_change_costs_the_elements_that_differ() {
        let before = some();
        let mut after = before.clone();
        after.remove(&port(None, Family::V6, 80));
        after.insert(port(None, Family::V4, 80), "169.254.192.3:4711".parse().unwrap());
        let Load::Change(script) = plan(&after, Some(&before)) else { panic!("not a change") };
        insta::assert_snapshot!(script, @"
        delete element inet weft-publish any4 { tcp . 80 }
        delete element inet weft-publish any6 { tcp . 80 }
        add element inet weft-publish any4 { tcp . 80 : 169.254.192.3 . 4711 }
        ");
        assert_eq!(plan(&after, Some(&after)), Load::Nothing);
        assert!(matches!(plan(&after, None), Load::Whole(_)));
    }

    #[test]
    fn what_nft_prints_is_understood() {
        let listing = "table inet weft-publish {\n\tmap bound4 {\n\t\ttype ipv4_addr . inet_proto . \
            inet_service : ipv4_addr . inet_service\n\t\telements = { 127.0.0.1 . tcp . 81 : \
            169.254.192.1 . 4712 }\n\t}\n\n\tmap any6 {\n\t\telements = { tcp . 80 : fd77::1 . \
            4711,\n\t\t\t     tcp . 90 : fd77::1 . 4713 }\n\t}\n\n\tchain digest {\n\t}\n}\n";
        let (skeleton, ports) = dissect(listing);
        let ports = ports.unwrap();
        assert_eq!(ports.len(), 3);
        assert_eq!(ports[&port(None, Family::V6, 80)], "[fd77::1]:4711".parse().unwrap());
        assert!(!skeleton.contains("elements") && skeleton.contains("chain digest"), "{skeleton}");
        let strange = listing.replace("tcp . 90", "sctp . 90");
        assert_eq!(dissect(&strange).1, None);
        let misplaced = listing.replace("map any6", "map any4");
        assert_eq!(dissect(&misplaced).1, None);
    }
}
