//! What all frontends of a network have in the kernel together, and what differs from what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use weft_model::{Family, MacAddr};

use crate::{
    Frontend, NetworkBalance, Pool,
    kernel::{Actual, Change, rule_label},
    parts::{Chain, Collection, Parts},
    set::{Element, Kind, Set, Table},
    shortcut,
    skeleton::Skeleton,
    slots::{Slots, Turnover, slots},
};

/// The parts of each frontend, and how many of them have what they share. Their tables are made
/// when they are wanted: of 10,000 services they would take more than all the rest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holdings {
    frontends: BTreeMap<Frontend, (Arc<Pool>, Parts)>,
    elements: BTreeMap<Element, u32>,
    collections: BTreeMap<String, u32>,
    chains: BTreeMap<String, u32>,
    /// Nobody's any more, but connections that were made before may need them.
    pub(crate) lingering: BTreeSet<Element>,
    gateways: BTreeSet<IpAddr>,
    /// Whose connections may pass the gateway by, by their marks.
    marks: BTreeMap<u32, Frontend>,
    seed: u32,
}

impl Holdings {
    pub(crate) fn new(seed: u32) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Goes over to `desired`, and tells what changes by it.
    pub(crate) fn follow(&mut self, desired: &NetworkBalance) -> Change {
        // Whether sources are translated depends on them.
        let anew = self.gateways != desired.gateways;
        self.gateways.clone_from(&desired.gateways);
        let mut counts = Counts::default();
        let mut change = Change::default();
        let (gone, changed) = self.differing(desired, anew);
        for frontend in gone {
            if let Some((pool, parts)) = self.frontends.remove(&frontend) {
                counts.sub(&parts);
                if let Some(mark) = self.mark(&frontend) {
                    self.marks.remove(&mark);
                }
                change.gone_elements.extend(parts.keeper.map(|keeper| keeper.entry));
                let before = slots(frontend, &pool, self.seed);
                change.turnovers.push(Turnover::new(frontend, &before, &Slots::new()));
                change.gone_frontends.push(frontend);
            }
        }
        for (frontend, pool) in changed {
            let gateway =
                desired.gateways.iter().any(|ip| Family::of(*ip) == Family::of(frontend.ip));
            let mut parts = Parts::of(frontend, pool, self.seed, gateway);
            if let Some(mark) = shortcut::mark(frontend)
                && *self.marks.entry(mark).or_insert(frontend) == frontend
            {
                parts.elements.extend(shortcut::elements(frontend, mark));
            }
            counts.add(&parts);
            let after = slots(frontend, pool, self.seed);
            let held = self.frontends.insert(frontend, (Arc::clone(pool), parts.clone()));
            let before = held.as_ref().map(|(pool, _)| slots(frontend, pool, self.seed));
            let turnover = Turnover::new(frontend, &before.unwrap_or_default(), &after);
            change.turnovers.push(turnover);
            let before = held.map(|(_, parts)| parts);
            if let Some(before) = &before {
                counts.sub(before);
            }
            let lead = |parts: &Parts| {
                let keeper = parts.keeper.as_ref();
                keeper.map(|keeper| (keeper.entry.clone(), keeper.lead().to_owned()))
            };
            let (before, after) = (before.as_ref().and_then(lead), lead(&parts));
            if before != after {
                change.gone_elements.extend(before.map(|(entry, _)| entry));
                change.new_elements.extend(after.map(|(entry, lead)| (entry, Some(lead))));
            }
        }
        change.turnovers.retain(|turnover| !turnover.is_empty());
        self.settle(counts, &mut change);
        change
    }

    /// The mark of a frontend that has one.
    pub(crate) fn mark(&self, frontend: &Frontend) -> Option<u32> {
        shortcut::mark(*frontend).filter(|mark| self.marks.get(mark) == Some(frontend))
    }

