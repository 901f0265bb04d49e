//! The part of our tables that is the same whatever services there are: text, by a pure function.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
};

use sha2::{Digest as _, Sha256};
use weft_model::{Family, MacAddr, Spread};

use crate::{
    set::{Data, Key, Lasting, PARTS, Set, Table},
    shortcut,
    slots::Class,
};

/// Our tables without what comes and goes with services.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Skeleton {
    chains: Vec<Chain>,
    /// Tells skeletons apart; every rule is labelled with it.
    digest: String,
}

/// A chain of the skeleton.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Chain {
    pub(crate) table: Table,
    pub(crate) name: Cow<'static, str>,
    pub(crate) hook: Option<&'static str>,
    pub(crate) rules: Vec<String>,
}

impl Skeleton {
    pub(crate) fn new(gateway_mac: MacAddr, gateways: &BTreeSet<IpAddr>, seed: u32) -> Self {
        let mut chains = vec![refuse()];
        chains.extend(choices(seed));
        chains.extend([dispatch(), requests(), translate(gateways), answers()]);
        chains.extend(shortcut::chains());
        chains.extend(lift(gateway_mac));
        let mut hash = Sha256::new();
        for Chain { table, name, hook, rules } in &chains {
            for text in [table.as_str(), name.as_ref(), hook.unwrap_or_default()] {
                hash.update(text);
            }
            for rule in rules {
                hash.update(rule);
                hash.update([0]);
            }
        }
        let [a, b, c, d, ..]: [u8; 32] = hash.finalize().into();
        Self { chains, digest: format!("{:08x}", u32::from_be_bytes([a, b, c, d])) }
    }

    /// What `nft -f` loads: the sets are made if they are missing, and keep what is in them; the
    /// chains' rules are replaced.
    pub(crate) fn script(&self) -> String {
        let mut script = String::new();
        for table in [Table::Inet, Table::Bridge] {
            let _ = writeln!(script, "table {} {{", table.as_str());
            for set in Set::all().filter(|set| set.table() == table) {
                script += &declaration(set);
            }
            for chain in self.chains_of(table) {
                let hook = chain.hook.map(|hook| format!("\t\t{hook}\n")).unwrap_or_default();
                let _ = writeln!(script, "\tchain {} {{\n{hook}\t}}", chain.name);
            }
            script += "}\n";
            for chain in self.chains_of(table) {
                let _ = writeln!(script, "flush chain {} {}", table.as_str(), chain.name);
            }
            let _ = writeln!(script, "table {} {{", table.as_str());
            for chain in self.chains_of(table) {
                let _ = writeln!(script, "\tchain {} {{", chain.name);
                for (rule, label) in chain.rules.iter().zip(self.labels(chain)) {
                    let _ = writeln!(script, "\t\t{rule} comment \"{label}\"");
                }
                script += "\t}\n";
            }
            script += "}\n";
        }
        script
    }

    /// What removes all of it, and all that is in it.
    pub(crate) fn removal() -> String {
        [Table::Inet, Table::Bridge].map(|t| t.as_str()).iter().fold(
            String::new(),
            |mut script, table| {
                // Declared first, because only a table that is there can be deleted.
                let _ = writeln!(script, "table {table}\ndelete table {table}");
                script
            },
        )
    }

    /// The label of each rule, by table and chain.
    pub(crate) fn labelled(&self) -> BTreeMap<(Table, String), Vec<String>> {
        let labels = |chain: &Chain| {
            ((chain.table, chain.name.clone().into_owned()), self.labels(chain).collect::<Vec<_>>())
        };
        self.chains.iter().map(labels).collect()
    }

    fn labels<'a>(&'a self, chain: &'a Chain) -> impl Iterator<Item = String> + 'a {
        (0..chain.rules.len()).map(|index| format!("weft {} {index}", self.digest))
    }

    fn chains_of(&self, table: Table) -> impl Iterator<Item = &Chain> {
        self.chains.iter().filter(move |chain| chain.table == table)
    }
}

