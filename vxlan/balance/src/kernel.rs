//! Our tables in one namespace: what is there, and how it is changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use weft_model::Family;
use weft_vxlan::{Namespace, load_rules};

use crate::{
    error::BalanceError,
    expression::{self, LIST_ELEMENT},
    netfilter::{NFTABLES, NLM_F_APPEND, NLM_F_CREATE, Netfilter, Request},
    parts::{Chain, Collection, Shape, address_length},
    set::{Element, Set, Table},
    skeleton::{Skeleton, USER},
    wire::{self, Writer, attribute, attributes, nested},
};

/// What of our tables is in a namespace.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Actual {
    /// Every chain's rules, by their labels; a rule that has none is somebody else's.
    pub(crate) chains: BTreeMap<(Table, String), Vec<Option<String>>>,
    /// Sets and maps that are not in the skeleton.
    pub(crate) collections: BTreeSet<(Table, String)>,
    pub(crate) sets: BTreeSet<Set>,
    /// With the chains that they lead to.
    pub(crate) elements: BTreeMap<Element, Option<String>>,
}

/// One transaction's changes, in the order in which they are made.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Change {
    pub(crate) new_collections: Vec<Collection>,
    pub(crate) new_chains: Vec<Chain>,
    /// Those whose rules somebody has changed.
    pub(crate) mended_chains: Vec<Chain>,
    pub(crate) gone_elements: Vec<Element>,
    /// With the chains that they lead to.
    pub(crate) new_elements: Vec<(Element, Option<String>)>,
    pub(crate) gone_chains: Vec<(Table, String)>,
    pub(crate) gone_collections: Vec<(Table, String)>,
}

/// What a frontend's traffic has come to.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Tally {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

/// An element as the kernel tells of it.
struct Found {
    key: Vec<u8>,
    chain: Option<String>,
    tally: Tally,
}

#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) namespace: Namespace,
    pub(crate) netfilter: Netfilter,
}

impl Change {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Kernel {
    pub(crate) fn open(namespace: Namespace) -> Result<Self, BalanceError> {
        let netfilter = Netfilter::open(&namespace)?;
        Ok(Self { namespace, netfilter })
    }

    /// Makes or mends what does not depend on services.
    pub(crate) fn lay(&mut self, skeleton: &Skeleton) -> Result<(), BalanceError> {
        let script = skeleton.script() + USER;
        if load_rules(&self.namespace, &script).is_ok() {
            return Ok(());
        }
        // What is there cannot become ours by additions: a set or a hook of another kind.
        self.lay_anew(skeleton)
    }

    /// As [`lay`](Self::lay), but nothing stays of what is there.
    pub(crate) fn lay_anew(&mut self, skeleton: &Skeleton) -> Result<(), BalanceError> {
        let script = Skeleton::removal() + &skeleton.script() + USER;
        Ok(load_rules(&self.namespace, &script)?)
    }

    /// Removes all of ours.
    pub(crate) fn clear(&mut self) -> Result<(), BalanceError> {
        Ok(load_rules(&self.namespace, &Skeleton::removal())?)
    }

    /// Whether any of our tables is there.
    pub(crate) fn has_tables(&mut self) -> Result<bool, BalanceError> {
        Ok(!self.tables()?.is_empty())
    }

    fn tables(&mut self) -> Result<BTreeSet<Table>, BalanceError> {
        let tables = self.netfilter.dump(&request(GET_TABLE, None, Writer::default()))?;
        let ours = tables.iter().filter_map(|answer| {
            let name = wire::text(attribute(&answer.body, TABLE)?);
            let table = [Table::Inet, Table::Bridge].into_iter();
            let mut table = table.filter(|table| table.family() == answer.family);
            table.next().filter(|_| name == Table::NAME)
        });
        Ok(ours.collect())
    }

    pub(crate) fn read(&mut self) -> Result<Actual, BalanceError> {
        let mut actual = Actual::default();
        for table in self.tables()? {
            self.read_chains(table, &mut actual)?;
            self.read_sets(table, &mut actual)?;
        }
        Ok(actual)
    }