    /// The frontends that are none of `desired`, and those that are not as they are there; `anew`:
    /// all of it. Goes through both at once, because there may be ten thousands.
    fn differing<'a>(
        &self,
        desired: &'a NetworkBalance,
        anew: bool,
    ) -> (Vec<Frontend>, Vec<(Frontend, &'a Arc<Pool>)>) {
        let (mut gone, mut changed) = (Vec::new(), Vec::new());
        let mut held = self.frontends.iter().peekable();
        for (&frontend, pool) in &desired.frontends {
            while let Some((before, _)) = held.next_if(|(before, _)| **before < frontend) {
                gone.push(*before);
            }
            let same = held
                .next_if(|(before, _)| **before == frontend)
                .is_some_and(|(_, (held, _))| Arc::ptr_eq(held, pool) || **held == **pool);
            if anew || !same {
                changed.push((frontend, pool));
            }
        }
        gone.extend(held.map(|(frontend, _)| *frontend));
        (gone, changed)
    }

    /// Brings the counts of shared things up to date.
    fn settle(&mut self, counts: Counts, change: &mut Change) {
        let Counts { elements, chains, rules, collections, shapes } = counts;
        for (element, delta) in elements {
            match recount(&mut self.elements, &element, delta) {
                // It is in the kernel still if it lingers.
                (0, 1..) if !self.lingering.remove(&element) => {
                    change.new_elements.push((element, None));
                }
                (1.., 0) if element.set.lingers() => {
                    self.lingering.insert(element);
                }
                (1.., 0) => change.gone_elements.push(element),
                _ => {}
            }
        }
        for (name, delta) in chains {
            match recount(&mut self.chains, &name, delta) {
                (0, 1..) => change.new_chains.extend(rules.get(&name).cloned()),
                (1.., 0) => change.gone_chains.push((Table::Inet, name)),
                _ => {}
            }
        }
        for (name, delta) in collections {
            match recount(&mut self.collections, &name, delta) {
                (0, 1..) => change.new_collections.extend(shapes.get(&name).cloned()),
                (1.., 0) => change.gone_collections.push((Table::Inet, name)),
                _ => {}
            }
        }
    }

    /// Lists what differs in the kernel; `None` if tables, chains or sets of the skeleton do, which
    /// have to be laid first.
    ///
    /// What old connections may need is found among what is there, and stays.
    pub(crate) fn compare(&mut self, actual: &Actual, skeleton: &Skeleton) -> Option<Change> {
        if !is_laid(actual, skeleton) {
            return None;
        }
        let mut change = Change::default();
        let mut chains = BTreeMap::new();
        let mut entries = BTreeMap::new();
        let mut shapes = BTreeMap::new();
        for keeper in self.frontends.values().filter_map(|(_, parts)| parts.keeper.as_ref()) {
            entries.insert(&keeper.entry, keeper.lead());
            chains.extend(keeper.chains.iter().map(|chain| (chain.name.as_str(), chain)));
            shapes.extend(keeper.collections.iter().map(|c| (c.name.as_str(), c)));
        }
        let fixed = skeleton.labelled();
        for (chain, labels) in actual.chains.iter().filter(|(key, _)| !fixed.contains_key(key)) {
            let (table, name) = chain;
            let Some(wanted) = chains.get(name.as_str()).filter(|_| *table == Table::Inet) else {
                change.gone_chains.push(chain.clone());
                continue;
            };
            let rules = (0..wanted.rules.len()).map(|index| Some(rule_label(name, index)));
            if !rules.eq(labels.iter().cloned()) {
                change.mended_chains.push((*wanted).clone());
            }
        }
        let present = |name: &str| actual.chains.contains_key(&(Table::Inet, name.to_owned()));
        let missing = chains.iter().filter(|(name, _)| !present(name));
        change.new_chains.extend(missing.map(|(_, chain)| (*chain).clone()));

        let key = |name: &str| (Table::Inet, name.to_owned());
        let missing = shapes.iter().filter(|(name, _)| !actual.collections.contains(&key(name)));
        change.new_collections.extend(missing.map(|(_, collection)| (*collection).clone()));
        let foreign = |(table, name): &&(Table, String)| {
            *table != Table::Inet || !shapes.contains_key(name.as_str())
        };
        change.gone_collections.extend(actual.collections.iter().filter(foreign).cloned());

        self.lingering.clear();
        for (element, lead) in &actual.elements {
            match (entries.get(element), self.elements.contains_key(element)) {
                (Some(wanted), _) if lead.as_deref() == Some(*wanted) => {}
                (None, true) => {}
                (None, false) if element.set.lingers() => {
                    self.lingering.insert(element.clone());
                }
                // Stations are added by the kernel, and removed with care.
                (None, false) if element.set.kind == Kind::Clients => {}
                _ => change.gone_elements.push(element.clone()),
            }
        }
        for (element, wanted) in entries {
            let found = actual.elements.get(element);
            if found.and_then(Option::as_deref) != Some(wanted) {
                change.new_elements.push((element.clone(), Some(wanted.to_owned())));
            }
        }
        let missing = self.elements.keys().filter(|e| !actual.elements.contains_key(e));
        change.new_elements.extend(missing.map(|element| (element.clone(), None)));

        let (none, nobodys) = (Slots::new(), |frontend| !self.frontends.contains_key(frontend));
        let foreign = actual.slots.iter().filter(|(frontend, _)| nobodys(frontend));
        let gone = foreign.map(|(frontend, found)| Turnover::new(*frontend, found, &none));
        let mended = self.frontends.iter().map(|(frontend, (pool, _))| {
            let found = actual.slots.get(frontend).unwrap_or(&none);
            Turnover::new(*frontend, found, &slots(*frontend, pool, self.seed))
        });
        change.turnovers.extend(gone.chain(mended).filter(|turnover| !turnover.is_empty()));
        Some(change)
    }

    /// Takes what lingers and is not among `used`: nothing needs it any more.
    pub(crate) fn let_go(&mut self, used: &BTreeSet<Element>) -> Change {
        let gone: Vec<_> = self.lingering.difference(used).cloned().collect();
        self.lingering.retain(|element| used.contains(element));
        Change { gone_elements: gone, ..Change::default() }
    }
}

