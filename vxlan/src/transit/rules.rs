//! nftables of the transit: which frames are lifted, and what is marked. A host that is new or gone
//! is an element more or less.

use std::{collections::BTreeSet, fmt, fmt::Write as _, net::IpAddr};

use ipnet::IpNet;
use weft_model::MacAddr;

use super::{ANY_ROUTER, FROM_OUTSIDE, ROUTER_BIT};
use crate::{
    Table,
    bridge::BRIDGE,
    namespace::Namespace,
    nft,
    ruleset::{Ruleset, chain, hook, ip, map},
    table::{KernelError, KernelTable},
    uplink::UPLINK,
};

/// The routers of a network and what is done with their frames.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Routers {
    pub(super) gateway: MacAddr,
    pub(super) own: MacAddr,
    pub(super) carrier: &'static str,
    pub(super) sources: Vec<(IpNet, IpAddr)>,
    /// Of the other hosts.
    pub(super) macs: BTreeSet<MacAddr>,
}

/// What is remembered between passes: how the tables were printed when they were right.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Of what rules, and the listing without the maps' elements.
    known: Option<(Ruleset, String)>,
}

/// What is in the kernel.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Sight {
    /// Whether there is any table of ours.
    any: bool,
    /// Of the rules that are wanted, unharmed: the routers in their maps.
    intact: Option<BTreeSet<MacAddr>>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum RouterOp {
    Load(Routers),
    Add(MacAddr),
    Remove(MacAddr),
    Delete,
}

impl RouterOp {
    /// Whether a router is lost by it.
    pub(crate) fn is_removal(&self) -> bool {
        matches!(self, Self::Remove(_))
    }
}

/// Lists the operations that turn `actual` into `desired`.
pub(crate) fn plan(desired: Option<&Routers>, actual: &Sight) -> Vec<RouterOp> {
    let Some(desired) = desired else {
        return if actual.any { vec![RouterOp::Delete] } else { Vec::new() };
    };
    let Some(found) = &actual.intact else { return vec![RouterOp::Load(desired.clone())] };
    let add = desired.macs.difference(found).copied().map(RouterOp::Add);
    let remove = found.difference(&desired.macs).copied().map(RouterOp::Remove);
    add.chain(remove).collect()
}

impl Routers {
    /// All but the elements of the maps.
    fn rules(&self) -> Ruleset {
        let Self { gateway, own, carrier, sources, .. } = self;
        let is_router = format!("meta mark & {ROUTER_BIT:#x} != 0");

        let mut frames = map("marks", "ether_addr : mark", &[]);
        frames += &map("routers", "mark : ether_addr", &[]);
        frames += &chain(
            "prerouting",
            Some(&hook("filter", "prerouting", "-250")),
            &[format!(
                "iifname \"{carrier}\" meta mark set ether saddr map @marks ether daddr set \
                 {gateway} meta pkttype set host"
            )],
        );
        frames += &chain(
            "postrouting",
            Some(&hook("filter", "postrouting", "0")),
            &[
                // Marks mean nothing outside: the host's own rules may know others by the same.
                format!(
                    "meta mark {FROM_OUTSIDE} oifname \"{carrier}\" ether saddr set {own} meta \
                     mark set 0 accept"
                ),
                format!(
                    "{is_router} oifname \"{carrier}\" ether daddr set meta mark map @routers \
                     ether saddr set {own} meta mark set 0 accept"
                ),
                format!("ether daddr {ANY_ROUTER} oifname \"{carrier}\" counter drop"),
            ],
        );

        let mut packets = chain(
            "prerouting",
            Some(&hook("filter", "prerouting", "mangle")),
            &[
                format!("iifname \"{UPLINK}\" meta mark set {FROM_OUTSIDE} accept"),
                // With every packet, so that a client that comes by another host now is answered
                // by that one.
                format!(
                    "{is_router} iifname \"{BRIDGE}\" ct direction original ct mark set meta mark \
                     meta mark set 0 accept"
                ),
                format!("{is_router} iifname \"{BRIDGE}\" meta mark set 0 accept"),
                format!(
                    "ct direction reply ct mark & {ROUTER_BIT:#x} != 0 iifname \"{BRIDGE}\" meta \
                     mark set ct mark"
                ),
            ],
        );
        // What the gateway itself has to say of such a connection (ICMP).
        packets += &chain(
            "output",
            Some(&hook("route", "output", "mangle")),
            &[format!("ct direction reply ct mark & {ROUTER_BIT:#x} != 0 meta mark set ct mark")],
        );
        let translated: Vec<_> = sources
            .iter()
            .map(|(pool, address)| {
                let ip = ip(pool);
                format!("oifname \"{BRIDGE}\" {ip} saddr {pool} snat {ip} to {address}")
            })
            .collect();
        packets +=
            &chain("postrouting", Some(&hook("nat", "postrouting", "srcnat + 10")), &translated);
        Ruleset::of_tables(vec![(TABLES[0], packets), (TABLES[1], frames)])
    }