    fn read_chains(&mut self, table: Table, actual: &mut Actual) -> Result<(), BalanceError> {
        let chains = self.netfilter.dump(&request(GET_CHAIN, Some(table), Writer::default()))?;
        for answer in chains {
            let name = |kind| attribute(&answer.body, kind).map(wire::text);
            if let (Some(Table::NAME), Some(name)) = (name(TABLE).as_deref(), name(CHAIN_NAME)) {
                actual.chains.insert((table, name), Vec::new());
            }
        }
        let mut body = Writer::default();
        body.text(TABLE, Table::NAME);
        for answer in self.netfilter.dump(&request(GET_RULE, Some(table), body))? {
            let Some(chain) = attribute(&answer.body, RULE_CHAIN).map(wire::text) else { continue };
            let label = attribute(&answer.body, RULE_USERDATA).and_then(label);
            actual.chains.entry((table, chain)).or_default().push(label);
        }
        Ok(())
    }

    fn read_sets(&mut self, table: Table, actual: &mut Actual) -> Result<(), BalanceError> {
        let mut body = Writer::default();
        body.text(TABLE, Table::NAME);
        for answer in self.netfilter.dump(&request(GET_SET, Some(table), body))? {
            let flags = attribute(&answer.body, SET_FLAGS).and_then(wire::number).unwrap_or(0);
            let Some(name) = attribute(&answer.body, SET_NAME).map(wire::text) else { continue };
            match Set::named(&name, table) {
                Some(set) => {
                    actual.sets.insert(set);
                    for Found { key, chain, .. } in self.read_elements(set)? {
                        actual.elements.insert(Element { set, key }, chain);
                    }
                }
                // Those that a rule brings along go with the rule.
                None if flags & SET_ANONYMOUS != 0 => {}
                None => {
                    actual.collections.insert((table, name));
                }
            }
        }
        Ok(())
    }

    fn read_elements(&mut self, set: Set) -> Result<Vec<Found>, BalanceError> {
        let mut body = Writer::default();
        body.text(TABLE, Table::NAME);
        body.text(ELEMENTS_SET, &set.to_string());
        let answers = self.netfilter.dump(&request(GET_ELEMENT, Some(set.table()), body))?;
        let mut found = Vec::new();
        for answer in answers {
            let list = attribute(&answer.body, ELEMENTS_LIST).unwrap_or_default();
            found.extend(attributes(list).filter_map(|(_, element)| {
                let key = nested(element, &[ELEMENT_KEY, expression::DATA_VALUE])?.to_vec();
                let chain = nested(element, &[ELEMENT_DATA, 2, 2]).map(wire::text);
                Some(Found { key, chain, tally: tally(element) })
            }));
        }
        Ok(found)
    }

    /// What the elements of a set have counted.
    pub(crate) fn tallies(&mut self, set: Set) -> Result<BTreeMap<Vec<u8>, Tally>, BalanceError> {
        let elements = self.read_elements(set)?;
        Ok(elements.into_iter().map(|found| (found.key, found.tally)).collect())
    }

    /// Makes `change` one transaction, unless it is a very large one: then what is new comes in
    /// several, each of them whole.
    pub(crate) fn apply(&mut self, change: &Change) -> Result<(), BalanceError> {
        let mut requests: Vec<_> = change.new_collections.iter().map(make_collection).collect();
        requests.extend(change.new_chains.iter().map(make_chain));
        // What leads to chains needs them; what is in constant maps comes before the rules that
        // use it.
        requests.extend(change.new_collections.iter().flat_map(fill_collection));
        requests
            .extend(change.mended_chains.iter().map(|chain| empty_chain(Table::Inet, &chain.name)));
        let chains = change.new_chains.iter().chain(&change.mended_chains);
        requests.extend(chains.flat_map(fill_chain));
        requests.extend(change_elements(DELETE_ELEMENT, 0, &change.gone_elements, |_| None));
        let new: Vec<_> = change.new_elements.iter().map(|(element, _)| element.clone()).collect();
        let leads: BTreeMap<_, _> = change
            .new_elements
            .iter()
            .filter_map(|(element, chain)| Some((element, chain.as_deref()?)))
            .collect();
        requests.extend(change_elements(NEW_ELEMENT, NLM_F_CREATE, &new, |element| {
            leads.get(element).copied()
        }));
        // In the opposite order.
        let gone = || change.gone_chains.iter();
        requests.extend(gone().map(|(table, name)| empty_chain(*table, name)));
        requests.extend(change.gone_collections.iter().map(|(table, name)| {
            let mut body = Writer::default();
            body.text(TABLE, Table::NAME);
            body.text(SET_NAME, name);
            request(DELETE_SET, Some(*table), body)
        }));
        requests.extend(gone().map(|(table, name)| {
            let mut body = Writer::default();
            body.text(TABLE, Table::NAME);
            body.text(CHAIN_NAME, name);
            request(DELETE_CHAIN, Some(*table), body)
        }));
        Ok(self.netfilter.commit(&requests)?)
    }
}

/// The label of rule number `index` of a chain whose name says what is in it.
pub(crate) fn rule_label(chain: &str, index: usize) -> String {
    let digest = chain.rsplit('-').next().unwrap_or(chain);
    format!("weft {digest} {index}")
}

fn make_chain(chain: &Chain) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(CHAIN_NAME, &chain.name);
    request(NEW_CHAIN, Some(Table::Inet), body).with(NLM_F_CREATE)
}

