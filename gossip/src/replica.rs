use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    str::FromStr,
};

use weft_model::NodeId;

use crate::table::{Content, Key, Record, decode, peek_ver};

/// The newest known value of every key of every node. Newer (by the writer's own number) wins, so
/// the order and the number of deliveries do not matter.
///
/// It outlives chitchat's state: the records of a node that chitchat has dropped stay until they
/// are forgotten.
#[derive(Debug, Default)]
pub(crate) struct Replica {
    nodes: BTreeMap<NodeId, Records>,
    /// Writes of forgotten nodes up to these numbers are not taken again.
    forgotten: BTreeMap<NodeId, u64>,
}

impl Replica {
    /// Takes one value in. Returns whether the node's records changed by it.
    pub(crate) fn apply(&mut self, node: NodeId, key: &str, value: &str) -> bool {
        let ver = peek_ver(value);
        if self.forgotten.get(&node).is_some_and(|&floor| ver <= floor) {
            return false;
        }
        self.nodes.entry(node).or_default().apply(key, ver, value)
    }

    /// Withdraws what `node` no longer has, given a part of its state that is complete up to its
    /// write number `complete_to`: an older record that is not among `present` was withdrawn, even
    /// if the withdrawal itself was missed. Returns whether the node's records changed by it.
    pub(crate) fn retain(
        &mut self,
        node: NodeId,
        present: &BTreeSet<String>,
        complete_to: u64,
    ) -> bool {
        let Some(records) = self.nodes.get_mut(&node) else { return false };
        let before = records.visible();
        records
            .known
            .retain(|key, entry| entry.ver >= complete_to || present.contains(&key.to_string()));
        records.unknown.retain(|key, entry| entry.ver >= complete_to || present.contains(key));
        records.visible() != before
    }

    /// Drops all records of `node` and refuses the same writes from now on.
    pub(crate) fn forget(&mut self, node: NodeId) {
        if let Some(records) = self.nodes.remove(&node) {
            let floor = records.highest().max(self.forgotten.get(&node).copied().unwrap_or(0));
            self.forgotten.insert(node, floor);
        }
    }

    /// Takes writes of a forgotten node again. Returns whether it was forgotten.
    pub(crate) fn recall(&mut self, node: NodeId) -> bool {
        self.forgotten.remove(&node).is_some()
    }

    pub(crate) fn is_forgotten(&self, node: NodeId) -> bool {
        self.forgotten.contains_key(&node)
    }

    pub(crate) fn records(&self, node: NodeId) -> impl Iterator<Item = (Key, &Record)> {
        self.nodes.get(&node).into_iter().flat_map(|records| &records.known).filter_map(
            |(&key, entry)| match &entry.content {
                Content::Record(record) => Some((key, record.as_ref())),
                Content::Withdrawn | Content::Undecodable | Content::Unknown => None,
            },
        )
    }

    /// How many keys of `node` this version does not know, and how many values it cannot read.
    pub(crate) fn unreadable(&self, node: NodeId) -> (usize, usize) {
        self.nodes.get(&node).map_or((0, 0), |records| {
            let undecodable =
                records.known.values().filter(|entry| entry.content == Content::Undecodable);
            (records.unknown.len(), undecodable.count())
        })
    }
}

#[derive(Debug, Default)]
struct Records {
    known: BTreeMap<Key, Entry>,
    unknown: BTreeMap<String, Entry>,
}

impl Records {
    fn apply(&mut self, key: &str, ver: u64, value: &str) -> bool {
        let Ok(known) = Key::from_str(key) else {
            let entry = Entry { ver, content: Content::Unknown };
            return match self.unknown.entry(key.to_owned()) {
                btree_map::Entry::Vacant(vacant) => {
                    vacant.insert(entry);
                    true
                }
                btree_map::Entry::Occupied(mut old) => {
                    old.get_mut().ver = old.get().ver.max(ver);
                    false
                }
            };
        };
        match self.known.entry(known) {
            btree_map::Entry::Vacant(vacant) => {
                let content = decode(known, value);
                let visible = content != Content::Withdrawn;
                vacant.insert(Entry { ver, content });
                visible
            }
            btree_map::Entry::Occupied(old) if old.get().ver >= ver => false,
            btree_map::Entry::Occupied(mut old) => {
                let entry = Entry { ver, content: decode(known, value) };
                let changed = entry.content != old.get().content;
                old.insert(entry);
                changed
            }
        }
    }

    /// How many entries a view of the node shows or counts.
    fn visible(&self) -> usize {
        let shown = self.known.values().filter(|entry| entry.content != Content::Withdrawn);
        shown.count() + self.unknown.len()
    }

    fn highest(&self) -> u64 {
        let vers = self.known.values().chain(self.unknown.values()).map(|entry| entry.ver);
        vers.max().unwrap_or(0)
    }
}

#[derive(Debug)]
struct Entry {
    ver: u64,
    content: Content,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use weft_model::{HoldRecord, NetworkId, WantRecord};

