//! What a frontend is in the kernel, by pure functions.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use weft_model::{Family, Source, Spread};

use crate::{
    Frontend, Pool,
    expression::{Expressions, Register},
    set::{Element, Kind, octets},
    slots::{Target, memory, own, target, targets},
    wire::Writer,
};

/// All that one frontend has in the kernel but its table.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Parts {
    /// Of a frontend that remembers clients.
    pub(crate) keeper: Option<Keeper>,
    /// What may be others', too.
    pub(crate) elements: BTreeSet<Element>,
}

/// What remembers the clients of a frontend.
///
/// Names of chains and of what belongs to one are made of what is in it: what has the name has the
/// content, and a change is something new beside the old, which goes when nothing leads to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Keeper {
    /// The key that leads to the last of the chains.
    pub(crate) entry: Element,
    pub(crate) chains: Vec<Chain>,
    pub(crate) collections: Vec<Collection>,
}

/// A chain and its rules.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    /// Each rule's expressions.
    pub(crate) rules: Vec<Writer>,
}

/// A set or a map that is not in the skeleton.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Collection {
    pub(crate) name: String,
    pub(crate) shape: Shape,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Shape {
    /// Slot to the backend's chain; never changes.
    Chains { slots: Vec<String> },
    /// Clients; the kernel writes it, and forgets a client after that time.
    Clients { family: Family, timeout: Duration },
}

impl Keeper {
    /// The chain that the frontend leads to.
    pub(crate) fn lead(&self) -> &str {
        self.chains.last().map(|chain| chain.name.as_str()).expect("there is a chain of the whole")
    }
}

impl Parts {
    /// Makes the parts of `frontend`. Backends of another family than its own are left out.
    ///
    /// `gateway` tells whether the network has a gateway of that family: only behind one can
    /// sources be translated.
    pub(crate) fn of(frontend: Frontend, pool: &Pool, seed: u32, gateway: bool) -> Self {
        let mut elements: BTreeSet<_> = counters(frontend).into();
        // Those without weight have their old connections still.
        for (_, backend) in own(frontend, pool) {
            let Target { ip, port } = target(frontend, backend);
            let element =
                |kind| Element::new(kind, ip, frontend.protocol, port.unwrap_or_default());
            elements.insert(element(match port {
                Some(_) => Kind::Replies,
                None => Kind::AddressReplies,
            }));
            elements.insert(element(Kind::Fragments));
            if gateway {
                elements.insert(element(Kind::Hairpins));
            }
            if gateway && backend.local && pool.source == Source::Snat && port.is_some() {
                elements.insert(element(Kind::Masked));
            }
        }
        let keeper = memory(pool).and_then(|timeout| {
            let slots = targets(frontend, pool, seed);
            let choice = Choice { frontend, pool, slots, seed };
            (!choice.slots.is_empty()).then(|| choice.remembering(timeout))
        });
        Self { keeper, elements }
    }
}

/// What counts the traffic of a frontend. The first is also what it is known by: what comes to
/// it is looked for there.
pub(crate) fn counters(frontend: Frontend) -> [Element; 3] {
    let Frontend { ip, protocol, port } = frontend;
    let kinds = match port {
        Some(_) => [Kind::PortConnections, Kind::PortRequests, Kind::PortAnswers],
        None => [Kind::AddressConnections, Kind::AddressRequests, Kind::AddressAnswers],
    };
    kinds.map(|kind| Element::new(kind, ip, protocol, port.unwrap_or_default()))
}

/// How a frontend that remembers clients chooses for new ones.
struct Choice<'a> {
    frontend: Frontend,
    pool: &'a Pool,
    /// At least one.
    slots: Vec<Target>,
    seed: u32,
}