fn fill_chain(chain: &Chain) -> impl Iterator<Item = Request> {
    chain.rules.iter().enumerate().map(|(index, expressions)| {
        let mut body = Writer::default();
        body.text(TABLE, Table::NAME);
        body.text(RULE_CHAIN, &chain.name);
        body.nest(RULE_EXPRESSIONS, |body| body.0.extend(&expressions.0));
        let label = rule_label(&chain.name, index);
        // The form of comments in nft's user data.
        let mut comment = vec![0, label.len() as u8 + 1];
        comment.extend(label.as_bytes());
        comment.push(0);
        body.bytes(RULE_USERDATA, &comment);
        request(NEW_RULE, Some(Table::Inet), body).with(NLM_F_CREATE | NLM_F_APPEND)
    })
}

fn empty_chain(table: Table, name: &str) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(RULE_CHAIN, name);
    request(DELETE_RULE, Some(table), body)
}

fn make_collection(Collection { name, shape }: &Collection) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(SET_NAME, name);
    // The kernel wants one; it is of no use.
    body.number(SET_ID, 1);
    let size = match shape {
        Shape::Backends { family, port, slots } => {
            body.number(SET_FLAGS, SET_MAP | SET_CONSTANT);
            body.number(SET_KEY_TYPE, TYPE_INTEGER);
            body.number(SET_KEY_LENGTH, 4);
            let (address, length) = (address_type(*family), address_length(*family));
            let (target, length) = match port {
                true => (address << TYPE_BITS | TYPE_PORT, length + 4),
                false => (address, length),
            };
            body.number(SET_DATA_TYPE, target);
            body.number(SET_DATA_LENGTH, length);
            slots.len() as u32
        }
        Shape::Chains { slots } => {
            body.number(SET_FLAGS, SET_MAP | SET_CONSTANT);
            body.number(SET_KEY_TYPE, TYPE_INTEGER);
            body.number(SET_KEY_LENGTH, 4);
            body.number(SET_DATA_TYPE, TYPE_VERDICT);
            slots.len() as u32
        }
        Shape::Clients { family, timeout } => {
            body.number(SET_FLAGS, SET_TIMEOUT | SET_DYNAMIC);
            body.number(SET_KEY_TYPE, address_type(*family));
            body.number(SET_KEY_LENGTH, address_length(*family));
            body.bytes(SET_TIMEOUT_MS, &milliseconds(*timeout).to_be_bytes());
            MOST_CLIENTS
        }
    };
    body.nest(SET_DESCRIPTION, |description| description.number(1, size));
    request(NEW_SET, Some(Table::Inet), body).with(NLM_F_CREATE)
}

fn fill_collection(Collection { name, shape }: &Collection) -> Vec<Request> {
    let write = |slot: u32, element: &mut Writer| match shape {
        Shape::Backends { slots, .. } => {
            let target = slots[slot as usize].bytes();
            element.nest(ELEMENT_DATA, |data| data.bytes(expression::DATA_VALUE, &target));
        }
        Shape::Chains { slots } => {
            element.nest(ELEMENT_DATA, |data| expression::goto(data, &slots[slot as usize]));
        }
        Shape::Clients { .. } => {}
    };
    let count = match shape {
        Shape::Backends { slots, .. } => slots.len(),
        Shape::Chains { slots } => slots.len(),
        Shape::Clients { .. } => 0,
    };
    let slots: Vec<u32> = (0..count as u32).collect();
    let requests = slots.chunks(ELEMENTS_EACH).map(|chunk| {
        let mut body = Writer::default();
        body.text(TABLE, Table::NAME);
        body.text(ELEMENTS_SET, name);
        body.nest(ELEMENTS_LIST, |list| {
            for slot in chunk {
                list.nest(LIST_ELEMENT, |element| {
                    // Numbers that the kernel computes are in its own byte order.
                    write_key(element, &slot.to_ne_bytes());
                    write(*slot, element);
                });
            }
        });
        request(NEW_ELEMENT, Some(Table::Inet), body).with(NLM_F_CREATE)
    });
    requests.collect()
}