/// The stations of this host that the kernel lacks: it shall know them at once, not only when they
/// send.
pub(crate) fn stations(
    macs: &BTreeSet<MacAddr>,
    actual: &Actual,
) -> impl Iterator<Item = (Element, Option<String>)> {
    let wanted = macs.iter().map(|mac| Element::client(*mac));
    wanted.filter(|element| !actual.elements.contains_key(element)).map(|element| (element, None))
}

fn is_laid(actual: &Actual, skeleton: &Skeleton) -> bool {
    let labelled = |(chain, labels): (&(Table, String), &Vec<String>)| {
        actual.chains.get(chain).is_some_and(|found| {
            found.iter().map(Option::as_deref).eq(labels.iter().map(|label| Some(label.as_str())))
        })
    };
    skeleton.labelled().iter().all(labelled) && Set::all().all(|set| actual.sets.contains(&set))
}

/// Changes a count; tells what it was and what it is.
fn recount<K: Clone + Ord>(counts: &mut BTreeMap<K, u32>, key: &K, delta: i32) -> (u32, u32) {
    let held = counts.get(key).copied().unwrap_or_default();
    let count = held.saturating_add_signed(delta);
    match count {
        0 => counts.remove(key),
        _ => counts.insert(key.clone(), count),
    };
    (held, count)
}

/// By how much the use of shared things changes.
#[derive(Debug, Default)]
struct Counts {
    elements: BTreeMap<Element, i32>,
    chains: BTreeMap<String, i32>,
    rules: BTreeMap<String, Chain>,
    collections: BTreeMap<String, i32>,
    shapes: BTreeMap<String, Collection>,
}

impl Counts {
    fn add(&mut self, parts: &Parts) {
        for element in &parts.elements {
            *self.elements.entry(element.clone()).or_default() += 1;
        }
        for chain in parts.keeper.iter().flat_map(|keeper| &keeper.chains) {
            *self.chains.entry(chain.name.clone()).or_default() += 1;
            self.rules.insert(chain.name.clone(), chain.clone());
        }
        for collection in parts.keeper.iter().flat_map(|keeper| &keeper.collections) {
            *self.collections.entry(collection.name.clone()).or_default() += 1;
            self.shapes.insert(collection.name.clone(), collection.clone());
        }
    }

