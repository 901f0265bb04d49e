//! What a frontend is in the kernel, by pure functions.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use weft_model::{Family, Source};

use crate::{
    Backend, Frontend, Pool,
    expression::{Expressions, Memory, Register, hashed_length, is_drawn},
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
    /// The key that dispatches to the chain.
    pub(crate) entry: Element,
    pub(crate) chain: Chain,
    /// What may be others', too.
    pub(crate) collections: Vec<Collection>,
    pub(crate) elements: BTreeSet<Element>,
}

/// A chain and its rules.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    /// Each rule's expressions. None: the chain is a part of the skeleton.
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
    Slots { family: Family, port: bool, backends: Vec<Target> },
    /// Backends; never changes.
    Members { family: Family, port: bool, backends: BTreeSet<Target> },
    /// Client to backend; the kernel writes it, and forgets a client after that time.
    Memory { family: Family, port: bool, timeout: Duration },
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
        let (chain, collections) = match slots.is_empty() {
            true => (Chain { name: REFUSE.into(), rules: Vec::new() }, Vec::new()),
            false => Choice { frontend, pool, slots, seed }.chain(),
        };
        Self { entry, chain, collections, elements }
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
    fn chain(&self) -> (Chain, Vec<Collection>) {
        let slots = (self.slots.len() > 1).then(|| {
            let shape = Shape::Slots {
                family: self.family(),
                port: self.has_port(),
                backends: self.slots.clone(),
            };
            Collection { name: shape.name(), shape }
        });
        let mut rules = Vec::new();
        let mut collections: Vec<_> = slots.into_iter().collect();
        let slots = collections.first().map(|collection| collection.name.clone());
        if let Some(timeout) = self.pool.affinity.filter(|timeout| !timeout.is_zero()) {
            let (family, port) = (self.family(), self.has_port());
            let backends = self.slots.iter().copied().collect();
            let members = Shape::Members { family, port, backends };
            let members = Collection { name: members.name(), shape: members };
            let memory = Shape::Memory { family, port, timeout };
            let Frontend { ip, protocol, port } = self.frontend;
            let of = format!("{ip}/{protocol}/{port:?}/{}", timeout.as_secs());
            let memory =
                Collection { name: format!("clients-{}", digest(&[of.as_bytes()])), shape: memory };
            rules.extend(self.remembering(&members.name, &memory.name, slots.as_deref()));
            collections.extend([members, memory]);
        }
        let mut last = self.begun();
        self.choose(&mut last, slots.as_deref(), Register::ONE);
        self.send(&mut last, Register::ONE);
        rules.push(last);
        let rules: Vec<Writer> = rules.into_iter().map(|rule| rule.0).collect();
        let Frontend { ip, protocol, port } = self.frontend;
        let of = format!("{FORMAT} {ip}/{protocol}/{port:?}");
        let content: Vec<&[u8]> = std::iter::once(of.as_bytes())
            .chain(rules.iter().map(|rule| rule.0.as_slice()))
            .collect();
        let name = format!("to-{}-{}", self.pool.service, digest(&content));
        (Chain { name, rules }, collections)
    }

    /// Rules for clients that are remembered, for those whose backend has gone, and for new ones.
    fn remembering(&self, members: &str, memory: &str, slots: Option<&str>) -> [Expressions; 3] {
        let (family, client, backend) = (self.family(), Register::ONE, Register::TWO);
        let mut known = self.begun();
        known.source_address(family, client).mapped(memory, client, backend);
        known.contained(members, backend).remember(Memory::Update, memory, client, backend);
        self.send(&mut known, backend);

        let mut orphaned = self.begun();
        orphaned.source_address(family, client);
        self.put(&mut orphaned, backend);
        orphaned.remember(Memory::Delete, memory, client, backend);

        let mut new = self.begun();
        self.choose(&mut new, slots, backend);
        new.source_address(family, client).remember(Memory::Add, memory, client, backend);
        self.send(&mut new, backend);
        [known, orphaned, new]
    }

    fn begun(&self) -> Expressions {
        let mut rule = Expressions::default();
        rule.only(self.family(), self.frontend.protocol);
        rule
    }

    /// Leaves the backend in `to`.
    fn choose(&self, rule: &mut Expressions, slots: Option<&str>, to: Register) {
        let Some(slots) = slots else {
            self.put(rule, to);
            return;
        };
        let modulus = self.slots.len() as u32;
        match is_drawn(self.pool.spread) {
            true => rule.random(Register::ONE, modulus),
            false => {
                let (family, with_port) = (self.family(), self.pool.affinity.is_none());
                rule.source_address(family, Register::TWO);
                if with_port {
                    let address = hashed_length(family, false);
                    rule.source_port(Register::TWO.after(address));
                }
                let input = (Register::TWO, hashed_length(family, with_port));
                rule.hash(input, Register::ONE, modulus, self.seed)
            }
        };
        rule.mapped(slots, Register::ONE, to);
    }

    /// Leaves the first backend in `to`.
    fn put(&self, rule: &mut Expressions, to: Register) {
        let Target { ip, port } = self.slots[0];
        let address = octets(ip);
        rule.value(to, &address);
        if let Some(port) = port {
            rule.value(to.after(address.len() as u32), &port.to_be_bytes());
        }
    }

    fn send(&self, rule: &mut Expressions, backend: Register) {
        let address = hashed_length(self.family(), false);
        let port = self.has_port().then(|| backend.after(address));
        rule.destination(self.family(), backend, port);
    }

    fn family(&self) -> Family {
        Family::of(self.frontend.ip)
    }

    fn has_port(&self) -> bool {
        self.frontend.port.is_some()
    }
}

impl Shape {
    fn name(&self) -> String {
        let bytes: Vec<Vec<u8>> = match self {
            Self::Slots { backends, .. } => backends.iter().map(|target| target.bytes()).collect(),
            Self::Members { backends, .. } => {
                backends.iter().map(|target| target.bytes()).collect()
            }
            Self::Memory { .. } => Vec::new(),
        };
        let bytes: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        match self {
            Self::Slots { .. } => format!("slots-{}", digest(&bytes)),
            Self::Members { .. } => format!("members-{}", digest(&bytes)),
            Self::Memory { .. } => format!("clients-{}", digest(&bytes)),
        }
    }
}

fn digest(parts: &[&[u8]]) -> String {
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
