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

impl OwnRecords {
    pub(crate) fn new(generation: u32) -> Self {
        Self { clock: WriteClock::new(generation), records: BTreeMap::new() }
    }

    /// Writes a batch and returns what it changed, the node's own record last: peers that have it
    /// have the whole batch.
    ///
    /// # Errors
    ///
    /// A record cannot be encoded; then nothing was written.
    pub(crate) fn write(
        &mut self,
        batch: Vec<(Key, Option<Record>)>,
    ) -> Result<Vec<Written>, EncodeError> {
        let batch: BTreeMap<_, _> = batch.into_iter().collect();
        let mut written = Vec::new();
        let mut changes = Vec::new();
        for (key, record) in batch.into_iter().rev() {
            let old = self.records.get(&key).map(|(record, _)| record);
            if old == record.as_ref() {
                continue;
            }
            let ver = self.clock.tick();
            let value: Arc<str> = match &record {
                Some(record) => encode(key, record, ver)?.into(),
                None => withdrawal(ver).into(),
            };
            written.push(Written { key, value: Arc::clone(&value), withdrawn: record.is_none() });
            changes.push((key, record.map(|record| (record, value))));
        }
        for (key, change) in changes {
            match change {
                Some(record) => drop(self.records.insert(key, record)),
                None => drop(self.records.remove(&key)),
            }
        }
        Ok(written)
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
    fn a_batch_with_one_bad_record_writes_nothing() {
        let mut own = OwnRecords::new(1);
        let good = (Key::Want(id(1)), Some(Record::Want(WantRecord::default())));
        let bad = (Key::Loan(id(1)), Some(Record::Want(WantRecord::default())));
        assert!(matches!(own.write(vec![good, bad]), Err(EncodeError::Mismatch { .. })));
        assert_eq!(own.values().count(), 0);
    }

    #[test]
    fn what_has_not_changed_is_not_written_again() {
        let mut own = OwnRecords::new(1);
        let batch = || vec![(Key::Network(id(1)), Some(Record::Network(NetworkRecord::Removed)))];
        assert_eq!(own.write(batch()).unwrap().len(), 1);
        assert_eq!(own.write(batch()).unwrap().len(), 0);
        assert_eq!(own.write(vec![(Key::Network(id(1)), None)]).unwrap().len(), 1);
        assert_eq!(own.write(vec![(Key::Network(id(1)), None)]).unwrap().len(), 0);
    }

    #[test]
    fn every_record_is_younger_than_its_incarnation() {
        let mut own = OwnRecords::new(1);
        own.write(vec![(Key::Want(id(1)), Some(Record::Want(WantRecord::default())))]).unwrap();
        own.observe(7 << 32);
        let incarnation = own.reincarnate();
        assert!(incarnation > 7 << 32);
        assert!(own.values().all(|(_, value)| peek_ver(value) > incarnation));
    }

    fn id(n: u8) -> NetworkId {
        NetworkId::from([n; 16])
    }
}