    fn script(&self) -> String {
        self.macs.iter().fold(self.rules().script(), |script, &mac| script + &add(mac))
    }
}

/// The transit's tables of one namespace.
pub(crate) struct KernelRouters<'a> {
    pub(crate) namespace: &'a Namespace,
    pub(crate) memory: &'a mut Memory,
    pub(crate) desired: Option<&'a Routers>,
}

impl KernelTable for KernelRouters<'_> {
    const TABLE: Table = Table::Transit;
    type State = Sight;
    type Op = RouterOp;

    fn read(&mut self) -> Result<Sight, KernelError> {
        let mut listing = String::new();
        let mut missing = 0;
        for table in TABLES {
            match nft::list(self.namespace, &[table])? {
                Some(text) => listing += &text,
                None => missing += 1,
            }
        }
        let any = missing < TABLES.len();
        let Some(rules) = self.desired.map(Routers::rules).filter(|_| missing == 0) else {
            return Ok(Sight { any, intact: None });
        };
        let (skeleton, routers) = dissect(&listing);
        let right = match &self.memory.known {
            Some((known, printed)) => *known == rules && *printed == skeleton,
            // A predecessor's: its digest is all that can be checked.
            None => rules.is_in(&listing),
        };
        if right {
            self.memory.known = Some((rules, skeleton));
        }
        Ok(Sight { any, intact: routers.filter(|_| right) })
    }

    fn apply(&mut self, ops: &[RouterOp]) -> Vec<Result<(), KernelError>> {
        ops.iter().map(|op| self.apply_one(op)).collect()
    }
}

impl KernelRouters<'_> {
    fn apply_one(&mut self, op: &RouterOp) -> Result<(), KernelError> {
        match op {
            RouterOp::Load(routers) => {
                self.memory.known = None;
                nft::load(self.namespace, &routers.script())?;
                if let Some(listing) = nft::list(self.namespace, &TABLES)? {
                    self.memory.known = Some((routers.rules(), dissect(&listing).0));
                }
                Ok(())
            }
            RouterOp::Add(mac) => nft::load(self.namespace, &add(*mac)),
            RouterOp::Remove(mac) => nft::load(self.namespace, &remove(*mac)),
            RouterOp::Delete => {
                self.memory.known = None;
                let script = TABLES.iter().fold(String::new(), |mut script, table| {
                    // Declared first, because only a table that is there can be deleted.
                    let _ = writeln!(script, "table {table}\ndelete table {table}");
                    script
                });
                nft::load(self.namespace, &script)
            }
        }
    }
}

fn add(mac: MacAddr) -> String {
    let (table, mark) = (TABLES[1], mac.router_mark());
    format!(
        "add element {table} marks {{ {mac} : {mark:#x} }}\n\
         add element {table} routers {{ {mark:#x} : {mac} }}\n"
    )
}

fn remove(mac: MacAddr) -> String {
    let (table, mark) = (TABLES[1], mac.router_mark());
    format!(
        "delete element {table} marks {{ {mac} }}\ndelete element {table} routers {{ {mark:#x} }}\n"
    )
}

