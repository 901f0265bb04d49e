use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use tokio::time::Instant;
use weft_model::NodeId;

use super::detour::node_behind;

/// Who is where, as far as is known.
#[derive(Debug, Default)]
pub(super) struct Directory {
    /// Where members say that they are.
    introduced: BTreeMap<NodeId, SocketAddr>,
    /// The same by address: behind two NATs two may say the same.
    claims: BTreeMap<SocketAddr, BTreeSet<NodeId>>,
    /// Where they have shown by a certificate that they were.
    met: BTreeMap<SocketAddr, (NodeId, Instant)>,
}

impl Directory {
    /// Takes in all claims, and returns those that are new.
    pub(super) fn introduce(
        &mut self,
        introduced: BTreeMap<NodeId, SocketAddr>,
    ) -> Vec<(NodeId, SocketAddr)> {
        let new = introduced
            .iter()
            .filter(|(node, address)| self.introduced.get(node) != Some(address))
            .map(|(&node, &address)| (node, address))
            .collect();
        self.claims.clear();
        for (&node, &address) in &introduced {
            self.claims.entry(address).or_default().insert(node);
        }
        self.introduced = introduced;
        new
    }

    /// Where `node` says that it is.
    pub(super) fn claim(&self, node: NodeId) -> Option<SocketAddr> {
        self.introduced.get(&node).copied()
    }

    pub(super) fn meet(&mut self, address: SocketAddr, node: NodeId, now: Instant) {
        bound(&mut self.met, |(_, at)| *at);
        self.met.insert(address, (node, now));
    }

    /// Who is at `address`.
    ///
    /// Whoever was met there, while it is `connected`; then those that say so, first one that is
    /// not connected, since the address is where to look for it; then whoever was met there before.
    pub(super) fn node_at(
        &self,
        address: SocketAddr,
        connected: impl Fn(NodeId) -> bool,
    ) -> Option<NodeId> {
        let met = self.met.get(&address).map(|(node, _)| *node);
        let claimants = || self.claims.get(&address).into_iter().flatten().copied();
        node_behind(address)
            .or_else(|| met.filter(|node| connected(*node)))
            .or_else(|| claimants().find(|node| !connected(*node)))
            .or_else(|| claimants().next())
            .or(met)
    }
}

/// Makes room for one more in place of the oldest: strangers must not be able to fill the memory.
pub(super) fn bound<V, T: Ord>(map: &mut BTreeMap<SocketAddr, V>, age: impl Fn(&V) -> T) {
    if map.len() < REMEMBERED {
        return;
    }
    let oldest = map.iter().min_by_key(|(_, value)| age(value)).map(|(address, _)| *address);
    oldest.and_then(|address| map.remove(&address));
}

const REMEMBERED: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quic::detour::virtual_address;

    #[test]
    fn a_claim_yields_to_who_was_met_there_and_is_still_connected() {
        let mut directory = Directory::default();
        assert_eq!(directory.node_at(address(1), |_| true), None);
        assert_eq!(directory.introduce([(node(1), address(1))].into()), [(node(1), address(1))]);
        assert_eq!(directory.introduce([(node(1), address(1))].into()), []);
        assert_eq!(directory.node_at(address(1), |_| false), Some(node(1)));

        directory.meet(address(1), node(2), Instant::now());
        assert_eq!(directory.node_at(address(1), |_| true), Some(node(2)));
        assert_eq!(directory.node_at(address(1), |_| false), Some(node(1)));
        assert_eq!(directory.claim(node(1)), Some(address(1)));
        assert_eq!(directory.claim(node(2)), None);
    }

    #[test]
    fn of_two_that_say_the_same_the_lost_one_is_sought_there() {
        let mut directory = Directory::default();
        directory.introduce([(node(1), address(1)), (node(2), address(1))].into());
        for lost in [1, 2] {
            let found = directory.node_at(address(1), |other| other != node(lost));
            assert_eq!(found, Some(node(lost)));
        }
    }

    #[test]
    fn a_virtual_address_is_its_nodes_whoever_claims_it() {
        let mut directory = Directory::default();
        let virtually = virtual_address(node(1));
        directory.introduce([(node(2), virtually)].into());
        directory.meet(virtually, node(3), Instant::now());
        assert_eq!(directory.node_at(virtually, |_| true), Some(node(1)));
    }

    #[test]
    fn strangers_cannot_fill_the_memory() {
        let mut directory = Directory::default();
        let begin = Instant::now();
        for n in 0..5000_u16 {
            let at = begin + std::time::Duration::from_millis(n.into());
            directory.meet(([10, 0, 0, 1], n).into(), node(1), at);
        }
        assert_eq!(directory.met.len(), REMEMBERED);
        assert_eq!(directory.node_at(([10, 0, 0, 1], 4999).into(), |_| true), Some(node(1)));
    }

    fn node(n: u8) -> NodeId {
        NodeId::from([n; 16])
    }

    fn address(n: u8) -> SocketAddr {
        ([192, 0, 2, n], 6790).into()
    }
}
