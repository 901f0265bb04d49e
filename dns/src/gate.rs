//! How many things may be under way at a time: for one asker, and for all.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use weft_model::NetworkId;

/// Hands out permits up to two limits. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    per_asker: usize,
    total: usize,
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    total: usize,
    askers: BTreeMap<(NetworkId, IpAddr), usize>,
}

impl Gate {
    pub(crate) fn new(per_asker: usize, total: usize) -> Self {
        Self { per_asker, total, held: Arc::default() }
    }

    /// Takes a place until the permit is dropped; nothing if a limit is reached.
    pub(crate) fn admit(&self, network: NetworkId, asker: IpAddr) -> Option<Permit> {
        let key = (network, asker);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let own = held.askers.get(&key).copied().unwrap_or_default();
        if held.total >= self.total || own >= self.per_asker {
            return None;
        }
        held.total += 1;
        held.askers.insert(key, own + 1);
        Some(Permit { held: self.held.clone(), key })
    }
}

/// One place behind a [`Gate`].
#[derive(Debug)]
pub(crate) struct Permit {
    held: Arc<Mutex<Held>>,
    key: (NetworkId, IpAddr),
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.total -= 1;
        match held.askers.get_mut(&self.key) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(held.askers.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_a_dropped_permit_frees_its_place() {
        let gate = Gate::new(2, 3);
        let network = NetworkId::from([1; 16]);
        let [a, b] = ["10.0.0.2", "10.0.0.3"].map(|ip| ip.parse().unwrap());

        let first = gate.admit(network, a).unwrap();
        let _second = gate.admit(network, a).unwrap();
        assert!(gate.admit(network, a).is_none(), "an asker beyond its own limit");
        let _third = gate.admit(network, b).unwrap();
        assert!(gate.admit(network, b).is_none(), "beyond the limit for all");

        drop(first);
        let fourth = gate.admit(network, a).unwrap();
        drop((fourth, _second, _third));
        assert!(gate.held.lock().unwrap().askers.is_empty());
    }
}