impl Choice<'_> {
    /// A set of clients for each backend, and a chain that puts them there. (A map from client to
    /// backend would be one look-up instead of one a backend; nft 1.0 could not print the rules.)
    fn remembering(&self, timeout: Duration) -> Keeper {
        let (family, client) = (self.family(), Register::ONE);
        let mut chains: BTreeMap<Target, Chain> = BTreeMap::new();
        let (mut collections, mut rules) = (Vec::new(), Vec::new());
        for &target in &self.slots {
            if chains.contains_key(&target) {
                continue;
            }
            let Target { ip, port } = target;
            let of = format!("{} {ip} {port:?} {timeout:?}", self.frontend);
            let clients = format!("clients-{}", digest([of.as_bytes()].into_iter()));
            let mut noting = self.begun();
            noting.source_address(family, client).remember(&clients, client);
            self.put(&mut noting, target);
            self.send(&mut noting);
            // If there is no room for further clients.
            let mut passing = self.begun();
            self.put(&mut passing, target);
            self.send(&mut passing);
            let chain = self.chain("at", vec![noting, passing]);

            let mut known = self.begun();
            known.source_address(family, client).contained(&clients, client).goto(&chain.name);
            rules.push(known);
            let shape = Shape::Clients { family, timeout };
            collections.push(Collection { name: clients, shape });
            chains.insert(target, chain);
        }
        let mut new = self.begun();
        match &*self.slots {
            [only] => drop(new.goto(&chains[only].name)),
            slots => {
                let slots: Vec<_> = slots.iter().map(|slot| chains[slot].name.clone()).collect();
                let name = format!("slots-{}", digest(slots.iter().map(|name| name.as_bytes())));
                self.draw(&mut new).dispatched(&name, Register::ONE);
                collections.push(Collection { name, shape: Shape::Chains { slots } });
            }
        }
        rules.push(new);
        let main = self.chain("to", rules);
        let Frontend { ip, protocol, port } = self.frontend;
        let kind = if port.is_some() { Kind::PortKeepers } else { Kind::AddressKeepers };
        Keeper {
            entry: Element::new(kind, ip, protocol, port.unwrap_or_default()),
            chains: chains.into_values().chain([main]).collect(),
            collections,
        }
    }

    /// A chain whose name says what is in it.
    fn chain(&self, prefix: &str, rules: Vec<Expressions>) -> Chain {
        let rules: Vec<Writer> = rules.into_iter().map(|rule| rule.0).collect();
        let of = format!("{FORMAT} {}", self.frontend);
        let content = rules.iter().map(|rule| rule.0.as_slice());
        let content = digest(std::iter::once(of.as_bytes()).chain(content));
        Chain { name: format!("{prefix}-{}-{content}", self.pool.service), rules }
    }

    fn begun(&self) -> Expressions {
        let mut rule = Expressions::default();
        rule.only(self.family(), self.frontend.protocol);
        rule
    }

    /// Leaves the number of a slot in the first register.
    fn draw<'a>(&self, rule: &'a mut Expressions) -> &'a mut Expressions {
        let modulus = self.slots.len() as u32;
        match self.pool.spread {
            Spread::Random => rule.random(Register::ONE, modulus),
            Spread::Hash => {
                let family = self.family();
                rule.source_address(family, Register::TWO);
                let from = (Register::TWO, address_length(family));
                rule.hash(from, Register::ONE, modulus, self.seed)
            }
        }
    }

    /// Leaves `target` where [`send`](Self::send) looks for it.
    fn put(&self, rule: &mut Expressions, Target { ip, port }: Target) {
        rule.value(Register::ONE, &octets(ip));
        if let Some(port) = port {
            rule.value(Register::ONE.after(address_length(self.family())), &port.to_be_bytes());
        }
    }

    fn send(&self, rule: &mut Expressions) {
        let port = self.has_port().then(|| Register::ONE.after(address_length(self.family())));
        rule.destination(self.family(), Register::ONE, port);
    }

    fn family(&self) -> Family {
        Family::of(self.frontend.ip)
    }

    fn has_port(&self) -> bool {
        self.frontend.port.is_some()
    }
}

/// Bytes.
pub(crate) fn address_length(family: Family) -> u32 {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

fn digest<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let [a, b, c, d, e, f, g, h, ..]: [u8; 32] = hash.finalize().into();
    format!("{:016x}", u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}

/// Distinguishes chains of this form from those of another release.
const FORMAT: u32 = 2;
