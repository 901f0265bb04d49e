use std::{collections::BTreeMap, sync::Arc};

use weft_model::{Node, NodeState};

use crate::{
    Record,
    table::{EncodeError, Key, WriteClock, encode, withdrawal},
};

/// The records that this node has published.
#[derive(Debug)]
pub(crate) struct OwnRecords {
    clock: WriteClock,
    records: BTreeMap<Key, (Record, Arc<str>)>,
}

/// One write, encoded.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) key: Key,
    pub(crate) value: Arc<str>,
    pub(crate) withdrawn: bool,
}

/// What came of a batch.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) written: Vec<Written>,
    pub(crate) refused: Vec<EncodeError>,
}

impl OwnRecords {
    pub(crate) fn new(generation: u32) -> Self {
        Self { clock: WriteClock::new(generation), records: BTreeMap::new() }
    }

    /// Writes a batch and returns what it changed, the node's own record last: peers that have it
    /// have the whole batch. A record that cannot be encoded does not keep the others back; what
    /// was published under its key stays.
    pub(crate) fn write(&mut self, batch: Vec<(Key, Option<Record>)>) -> Outcome {
        let batch: BTreeMap<_, _> = batch.into_iter().collect();
        let mut outcome = Outcome::default();
        for (key, record) in batch.into_iter().rev() {
            let old = self.records.get(&key).map(|(record, _)| record);
            if old == record.as_ref() {
                continue;
            }
            let ver = self.clock.tick();
            let encoded = record.as_ref().map(|record| encode(key, record, ver)).transpose();
            let value: Arc<str> = match encoded {
                Ok(value) => value.unwrap_or_else(|| withdrawal(ver)).into(),
                Err(refusal) => {
                    outcome.refused.push(refusal);
                    continue;
                }
            };
            let withdrawn = record.is_none();
            outcome.written.push(Written { key, value: Arc::clone(&value), withdrawn });
            match record {
                Some(record) => drop(self.records.insert(key, (record, value))),
                None => drop(self.records.remove(&key)),
            }
        }
        outcome
    }

    /// Begins a new incarnation: returns its number, and writes all records again after it.
    pub(crate) fn reincarnate(&mut self) -> u64 {
        let incarnation = self.clock.tick();
        for (&key, (record, value)) in self.records.iter_mut().rev() {
            let again = encode(key, record, self.clock.tick());
            *value = again.expect("its length does not depend on the write number").into();
        }
        incarnation
    }

    /// Goes on after a number of ours that an earlier life has used.
    pub(crate) fn observe(&mut self, seen: u64) {
        self.clock.observe(seen);
    }

    /// This node's own record, changed to say that it is leaving.
    pub(crate) fn farewell(&self) -> Option<Node> {
        match self.records.get(&Key::Node) {
            Some((Record::Node(node), _)) => {
                Some(Node { state: NodeState::Leaving, ..node.clone() })
            }
            Some(_) | None => None,
        }
    }

    /// Keys and encoded values, the node's own record last.
    pub(crate) fn values(&self) -> impl Iterator<Item = (Key, &Arc<str>)> {
        self.records.iter().rev().map(|(&key, (_, value))| (key, value))
    }
}

#[cfg(test)]
mod tests {
    use weft_model::{NetworkId, NetworkRecord, WantRecord};

    use super::*;
    use crate::table::peek_ver;

    #[test]
    fn a_bad_record_neither_keeps_the_others_back_nor_replaces_what_it_was() {
        let mut own = OwnRecords::new(1);
        let want = || Some(Record::Want(WantRecord::default()));
        let outcome = own.write(vec![(Key::Want(id(1)), want()), (Key::Loan(id(1)), want())]);
        assert_eq!(outcome.written.len(), 1);
        assert!(matches!(outcome.refused[..], [EncodeError::Mismatch { key: Key::Loan(_) }]));
        let before: Vec<_> = own.values().map(|(key, value)| (key, value.clone())).collect();
        assert_eq!(before.len(), 1);

        let removed = Some(Record::Network(NetworkRecord::Removed));
        let outcome = own.write(vec![(Key::Want(id(1)), removed)]);
        assert_eq!((outcome.written.len(), outcome.refused.len()), (0, 1));
        assert!(own.values().map(|(key, value)| (key, value.clone())).eq(before));
    }

    #[test]
    fn what_has_not_changed_is_not_written_again() {
        let mut own = OwnRecords::new(1);
        let batch = || vec![(Key::Network(id(1)), Some(Record::Network(NetworkRecord::Removed)))];
        let mut changes = |batch| own.write(batch).written.len();
        assert_eq!(changes(batch()), 1);
        assert_eq!(changes(batch()), 0);
        assert_eq!(changes(vec![(Key::Network(id(1)), None)]), 1);
        assert_eq!(changes(vec![(Key::Network(id(1)), None)]), 0);
    }

    #[test]
    fn every_record_is_younger_than_its_incarnation() {
        let mut own = OwnRecords::new(1);
        own.write(vec![(Key::Want(id(1)), Some(Record::Want(WantRecord::default())))]);
        own.observe(7 << 32);
        let incarnation = own.reincarnate();
        assert!(incarnation > 7 << 32);
        assert!(own.values().all(|(_, value)| peek_ver(value) > incarnation));
    }

    fn id(n: u8) -> NetworkId {
        NetworkId::from([n; 16])
    }
}
