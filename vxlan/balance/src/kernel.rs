//! Our tables in one namespace: what is there, and how it is changed.

use std::collections::{BTreeMap, BTreeSet};

use weft_vxlan::{Namespace, load_rules};

use crate::{
    Frontend,
    error::BalanceError,
    expression::{self, LIST_ELEMENT},
    messages::{
        CHAIN_NAME, DELETE_ELEMENT, ELEMENT_DATA, ELEMENT_EXPRESSION, ELEMENT_EXPRESSIONS,
        ELEMENT_KEY, ELEMENTS_LIST, ELEMENTS_SET, GENERATION, GET_CHAIN, GET_ELEMENT,
        GET_GENERATION, GET_RULE, GET_SET, GET_TABLE, Item, NEW_ELEMENT, RULE_CHAIN, RULE_USERDATA,
        SET_ANONYMOUS, SET_FLAGS, SET_NAME, TABLE, Value, change_elements, drop_chain,
        drop_collection, empty_chain, fill_chain, fill_collection, make_chain, make_collection,
        request,
    },
    netfilter::{Netfilter, Request},
    parts::{Chain, Collection, counters},
    set::{Element, Lasting, Set, Table},
    skeleton::{Skeleton, USER},
    slots::{self, Slots, Turnover},
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
    /// With the chains that they lead to. Of tables, only what is nobody's slot.
    pub(crate) elements: BTreeMap<Element, Option<String>>,
    pub(crate) slots: BTreeMap<Frontend, Slots>,
}

/// Changes, in the order in which they are made.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Change {
    pub(crate) new_collections: Vec<Collection>,
    pub(crate) new_chains: Vec<Chain>,
    /// Those whose rules somebody has changed.
    pub(crate) mended_chains: Vec<Chain>,
    pub(crate) gone_elements: Vec<Element>,
    /// With the chains that they lead to.
    pub(crate) new_elements: Vec<(Element, Option<String>)>,
    pub(crate) turnovers: Vec<Turnover>,
    pub(crate) gone_chains: Vec<(Table, String)>,
    pub(crate) gone_collections: Vec<(Table, String)>,
    /// What all of that does away with.
    pub(crate) gone_frontends: Vec<Frontend>,
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
    data: Vec<u8>,
    chain: Option<String>,
    tally: Tally,
}

#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) namespace: Namespace,
    pub(crate) netfilter: Netfilter,
    /// By which the tables of frontends are parted.
    seed: u32,
    /// How many transactions this one has made.
    pub(crate) commits: u32,
}