    use super::*;
    use crate::table::{encode, withdrawal};

    #[test]
    fn an_older_value_never_replaces_a_newer_one() {
        let mut replica = Replica::default();
        assert!(replica.apply(node(1), "wants", "no envelope"));
        let (key, new) = (want(1), value(want(1), 9));
        assert!(replica.apply(node(1), &key.to_string(), &new));
        assert!(!replica.apply(node(1), &key.to_string(), &withdrawal(8)));
        assert!(!replica.apply(node(1), &key.to_string(), &new));
        assert_eq!(replica.records(node(1)).count(), 1);
        assert!(replica.apply(node(1), &key.to_string(), &withdrawal(10)));
        assert_eq!(replica.records(node(1)).count(), 0);
        assert!(!replica.apply(node(1), &key.to_string(), &value(key, 9)), "no resurrection");
    }

    #[test]
    fn what_cannot_be_read_is_kept_and_counted() {
        let mut replica = Replica::default();
        replica.apply(node(1), "future/thing", "{}");
        replica.apply(node(1), &want(1).to_string(), r#"{"v":2,"ver":5,"body":[]}"#);
        replica.apply(node(1), &want(2).to_string(), "not json");
        assert_eq!(replica.unreadable(node(1)), (1, 2));

        let later = value(want(1), 6);
        assert!(replica.apply(node(1), &want(1).to_string(), &later));
        assert_eq!(replica.unreadable(node(1)), (1, 1));
    }

    #[test]
    fn a_record_absent_from_a_later_state_was_withdrawn() {
        let mut replica = Replica::default();
        for (key, ver) in [(want(1), 5), (want(2), 6), (want(3), 9)] {
            replica.apply(node(1), &key.to_string(), &value(key, ver));
        }
        let present = BTreeSet::from([want(2).to_string()]);
        assert!(replica.retain(node(1), &present, 8));
        let left: Vec<_> = replica.records(node(1)).map(|(key, _)| key).collect();
        assert_eq!(left, [want(2), want(3)], "the third was pushed ahead of the state");
    }

    #[test]
    fn a_forgotten_node_comes_back_only_when_it_is_recalled() {
        let mut replica = Replica::default();
        replica.apply(node(1), &want(1).to_string(), &value(want(1), 5));
        replica.forget(node(1));
        assert!(!replica.apply(node(1), &want(1).to_string(), &value(want(1), 5)));
        assert!(replica.recall(node(1)));
        assert!(replica.apply(node(1), &want(1).to_string(), &value(want(1), 5)));
    }

    proptest! {
        #[test]
        fn order_and_repetition_of_deliveries_do_not_matter(
            writes in prop::collection::vec((0u8..3, 0u8..4, any::<bool>()), 1..20),
            order in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        ) {
            let messages: Vec<_> = writes
                .iter()
                .zip(1u64..)
                .map(|(&(writer, key, gone), ver)| {
                    let key = if key == 0 { hold(1) } else { want(key) };
                    let value = if gone { withdrawal(ver) } else { value(key, ver) };
                    (node(writer), key.to_string(), value)
                })
                .collect();
            let mut in_order = Replica::default();
            for (node, key, value) in &messages {
                in_order.apply(*node, key, value);
            }
            let mut shuffled = Replica::default();
            for (node, key, value) in
                order.iter().map(|index| index.get(&messages)).chain(messages.iter().rev())
            {
                shuffled.apply(*node, key, value);
            }
            for writer in 0..3 {
                prop_assert!(in_order.records(node(writer)).eq(shuffled.records(node(writer))));
            }
        }

        #[test]
        fn no_key_or_value_breaks_the_replica(
            key in "(node|want/[0-9a-f]{32}|.*)", value in r#"(\{"v":1,"ver":[0-9]{1,20}(,"(record|z)":.{0,30})?\}|.*)"#,
        ) {
            let mut replica = Replica::default();
            replica.apply(node(1), &key, &value);
            replica.retain(node(1), &BTreeSet::new(), u64::MAX);
            prop_assert_eq!(replica.records(node(1)).count(), 0);
        }
    }

    fn node(n: u8) -> NodeId {
        NodeId::from([n; 16])
    }

    fn want(n: u8) -> Key {
        Key::Want(NetworkId::from([n; 16]))
    }

    fn hold(n: u8) -> Key {
        Key::Hold(NetworkId::from([n; 16]))
    }

    fn value(key: Key, ver: u64) -> String {
        let record = match key {
            Key::Hold(_) => {
                let mut record = HoldRecord::default();
                let unit = weft_model::Unit::Block(weft_model::Family::V4, 1);
                record.released.insert(unit, ver);
                Record::Hold(record)
            }
            _ => {
                let ip = std::net::Ipv4Addr::from(u32::try_from(ver).unwrap()).into();
                let mut record = WantRecord::default();
                record.addresses.insert(ip);
                Record::Want(record)
            }
        };
        encode(key, &record, ver).unwrap()
    }
}