/// Where users' own rules go: made if it is missing, and never touched again.
///
/// Tables of their own would do as well; this one is there so that nobody has to find out at which
/// priorities ours are.
pub(crate) const USER: &str = "\
table inet weft-user {
	chain prerouting {
		type filter hook prerouting priority -160; policy accept;
	}
	chain forward {
		type filter hook forward priority -10; policy accept;
	}
}
";

/// For frontends without a backend: the client shall know at once.
fn refuse() -> Chain {
    let rules =
        ["meta l4proto tcp reject with tcp reset", "reject with icmpx type port-unreachable"];
    Chain {
        table: Table::Inet,
        name: "refuse".into(),
        hook: None,
        rules: rules.map(String::from).into(),
    }
}

/// Sends a connection's first packet to where its backend is chosen. One look-up, however many
/// services.
fn dispatch() -> Chain {
    let mut rules = Vec::new();
    for (ip, n) in FAMILIES {
        let address = format!("{ip} daddr . meta l4proto");
        rules.push(format!("{address} . th dport @port-connections{n} goto ports{n}"));
        rules.push(format!("{address} @address-connections{n} goto addresses{n}"));
    }
    let hook = "type nat hook prerouting priority dstnat; policy accept;";
    Chain { table: Table::Inet, name: "prerouting".into(), hook: Some(hook), rules }
}

/// Chooses a backend, by the tables of all frontends.
fn choices(seed: u32) -> impl Iterator<Item = Chain> {
    let kinds = [
        ("ip", "ports4", "port-keepers4", "port-slots4", " . th dport"),
        ("ip6", "ports6", "port-keepers6", "port-slots6", " . th dport"),
        ("ip", "addresses4", "address-keepers4", "address-slots4", ""),
        ("ip6", "addresses6", "address-keepers6", "address-slots6", ""),
    ];
    kinds.into_iter().flat_map(move |(ip, name, keepers, slots, port)| {
        let frontend = format!("{ip} daddr . meta l4proto{port}");
        let chain = |name: String, rules: Vec<String>| Chain {
            table: Table::Inet,
            name: name.into(),
            hook: None,
            rules,
        };
        let mut chains: Vec<_> = (0..PARTS)
            .map(|part| {
                let rules = Class::all().map(|Class { spread, size, first }| {
                    let slot = match spread {
                        Spread::Hash => format!(
                            "jhash {ip} saddr . th sport mod {size} seed {seed:#x} offset {first}"
                        ),
                        Spread::Random => format!("numgen random mod {size} offset {first}"),
                    };
                    format!("dnat {ip} to {frontend} . {slot} map @{slots}-{part}")
                });
                chain(format!("draw-{name}-{part}"), rules.collect())
            })
            .collect();
        let parts: Vec<_> =
            (0..PARTS).map(|part| format!("{part} : goto draw-{name}-{part}")).collect();
        let part = format!("jhash {frontend} mod {PARTS} seed {seed:#x}");
        let draw = format!("draw-{name}");
        chains.push(chain(draw.clone(), vec![format!("{part} vmap {{ {} }}", parts.join(", "))]));
        let rules = vec![
            format!("{frontend} vmap @{keepers}"),
            format!("jump {draw}"),
            // A transaction may have come between the classes of before and those of after (and,
            // before Linux 6.17, into the middle of a look-up): who finds nothing looks again.
            format!("jump {draw}"),
            "goto refuse".into(),
        ];
        chains.push(chain(name.into(), rules));
        chains
    })
}

/// Lets clients that are their own backend, and those of backends whose hosts say so, appear as the
/// gateway. Before the masquerading of what leaves the network.
fn translate(gateways: &BTreeSet<IpAddr>) -> Chain {
    let mut rules = Vec::new();
    for gateway in gateways {
        let ip = match Family::of(*gateway) {
            Family::V4 => FAMILIES[0],
            Family::V6 => FAMILIES[1],
        };
        let (ip, n) = ip;
        rules.push(format!(
            "ct status dnat {ip} saddr . {ip} daddr @hairpins{n} snat {ip} to {gateway}"
        ));
        let masked = format!("{ip} daddr . meta l4proto . th dport @masked{n}");
        // By this host, or by another one's router: then the connection has its mark.
        for entrance in ["iifname \"up0\"", "iifname \"br0\" ct mark & 0x40000000 != 0"] {
            rules.push(format!("{entrance} {masked} snat {ip} to {gateway}"));
        }
    }
    let hook = "type nat hook postrouting priority 90; policy accept;";
    Chain { table: Table::Inet, name: "postrouting".into(), hook: Some(hook), rules }
}