fn address_type(family: Family) -> u32 {
    match family {
        Family::V4 => TYPE_IPV4,
        Family::V6 => TYPE_IPV6,
    }
}

fn write_key(element: &mut Writer, key: &[u8]) {
    element.nest(ELEMENT_KEY, |data| data.bytes(expression::DATA_VALUE, key));
}

/// Requests to add or delete elements; those of one set together.
fn change_elements<'a>(
    kind: u16,
    flags: u16,
    elements: &'a [Element],
    lead: impl Fn(&Element) -> Option<&'a str>,
) -> Vec<Request> {
    let mut by_set: BTreeMap<Set, Vec<&Element>> = BTreeMap::new();
    for element in elements {
        by_set.entry(element.set).or_default().push(element);
    }
    let mut requests = Vec::new();
    for (set, elements) in by_set {
        for chunk in elements.chunks(ELEMENTS_EACH) {
            let mut body = Writer::default();
            body.text(TABLE, Table::NAME);
            body.text(ELEMENTS_SET, &set.to_string());
            body.nest(ELEMENTS_LIST, |list| {
                for element in chunk {
                    list.nest(LIST_ELEMENT, |body| {
                        write_key(body, &element.key);
                        if let Some(chain) = lead(element) {
                            body.nest(ELEMENT_DATA, |data| expression::goto(data, chain));
                        }
                    });
                }
            });
            requests.push(request(kind, Some(set.table()), body).with(flags));
        }
    }
    requests
}

fn request(kind: u16, table: Option<Table>, body: Writer) -> Request {
    let family = table.map(Table::family).unwrap_or_default();
    Request { kind: NFTABLES << 8 | kind, flags: 0, family, body }
}

impl Request {
    fn with(self, flags: u16) -> Self {
        Self { flags, ..self }
    }
}

/// The comment in a rule's user data.
fn label(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(wire::text(value));
        }
        data = &rest[usize::from(*length)..];
    }
    None
}

/// The counter of an element.
fn tally(element: &[u8]) -> Tally {
    // One expression; or a list of them, from some kernel on.
    let counter = nested(element, &[ELEMENT_EXPRESSION, 2])
        .or_else(|| nested(element, &[ELEMENT_EXPRESSIONS, LIST_ELEMENT, 2]));
    let count = |kind| counter.and_then(|data| attribute(data, kind)).and_then(wire::long);
    Tally { bytes: count(1).unwrap_or_default(), packets: count(2).unwrap_or_default() }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// As many as fit into one attribute, whatever they are.
const ELEMENTS_EACH: usize = 256;
const MOST_CLIENTS: u32 = 65_536;

/// `include/uapi/linux/netfilter/nf_tables.h`.
const GET_TABLE: u16 = 1;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const GET_SET: u16 = 10;
const DELETE_SET: u16 = 11;
const NEW_ELEMENT: u16 = 12;
const GET_ELEMENT: u16 = 13;
const DELETE_ELEMENT: u16 = 14;
/// The table's name, in every message.
const TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_DATA_TYPE: u16 = 6;
const SET_DATA_LENGTH: u16 = 7;
const SET_DESCRIPTION: u16 = 9;
const SET_ID: u16 = 10;
const SET_TIMEOUT_MS: u16 = 11;
const SET_ANONYMOUS: u32 = 1;
const SET_CONSTANT: u32 = 2;
const SET_MAP: u32 = 8;
const SET_TIMEOUT: u32 = 0x10;
const SET_DYNAMIC: u32 = 0x20;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS_LIST: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_EXPRESSION: u16 = 7;
const ELEMENT_EXPRESSIONS: u16 = 11;
/// `NFT_DATA_VERDICT`.
const TYPE_VERDICT: u32 = 0xffff_ff00;
/// nft's own numbers for types, by which it prints keys and values.
const TYPE_INTEGER: u32 = 4;
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;
const TYPE_PORT: u32 = 13;
const TYPE_BITS: u32 = 6;