    fn sub(&mut self, parts: &Parts) {
        for element in &parts.elements {
            *self.elements.entry(element.clone()).or_default() -= 1;
        }
        for chain in parts.keeper.iter().flat_map(|keeper| &keeper.chains) {
            *self.chains.entry(chain.name.clone()).or_default() -= 1;
        }
        for collection in parts.keeper.iter().flat_map(|keeper| &keeper.collections) {
            *self.collections.entry(collection.name.clone()).or_default() -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use weft_model::{EndpointId, NetworkId, NodeId, Protocol, Source, Spread};

    use super::*;
    use crate::{Backend, slots::Target};

    fn any_balance() -> impl Strategy<Value = NetworkBalance> {
        let backends = proptest::collection::btree_map(0..6u8, (0..3u16, any::<bool>()), 0..4);
        let pool =
            (backends, any::<bool>(), any::<bool>()).prop_map(|(backends, random, keep)| Pool {
                service: "web".parse().unwrap(),
                backends: backends
                    .into_iter()
                    .map(|(n, (weight, local))| {
                        let (ip, node) = (IpAddr::from([10, 1, 0, n]), NodeId::from([1; 16]));
                        let port = Some(8080);
                        (EndpointId::from([n; 16]), Backend { ip, port, weight, node, local })
                    })
                    .collect(),
                spread: if random { Spread::Random } else { Spread::Hash },
                affinity: keep.then_some(Duration::from_secs(60)),
                source: Source::Snat,
            });
        let frontend = (0..4u8, any::<bool>()).prop_map(|(n, port)| Frontend {
            ip: IpAddr::from([10, 1, 0, 200 + n]),
            protocol: Protocol::Tcp,
            port: port.then_some(80),
        });
        let frontends = proptest::collection::btree_map(frontend, pool.prop_map(Arc::new), 0..4);
        (frontends, any::<bool>()).prop_map(|(frontends, gateway)| NetworkBalance {
            gateway_mac: MacAddr::for_gateway(NetworkId::from([1; 16])),
            gateways: gateway.then(|| IpAddr::from([10, 1, 0, 254])).into_iter().collect(),
            frontends,
        })
    }

    /// A kernel that obeys: every change must be one that it can make.
    #[derive(Clone, Debug)]
    struct Fake(Actual);

    impl Fake {
        fn laid(skeleton: &Skeleton) -> Self {
            let labels = |labels: Vec<String>| labels.into_iter().map(Some).collect();
            Self(Actual {
                chains: skeleton.labelled().into_iter().map(|(k, v)| (k, labels(v))).collect(),
                sets: Set::all().collect(),
                ..Actual::default()
            })
        }

        fn apply(&mut self, change: &Change) {
            let Self(actual) = self;
            let key = |name: &String| (Table::Inet, name.clone());
            for collection in &change.new_collections {
                assert!(actual.collections.insert(key(&collection.name)), "{collection:?}");
            }
            for chain in change.new_chains.iter().chain(&change.mended_chains) {
                let labels = (0..chain.rules.len()).map(|n| Some(rule_label(&chain.name, n)));
                actual.chains.insert(key(&chain.name), labels.collect());
            }
            for element in &change.gone_elements {
                assert!(actual.elements.remove(element).is_some(), "{element:?}");
            }
            for (element, lead) in &change.new_elements {
                if let Some(lead) = lead {
                    assert!(actual.chains.contains_key(&key(lead)), "{lead}");
                }
                let before = actual.elements.insert(element.clone(), lead.clone());
                assert!(before.is_none(), "{element:?}");
            }
            for Turnover { frontend, gone, new } in &change.turnovers {
                let table = actual.slots.entry(*frontend).or_default();
                let mut slots: BTreeMap<_, _> = table.iter().copied().collect();
                for slot in gone {
                    assert!(slots.remove(slot).is_some(), "{frontend} {slot}");
                }
                for (slot, target) in new {
                    assert!(slots.insert(*slot, *target).is_none(), "{frontend} {slot}");
                }
                *table = slots.into_iter().collect();
            }
            actual.slots.retain(|_, table| !table.is_empty());
            for chain in &change.gone_chains {
                assert!(actual.chains.remove(chain).is_some(), "{chain:?}");
                let led = actual.elements.values().flatten().any(|lead| *lead == chain.1);
                assert!(!led, "{chain:?}");
            }
            for name in &change.gone_collections {
                assert!(actual.collections.remove(name), "{name:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn following_step_by_step_ends_where_starting_anew_does(
            steps in proptest::collection::vec(any_balance(), 1..5),
        ) {
            let skeleton = Skeleton::new(steps[0].gateway_mac, &BTreeSet::new(), 1);
            let (mut kernel, mut holdings) = (Fake::laid(&skeleton), Holdings::new(1));
            for balance in &steps {
                let change = holdings.follow(balance);
                kernel.apply(&change);
                // A successor that knows nothing finds nothing to do, whatever lingers.
                let mut successor = Holdings::new(1);
                let whole = successor.follow(balance);
                let change = successor.compare(&kernel.0, &skeleton).unwrap();
                prop_assert!(change.is_empty(), "{change:?}");
                prop_assert_eq!(&successor.lingering, &holdings.lingering);
                // And where there is nothing, all of it is made.
                let mut empty = Fake::laid(&skeleton);
                empty.apply(&whole);
                prop_assert!(successor.compare(&empty.0, &skeleton).unwrap().is_empty());
            }
            kernel.apply(&holdings.let_go(&BTreeSet::new()));
            let last = steps.last().unwrap();
            let mut fresh = Fake::laid(&skeleton);
            fresh.apply(&Holdings::new(1).follow(last));
            prop_assert_eq!(&kernel.0, &fresh.0);
        }

        #[test]
        fn whatever_is_there_one_change_makes_it_right(
            before in any_balance(),
            after in any_balance(),
        ) {
            let skeleton = Skeleton::new(after.gateway_mac, &BTreeSet::new(), 1);
            let mut kernel = Fake::laid(&skeleton);
            kernel.apply(&Holdings::new(1).follow(&before));
            let mut holdings = Holdings::new(1);
            holdings.follow(&after);
            let change = holdings.compare(&kernel.0, &skeleton).unwrap();
            kernel.apply(&change);
            prop_assert!(holdings.compare(&kernel.0, &skeleton).unwrap().is_empty());
        }

        #[test]
        fn what_somebody_has_done_to_a_table_is_undone(
            balance in any_balance(),
            number: prop::sample::Index,
            slot in 0..3u32,
            act in 0..3u8,
        ) {
            let skeleton = Skeleton::new(balance.gateway_mac, &BTreeSet::new(), 1);
            let (mut kernel, mut holdings) = (Fake::laid(&skeleton), Holdings::new(1));
            kernel.apply(&holdings.follow(&balance));
            let right = kernel.clone();
            prop_assume!(!kernel.0.slots.is_empty());
            let number = number.index(kernel.0.slots.len());
            let table = kernel.0.slots.values_mut().nth(number).unwrap();
            let elsewhere = Target { ip: [192, 0, 2, 1].into(), port: Some(1) };
            match act {
                0 => drop(table.remove(0)),
                1 => table[0].1 = elsewhere,
                _ => table.push((1_000_000 + slot, elsewhere)),
            }
            let change = holdings.compare(&kernel.0, &skeleton).unwrap();
            prop_assert_eq!(change.turnovers.len(), 1);
            let Turnover { gone, new, .. } = &change.turnovers[0];
            prop_assert!(gone.len() + new.len() <= 2, "{change:?}");
            kernel.apply(&change);
            prop_assert_eq!(kernel.0, right.0);
        }
    }
}