/// Counts what clients send, as they sent it.
fn requests() -> Chain {
    // Looking at the connection costs less than looking into a set.
    let mut rules = vec!["ct direction reply return".into(), shortcut::IS_COUNTED.into()];
    for (ip, n) in FAMILIES {
        let address = format!("{ip} daddr . meta l4proto");
        rules.push(format!("{address} . th dport @port-requests{n} return"));
        rules.push(format!("{address} @address-requests{n}"));
    }
    let hook = "type filter hook prerouting priority mangle; policy accept;";
    Chain { table: Table::Inet, name: "requests".into(), hook: Some(hook), rules }
}

/// Counts what clients get, as they get it.
fn answers() -> Chain {
    let mut rules = vec!["ct direction original return".into()];
    for (ip, n) in FAMILIES {
        let address = format!("{ip} saddr . meta l4proto");
        rules.push(format!("{address} . th sport @port-answers{n} return"));
        rules.push(format!("{address} @address-answers{n}"));
    }
    let hook = "type filter hook postrouting priority 300; policy accept;";
    Chain { table: Table::Inet, name: "answers".into(), hook: Some(hook), rules }
}

/// Gives the gateway what backends send to this host's clients, which the bridge would hand them
/// as it is: only the gateway knows whom they had asked.
fn lift(gateway_mac: MacAddr) -> Vec<Chain> {
    let mut rules = vec![
        format!("ether daddr {gateway_mac} goto {}", shortcut::REQUESTS),
        // Whoever was sent something by a service has sent something to the gateway before.
        "ether daddr != @clients goto requests".into(),
        shortcut::answered(),
    ];
    for (ip, n) in FAMILIES {
        let address = format!("{ip} saddr . meta l4proto");
        rules.push(format!("{address} . th sport @port-replies{n} goto lift"));
        rules.push(format!("{address} @address-replies{n} goto lift"));
    }
    // What is not the first of a packet's fragments has no port; and all of them must go one way.
    for (ip, n, fragment) in FRAGMENTS {
        rules.push(format!("{fragment} {ip} saddr . meta l4proto @fragments{n} goto lift"));
    }
    rules.push("goto requests".into());
    let hook = "type filter hook prerouting priority -200; policy accept;";
    let table = Table::Bridge;
    let up = vec![format!("ether daddr set {gateway_mac} meta pkttype set host")];
    let mut chains = vec![Chain { table, name: "lift".into(), hook: None, rules: up }];
    chains.extend(lift_requests());
    chains.push(Chain { table, name: "prerouting".into(), hook: Some(hook), rules });
    chains
}

/// Gives the gateway what this host's stations send to a backend itself. Otherwise it would take the
/// answers for those of a connection from the same port to a virtual address, if there is one; now
/// it knows both, and the later one gets another port.
fn lift_requests() -> [Chain; 4] {
    let [v4, v6] = FRAGMENTS.map(|(ip, n, fragment)| {
        let address = format!("{ip} daddr . meta l4proto");
        vec![
            format!("{address} . th dport @port-replies{n} goto lift-request"),
            format!("{address} @address-replies{n} goto lift-request"),
            format!("{fragment} goto lift-request"),
        ]
    });
    // One look-up for whoever is no backend.
    let asked = FAMILIES
        .map(|(ip, n)| format!("{HERE} {ip} daddr . meta l4proto @fragments{n} goto requests{n}"));
    // The answers must go by the gateway as well.
    let mut noted = Vec::from(shortcut::direct());
    noted.extend(["update @clients { ether saddr }".into(), "goto lift".into()]);
    let chain =
        |name, rules| Chain { table: Table::Bridge, name: Cow::Borrowed(name), hook: None, rules };
    [
        chain("lift-request", noted),
        chain("requests4", v4),
        chain("requests6", v6),
        chain("requests", asked.into()),
    ]
}