/// A listing without the maps' elements, and the routers in them, if each is in both.
fn dissect(listing: &str) -> (String, Option<BTreeSet<MacAddr>>) {
    let (mut skeleton, mut elements) = (String::new(), Vec::new());
    let mut inside = false;
    for line in listing.lines() {
        let text = line.trim();
        if text.starts_with("elements = {") {
            (inside, elements) = (true, [elements, vec![String::new()]].concat());
        }
        match elements.last_mut().filter(|_| inside) {
            Some(elements) => {
                elements.push_str(text);
                inside = !text.ends_with('}');
            }
            None => {
                let _ = writeln!(skeleton, "{line}");
            }
        }
    }
    let mut maps = elements.iter().map(|map| {
        let words = map.split([' ', ',', '{', '}', '=']);
        words.filter_map(|word| word.parse().ok()).collect::<BTreeSet<MacAddr>>()
    });
    let routers = match (maps.next(), maps.next()) {
        (Some(marks), Some(routers)) => (marks == routers).then_some(routers),
        (Some(_), None) => None,
        (None, _) => Some(BTreeSet::new()),
    };
    (skeleton, routers)
}

impl fmt::Display for RouterOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load(routers) => {
                write!(f, "load the transit's rules ({})", routers.rules().digest())
            }
            Self::Add(mac) => write!(f, "add router {mac}"),
            Self::Remove(mac) => write!(f, "remove router {mac}"),
            Self::Delete => f.write_str("delete the transit's rules"),
        }
    }
}

const TABLES: [&str; 2] = ["inet weft-transit", "bridge weft-transit"];

#[cfg(test)]
mod tests {
    use weft_model::{NetworkId, NodeId};

    use super::*;

    fn routers(nodes: &[u8]) -> Routers {
        let network = NetworkId::from([1; 16]);
        let router = |node: u8| MacAddr::for_router(network, NodeId::from([node; 16]));
        Routers {
            gateway: MacAddr::for_gateway(network),
            own: router(9),
            carrier: "vx0",
            sources: vec![("169.254.192.0/18".parse().unwrap(), "192.0.2.9".parse().unwrap())],
            macs: nodes.iter().map(|&node| router(node)).collect(),
        }
    }

    #[test]
    fn frames_of_routers_are_lifted_and_answers_go_back_to_them() {
        insta::assert_snapshot!(routers(&[2]).script());
    }

    #[test]
    fn a_host_more_is_an_element_more() {
        let (one, two) = (routers(&[2]), routers(&[2, 3]));
        let sight = |routers: &Routers| Sight { any: true, intact: Some(routers.macs.clone()) };
        let new = *two.macs.difference(&one.macs).next().unwrap();
        assert_eq!(plan(Some(&two), &sight(&one)), [RouterOp::Add(new)]);
        assert_eq!(plan(Some(&one), &sight(&two)), [RouterOp::Remove(new)]);
        assert_eq!(one.rules(), two.rules());
        let harmed = Sight { any: true, intact: None };
        assert_eq!(plan(Some(&one), &harmed), [RouterOp::Load(one)]);
        assert_eq!(plan(None, &harmed), [RouterOp::Delete]);
        assert_eq!(plan(None, &Sight::default()), []);
    }

    #[test]
    fn an_element_that_is_in_one_map_only_is_noticed() {
        let listing = "table bridge weft-transit {\n\tmap marks {\n\t\ttype ether_addr : mark\n\t\t\
            elements = { 0e:57:40:00:00:01 : 0x40000001,\n\t\t\t     0e:57:40:00:00:02 : \
            0x40000002 }\n\t}\n\tmap routers {\n\t\telements = { 0x40000001 : 0e:57:40:00:00:01, \
            0x40000002 : 0e:57:40:00:00:02 }\n\t}\n}\n";
        let (skeleton, routers) = dissect(listing);
        assert_eq!(routers.unwrap().len(), 2);
        assert!(!skeleton.contains("0e:57") && skeleton.contains("type ether_addr : mark"));
        let lacking = listing.replace(", 0x40000002 : 0e:57:40:00:00:02", "");
        assert_eq!(dissect(&lacking).1, None);
        assert_eq!(dissect(&lacking).0, skeleton);
    }
}
