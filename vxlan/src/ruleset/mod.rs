//! The text of our nftables, by pure functions.

use std::{collections::BTreeMap, fmt::Write as _};

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use self::network::verdict;

mod host;
mod network;

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

/// The last digest of each table in `listing`.
fn digests(listing: &str) -> Vec<&str> {
    let chains = listing.split("chain digest {").skip(1);
    chains.filter_map(|rest| rest.split('}').next()?.rsplit('"').nth(1)).collect()
}

/// The tables of the two kinds of namespace.
pub(crate) const HOST_TABLES: &[&str] = &["inet weft"];
pub(crate) const NETWORK_TABLES: &[&str] = &["inet weft", BRIDGE_TABLE];
const BRIDGE_TABLE: &str = "bridge weft";
pub(crate) fn ip(net: &IpNet) -> &'static str {
    match net {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}

fn set(name: &str, kind: &str, elements: &[String]) -> String {
    set_of(name, &format!("type {kind}"), elements)
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

/// What makes a chain one that the kernel calls; it lets pass what none of its rules is about.
pub(crate) fn hook(kind: &str, hook: &str, priority: &str) -> String {
    format!("type {kind} hook {hook} priority {priority}; policy accept;")
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
    use std::collections::BTreeSet;

    use weft_model::{MacAddr, NetworkId, Vni};

    use super::*;
    use crate::{OverlayNetwork, Port, Transport, Uplink};

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
    fn of_several_digests_the_last_one_counts() {
        let listing = "table inet weft {\n\tchain digest {\n\t\treturn comment \"weft 1\"\n\t\treturn \
                       comment \"weft 2\"\n\t}\n}\ntable bridge weft {\n\tchain digest {\n\t\treturn \
                       comment \"weft 3\"\n\t}\n}\n";
        assert_eq!(digests(listing), ["weft 2", "weft 3"]);
    }
}
