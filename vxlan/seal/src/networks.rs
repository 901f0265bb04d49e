use std::{
    collections::BTreeMap,
    fs::File,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use weft_model::NetworkId;

use crate::{CarriedStatus, Forwarding, TapQueues, counters::Ledger, key::Meta};

/// The networks that a tunnel carries: written by its handle, read by its workers as snapshots.
#[derive(Debug, Default)]
pub(crate) struct Networks {
    carried: Mutex<BTreeMap<NetworkId, Arc<Carried>>>,
    snapshot: ArcSwap<Snapshot>,
}

/// All carried networks at one moment.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// Every TAP that is read, also those of networks at fault: what they say is dropped.
    pub(crate) all: Vec<Arc<Carried>>,
    /// By the number that packets have; without the networks at fault.
    pub(crate) by_number: BTreeMap<u32, Arc<Carried>>,
}

/// One carried network.
#[derive(Debug)]
pub(crate) struct Carried {
    pub(crate) number: u32,
    pub(crate) tap: Arc<Port>,
    pub(crate) forwarding: Arc<Forwarding>,
    pub(crate) ledger: Arc<Ledger>,
    /// Why it carries nothing.
    pub(crate) fault: Option<String>,
}

/// The TAP of one network, as the workers use it.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) queues: Vec<File>,
}

impl Networks {
    pub(crate) fn snapshot(&self) -> &ArcSwap<Snapshot> {
        &self.snapshot
    }

    pub(crate) fn carry(&self, tap: TapQueues, forwarding: Arc<Forwarding>, ledger: Arc<Ledger>) {
        let (name, queues) = tap.into_parts();
        let tap = Arc::new(Port { name, queues });
        let network = forwarding.network;
        let number = Meta::network_of(network);
        let carried = Carried { number, tap, forwarding, ledger, fault: None };

        let mut all = self.lock();
        all.insert(network, Arc::new(carried));
        self.publish(&mut all);
    }

    /// False if the network is not carried.
    pub(crate) fn forward(&self, forwarding: Arc<Forwarding>) -> bool {
        let mut all = self.lock();
        let Some(carried) = all.get_mut(&forwarding.network) else { return false };
        *carried = Arc::new(carried.with_forwarding(forwarding));
        self.publish(&mut all);
        true
    }

    pub(crate) fn drop_network(&self, network: NetworkId) {
        let mut all = self.lock();
        all.remove(&network);
        self.publish(&mut all);
    }

    pub(crate) fn status(&self) -> BTreeMap<NetworkId, CarriedStatus> {
        let status = |carried: &Carried| CarriedStatus {
            tap: carried.tap.name.clone(),
            queues: carried.tap.queues.len(),
            fault: carried.fault.clone(),
        };
        let snapshot = self.snapshot.load();
        snapshot.all.iter().map(|c| (c.forwarding.network, status(c))).collect()
    }

    /// Settles who is at fault and shows the workers the result.
    fn publish(&self, all: &mut BTreeMap<NetworkId, Arc<Carried>>) {
        let mut named = BTreeMap::<u32, Vec<NetworkId>>::new();
        for (&network, carried) in all.iter() {
            named.entry(carried.number).or_default().push(network);
        }
        for (&network, carried) in all.iter_mut() {
            let rival = named[&carried.number].iter().find(|other| **other != network);
            let fault = rival.map(|other| {
                format!(
                    "network {other} has the same first four bytes, so that packets cannot tell the two apart: create one of them anew"
                )
            });
            if fault != carried.fault {
                *carried = Arc::new(carried.with_fault(fault));
            }
        }

        let sound = all.values().filter(|carried| carried.fault.is_none());
        self.snapshot.store(Arc::new(Snapshot {
            by_number: sound.map(|carried| (carried.number, Arc::clone(carried))).collect(),
            all: all.values().cloned().collect(),
        }));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NetworkId, Arc<Carried>>> {
        // Whoever panicked had not published: the map itself is always whole.
        self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Carried {
    fn with_forwarding(&self, forwarding: Arc<Forwarding>) -> Self {
        let (tap, ledger) = (Arc::clone(&self.tap), Arc::clone(&self.ledger));
        Self { number: self.number, tap, forwarding, ledger, fault: self.fault.clone() }
    }

    fn with_fault(&self, fault: Option<String>) -> Self {
        Self { fault, ..self.with_forwarding(Arc::clone(&self.forwarding)) }
    }
}
