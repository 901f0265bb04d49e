//! What a frontend is in the kernel, by pure functions.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use weft_model::{Family, Source, Spread};

use crate::{
    Backend, Frontend, Pool,
    expression::{Expressions, Register},
    maglev::maglev,
    set::{Element, Kind, octets},
    wire::Writer,
};

/// All that one frontend has in the kernel.
///
/// Names of chains and of what belongs to one are made of what is in it: what has the name has the
/// content, and a change is something new beside the old, which goes when nothing leads to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Parts {
    /// The key that dispatches to a chain, and the chain's name.
    pub(crate) entry: Element,
    pub(crate) lead: String,
    /// None if the frontend leads to a chain of the skeleton.
    pub(crate) chains: Vec<Chain>,
    /// What may be others', too.
    pub(crate) collections: Vec<Collection>,
    pub(crate) elements: BTreeSet<Element>,
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
    /// Slot to backend; never changes.
    Backends { family: Family, port: bool, slots: Vec<Target> },
    /// Slot to the backend's chain; never changes.
    Chains { slots: Vec<String> },
    /// Clients; the kernel writes it, and forgets a client after that time.
    Clients { family: Family, timeout: Duration },
}

/// Where a connection is sent; the port that it has if there is none.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Target {
    pub(crate) ip: IpAddr,
    pub(crate) port: Option<u16>,
}

impl Target {
    /// Its bytes as data of a map.
    pub(crate) fn bytes(self) -> Vec<u8> {
        let mut bytes = octets(self.ip);
        if let Some(port) = self.port {
            bytes.extend(port.to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes
    }
}

impl Parts {
    /// Makes the parts of `frontend`. Backends of another family than its own are left out.
    ///
    /// `gateway` tells whether the network has a gateway of that family: only behind one can
    /// sources be translated.
    pub(crate) fn of(frontend: Frontend, pool: &Pool, seed: u32, gateway: bool) -> Self {
        let Frontend { ip, protocol, port } = frontend;
        let family = Family::of(ip);
        let weights: BTreeMap<_, _> = pool
            .backends
            .iter()
            .filter(|(_, backend)| Family::of(backend.ip) == family)
            .map(|(&id, backend)| (id, backend.weight))
            .collect();
        let slots: Vec<Target> =
            maglev(&weights, seed).iter().map(|id| target(frontend, &pool.backends[id])).collect();

        let kind = |with: Kind, without: Kind| if port.is_some() { with } else { without };
        let frontend_element = |kind| Element::new(kind, ip, protocol, port.unwrap_or_default());
        let entry = frontend_element(kind(Kind::Ports, Kind::Addresses));
        let mut elements: BTreeSet<_> = [
            kind(Kind::PortConnections, Kind::AddressConnections),
            kind(Kind::PortRequests, Kind::AddressRequests),
            kind(Kind::PortAnswers, Kind::AddressAnswers),
        ]
        .map(frontend_element)
        .into();
        // Those without weight have their old connections still.
        for backend in weights.keys().map(|id| &pool.backends[id]) {
            let Target { ip, port } = target(frontend, backend);
            let element = |kind| Element::new(kind, ip, protocol, port.unwrap_or_default());
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
        let (chains, collections) = match slots.is_empty() {
            true => (Vec::new(), Vec::new()),
            false => Choice { frontend, pool, slots, seed }.parts(),
        };
        let lead = chains.last().map_or_else(|| REFUSE.into(), |chain: &Chain| chain.name.clone());
        Self { entry, lead, chains, collections, elements }
    }
}

fn target(frontend: Frontend, backend: &Backend) -> Target {
    // Where every port is translated, every port is kept.
    let port = frontend.port.map(|port| backend.port.unwrap_or(port));
    Target { ip: backend.ip, port }
}

/// How a frontend's chain chooses.
struct Choice<'a> {
    frontend: Frontend,
    pool: &'a Pool,
    /// At least one.
    slots: Vec<Target>,
    seed: u32,
}

impl Choice<'_> {
    /// The chains, the one that the frontend leads to last; and what they use.
    fn parts(&self) -> (Vec<Chain>, Vec<Collection>) {
        match self.pool.affinity.filter(|timeout| !timeout.is_zero()) {
            Some(timeout) => self.remembering(timeout),
            None => self.forgetful(),
        }
    }

    fn forgetful(&self) -> (Vec<Chain>, Vec<Collection>) {
        let mut rule = self.begun();
        let mut collections = Vec::new();
        match *self.slots {
            [only] => self.put(&mut rule, only),
            _ => {
                let slots = self.slots.clone();
                let content: Vec<_> = slots.iter().map(|target| target.bytes()).collect();
                let name = format!("slots-{}", digest(content.iter().map(Vec::as_slice)));
                self.draw(&mut rule).mapped(&name, Register::ONE, Register::ONE);
                let (family, port) = (self.family(), self.has_port());
                let shape = Shape::Backends { family, port, slots };
                collections.push(Collection { name, shape });
            }
        }
        self.send(&mut rule);
        (vec![self.chain("to", vec![rule])], collections)
    }

    /// A set of clients for each backend, and a chain that puts them there. (A map from client to
    /// backend would be one look-up instead of one a backend; nft 1.0 could not print the rules.)
    fn remembering(&self, timeout: Duration) -> (Vec<Chain>, Vec<Collection>) {
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
        (chains.into_values().chain([main]).collect(), collections)
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
                let (family, with_port) = (self.family(), self.pool.affinity.is_none());
                rule.source_address(family, Register::TWO);
                if with_port {
                    rule.source_port(Register::TWO.after(address_length(family)));
                }
                let length = address_length(family) + if with_port { 4 } else { 0 };
                rule.hash((Register::TWO, length), Register::ONE, modulus, self.seed)
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

/// The chain that refuses connections.
pub(crate) const REFUSE: &str = "refuse";
/// Distinguishes chains of this form from those of another release.
const FORMAT: u32 = 1;