impl Change {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Kernel {
    pub(crate) fn open(namespace: Namespace, seed: u32) -> Result<Self, BalanceError> {
        let netfilter = Netfilter::open(&namespace)?;
        Ok(Self { namespace, netfilter, seed, commits: 0 })
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

    /// The number of the last transaction in the namespace, whoever made it.
    pub(crate) fn generation(&mut self) -> Result<u32, BalanceError> {
        let answer = self.netfilter.ask(&request(GET_GENERATION, None, Writer::default()))?;
        // Zero is the number of none.
        Ok(attribute(&answer.body, GENERATION).and_then(wire::number).unwrap_or_default())
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
        let sets = Set::named(table);
        for answer in self.netfilter.dump(&request(GET_SET, Some(table), body))? {
            let flags = attribute(&answer.body, SET_FLAGS).and_then(wire::number).unwrap_or(0);
            let Some(name) = attribute(&answer.body, SET_NAME).map(wire::text) else { continue };
            match sets.get(&name).copied() {
                Some(set) => {
                    actual.sets.insert(set);
                    if set.has_slots() {
                        self.read_slots(set, actual)?;
                    } else if !matches!(set.learnt(), Some(Lasting::Seconds(_))) {
                        for Found { key, data, chain, .. } in self.read_elements(set)? {
                            actual.elements.insert(Element { set, key, data }, chain);
                        }
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
        let gather = |found: &mut Vec<Found>, body: &[u8]| {
            found.extend(elements(body).filter_map(|element| {
                let key = nested(element, &[ELEMENT_KEY, expression::DATA_VALUE])?.to_vec();
                let chain = nested(element, &[ELEMENT_DATA, 2, 2]).map(wire::text);
                let data = nested(element, &[ELEMENT_DATA, expression::DATA_VALUE]);
                let data = data.unwrap_or_default().to_vec();
                Some(Found { key, data, chain, tally: tally(element) })
            }));
        };
        Ok(self.netfilter.gather(&all_of(set), gather)?)
    }

    fn read_slots(&mut self, set: Set, actual: &mut Actual) -> Result<(), BalanceError> {
        // There may be a million: nothing is kept but what is in them.
        let seed = self.seed;
        type Read = (BTreeMap<Frontend, Slots>, Vec<Vec<u8>>);
        let gather = |(slots, strange): &mut Read, body: &[u8]| {
            for element in elements(body) {
                let part = |kind| nested(element, &[kind, expression::DATA_VALUE]);
                let Some(key) = part(ELEMENT_KEY) else { continue };
                match slots::parse(set, key, part(ELEMENT_DATA).unwrap_or_default()) {
                    Some((frontend, slot, target)) if slots::base(frontend, seed).set == set => {
                        slots.entry(frontend).or_default().push((slot, target));
                    }
                    _ => strange.push(key.to_vec()),
                }
            }
        };
        let (slots, strange) = self.netfilter.gather(&all_of(set), gather)?;
        actual
            .elements
            .extend(strange.into_iter().map(|key| (Element { set, key, data: Vec::new() }, None)));
        actual.slots.extend(slots.into_iter().map(|(frontend, mut slots)| {
            slots.sort_unstable();
            (frontend, slots)
        }));
        Ok(())
    }

    /// What the elements of a set have counted.
    pub(crate) fn tallies(&mut self, set: Set) -> Result<BTreeMap<Vec<u8>, Tally>, BalanceError> {
        let elements = self.read_elements(set)?;
        Ok(elements.into_iter().map(|found| (found.key, found.tally)).collect())
    }

    /// Makes `change` one transaction, unless it is a very large one: then the tables of some
    /// frontends come in one, and those of others in the next.
    pub(crate) fn apply(&mut self, change: &Change) -> Result<(), BalanceError> {
        let mut batch = Batch::default();
        // What leads to chains needs them; what is in constant maps comes before the rules that
        // use it.
        batch.requests.extend(change.new_collections.iter().map(make_collection));
        batch.requests.extend(change.new_chains.iter().map(make_chain));
        batch.requests.extend(change.new_collections.iter().flat_map(fill_collection));
        let mended = change.mended_chains.iter();
        batch.requests.extend(mended.map(|chain| empty_chain(Table::Inet, &chain.name)));
        let chains = change.new_chains.iter().chain(&change.mended_chains);
        batch.requests.extend(chains.flat_map(fill_chain));

        // A frontend is found as soon as it counts: its table is there by then.
        let (mut heads, other): (BTreeMap<_, _>, BTreeMap<_, _>) =
            edits(change).into_iter().partition(|((set, _), edit)| set.is_head() && !edit.gone);
        self.edit(&mut batch, other)?;
        for turnovers in change.turnovers.chunks(TABLES_EACH) {
            self.turn_over(&mut batch, turnovers)?;
            let frontends = turnovers.iter().map(|turnover| counters(turnover.frontend));
            let now = frontends.filter_map(|[head, ..]| heads.remove_entry(&(head.set, head.key)));
            self.edit(&mut batch, now.collect())?;
        }
        self.edit(&mut batch, heads)?;

        // In the opposite order.
        let gone = || change.gone_chains.iter();
        batch.requests.extend(gone().map(|(table, name)| empty_chain(*table, name)));
        let collections = change.gone_collections.iter();
        batch.requests.extend(collections.map(|(table, name)| drop_collection(*table, name)));
        batch.requests.extend(gone().map(|(table, name)| drop_chain(*table, name)));
        self.commit(&mut batch)
    }

    /// Replaces slots, those of a frontend together.
    fn turn_over(&mut self, batch: &mut Batch, turnovers: &[Turnover]) -> Result<(), BalanceError> {
        let (mut gone, mut new) = (Items::new(), Items::new());
        for turnover in turnovers {
            let Element { set, key, .. } = slots::base(turnover.frontend, self.seed);
            let key = |slot: u32| [key.as_slice(), &slots::tail(slot)].concat();
            let items = turnover.gone.iter().map(|slot| (key(*slot), Value::None));
            gone.entry(set).or_default().extend(items);
            let items = turnover.new.iter().map(|(slot, to)| (key(*slot), Value::Target(*to)));
            new.entry(set).or_default().extend(items);
        }
        self.add(batch, &[(DELETE_ELEMENT, gone), (NEW_ELEMENT, new)])
    }

    fn edit(
        &mut self,
        batch: &mut Batch,
        edits: BTreeMap<Place, Edit<'_>>,
    ) -> Result<(), BalanceError> {
        let edits: Vec<_> = edits.into_iter().collect();
        for edits in edits.chunks(AT_ONCE) {
            let (mut gone, mut new) = (Items::new(), Items::new());
            for ((set, key), edit) in edits {
                if edit.gone {
                    gone.entry(*set).or_default().push((key.clone(), Value::None));
                }
                if let Some(value) = &edit.new {
                    new.entry(*set).or_default().push((key.clone(), value.clone()));
                }
            }
            self.add(batch, &[(DELETE_ELEMENT, gone), (NEW_ELEMENT, new)])?;
        }
        Ok(())
    }

    fn add(&mut self, batch: &mut Batch, steps: &[(u16, Items<'_>)]) -> Result<(), BalanceError> {
        let elements: usize = steps.iter().flat_map(|(_, sets)| sets.values()).map(Vec::len).sum();
        if batch.elements > 0 && batch.elements + elements > AT_ONCE {
            self.commit(batch)?;
        }
        batch.elements += elements;
        for (kind, sets) in steps {
            for (set, items) in sets {
                batch.requests.extend(change_elements(*kind, set.table(), &set.to_string(), items));
            }
        }
        Ok(())
    }

    fn commit(&mut self, batch: &mut Batch) -> Result<(), BalanceError> {
        let Batch { requests, .. } = std::mem::take(batch);
        if !requests.is_empty() {
            self.netfilter.commit(&requests)?;
            self.commits = self.commits.wrapping_add(1);
        }
        Ok(())
    }
}

/// The next transaction.
#[derive(Default)]
struct Batch {
    requests: Vec<Request>,
    /// How many are made and deleted in it.
    elements: usize,
}

type Items<'a> = BTreeMap<Set, Vec<Item<'a>>>;

/// A key of a set.
type Place = (Set, Vec<u8>);

/// What is done to one element.
#[derive(Default)]
struct Edit<'a> {
    gone: bool,
    new: Option<Value<'a>>,
}

fn edits(change: &Change) -> BTreeMap<Place, Edit<'_>> {
    let mut edits: BTreeMap<_, Edit<'_>> = BTreeMap::new();
    for Element { set, key, .. } in &change.gone_elements {
        edits.entry((*set, key.clone())).or_default().gone = true;
    }
    for (Element { set, key, data }, lead) in &change.new_elements {
        let value = match lead {
            Some(chain) => Value::Lead(chain),
            None if data.is_empty() => Value::None,
            None => Value::Data(data),
        };
        edits.entry((*set, key.clone())).or_default().new = Some(value);
    }
    edits
}

fn all_of(set: Set) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(ELEMENTS_SET, &set.to_string());
    request(GET_ELEMENT, Some(set.table()), body)
}

/// The elements in one answer of the kernel.
fn elements(body: &[u8]) -> impl Iterator<Item = &[u8]> {
    let list = attribute(body, ELEMENTS_LIST).unwrap_or_default();
    attributes(list).map(|(_, element)| element)
}

/// The label of rule number `index` of a chain whose name says what is in it.
pub(crate) fn rule_label(chain: &str, index: usize) -> String {
    let digest = chain.rsplit('-').next().unwrap_or(chain);
    format!("weft {digest} {index}")
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

/// How many elements are changed in one transaction. For each of them the kernel keeps a message of
/// 4 KiB until the transaction is done, for whoever listens.
const AT_ONCE: usize = 16_384;
/// Of how many frontends tables are changed in one transaction at least: the largest has 65,521
/// slots.
const TABLES_EACH: usize = 16;