fn declaration(set: Set) -> String {
    let (ip, address) = match set.family {
        Family::V4 => ("ip", "ipv4_addr"),
        Family::V6 => ("ip6", "ipv6_addr"),
    };
    // A slot is a number like any that is drawn: there is no name for its type.
    let slot = "numgen random mod 2";
    let way = format!("type {address} . inet_service");
    let key = match set.key() {
        Key::AddressProtocolPort => format!("type {address} . inet_proto . inet_service"),
        Key::AddressProtocol => format!("type {address} . inet_proto"),
        Key::AddressAddress => format!("type {address} . {address}"),
        Key::Mac => "type ether_addr".into(),
        Key::Mark => "type mark".into(),
        Key::PortWay => format!("{way} . mark"),
        Key::AddressWay => format!("{way} . mark . inet_service"),
        Key::AnswerWay => format!("{way} . {address} . inet_service"),
        Key::AddressProtocolPortSlot => {
            format!("typeof {ip} daddr . meta l4proto . th dport . {slot} : {ip} daddr . th dport")
        }
        Key::AddressProtocolSlot => {
            format!("typeof {ip} daddr . meta l4proto . {slot} : {ip} daddr")
        }
    };
    let (what, value) = match set.data() {
        None => ("set", ""),
        Some(Data::Slot) => ("map", ""),
        Some(Data::Chain) => ("map", " : verdict"),
        Some(Data::Mark) => ("map", " : mark"),
        Some(Data::Address) => ("map", " : ipv4_addr"),
        Some(Data::Port) => ("map", " : inet_service"),
        Some(Data::Mac) => ("map", " : ether_addr"),
    };
    let counter = if set.is_counted() { "\t\tcounter\n" } else { "" };
    let written = "\t\tsize 65536\n\t\tflags dynamic,timeout\n\t\ttimeout";
    let learnt = match set.learnt() {
        None => String::new(),
        Some(Lasting::Seconds(seconds)) => format!("{written} {seconds}s\n"),
        Some(Lasting::Days(days)) => format!("{written} {days}d\n\t\tgc-interval 1h\n"),
    };
    format!("\t{what} {set} {{\n\t\t{key}{value}\n{learnt}{counter}\t}}\n")
}

const FAMILIES: [(&str, u8); 2] = [("ip", 4), ("ip6", 6)];
/// With what matches a fragment, be it the first.
const FRAGMENTS: [(&str, u8, &str); 2] =
    [("ip", 4, "ip frag-off & 0x3fff != 0"), ("ip6", 6, "exthdr frag exists")];
/// What comes from a station of this host.
const HERE: &str = "iifname != { \"vx0\", \"tap0\" }";

#[cfg(test)]
mod tests {
    use weft_model::NetworkId;

    use super::*;

    fn skeleton(gateways: &[&str]) -> Skeleton {
        let gateways = gateways.iter().map(|ip| ip.parse().unwrap()).collect();
        Skeleton::new(MacAddr::for_gateway(NetworkId::from([1; 16])), &gateways, 1)
    }

    #[test]
    fn the_skeleton_is_the_same_whatever_services_there_are() {
        insta::assert_snapshot!(skeleton(&["10.1.0.254", "fd00:1::fe"]).script());
    }

    #[test]
    fn another_gateway_is_another_skeleton() {
        let labels = |gateways: &[&str]| {
            skeleton(gateways).labelled().into_values().flatten().collect::<BTreeSet<_>>()
        };
        let (one, other) = (labels(&["10.1.0.254"]), labels(&["10.1.0.253"]));
        assert_eq!(one, labels(&["10.1.0.254"]));
        assert!(one.is_disjoint(&other));
    }
}
