//! What is told of encryption: pure readings of the tunnel's status.

use std::collections::{BTreeMap, BTreeSet};

use weft_model::{Label, Network, NodeId, Sealing};
use weft_seal::{Counters, OffloadStatus, PathStatus, PeerStatus, TunnelStatus};
use weft_vxlan::{Carriage, Missing, Status};

use crate::{
    api::types::{EncryptionStatus, OffloadReport, SealedNetwork, SealedPeer},
    cluster::{Cluster, is_mistakable},
    ledger::Snapshot,
};

/// What a report is made of.
pub(crate) struct Readings<'a> {
    pub(crate) snapshot: &'a Snapshot,
    /// What this node offers, or why it has no tunnel.
    pub(crate) offer: Result<Sealing, &'a Missing>,
    pub(crate) tunnel: &'a TunnelStatus,
    pub(crate) counters: &'a Counters,
    pub(crate) plane: &'a Status,
}

impl Readings<'_> {
    pub(crate) fn status(&self) -> EncryptionStatus {
        let mut peers: Vec<_> =
            self.tunnel.peers.iter().map(|(id, peer)| self.peer(*id, peer)).collect();
        peers.sort_by(|a, b| a.node.cmp(&b.node));
        EncryptionStatus {
            available: self.offer.is_ok(),
            reason: self.offer.as_ref().err().map(|missing| why(missing)),
            offer: self.offer.as_ref().ok().cloned(),
            sockets: self.tunnel.sockets.clone(),
            warnings: self.tunnel.warnings.clone(),
            offloads: self.tunnel.offloads.iter().map(offload).collect(),
            peers,
            networks: self.networks().map(|network| self.network(network)).collect(),
        }
    }

    /// The encrypted networks that have endpoints here.
    fn networks(&self) -> impl Iterator<Item = &Network> {
        let Snapshot { cluster, book, .. } = self.snapshot;
        let here = book.active();
        let encrypted = cluster.networks().filter(|network| network.encrypted);
        encrypted.filter(move |network| here.contains(&network.id)).map(AsRef::as_ref)
    }

    fn peer(&self, id: NodeId, peer: &PeerStatus) -> SealedPeer {
        let (address, via) = match peer.path {
            PathStatus::Direct(address) | PathStatus::Observed(address) => (Some(address), None),
            PathStatus::Relay { via } => (None, Some(self.snapshot.cluster.node_name(via))),
            PathStatus::Down => (None, None),
        };
        SealedPeer {
            node: peer.name.clone(),
            node_id: id,
            path: peer.path.as_str().into(),
            address,
            via,
            confirmed: peer.confirmed,
            suite: peer.suite,
            rtt_ms: peer.rtt.map(|rtt| rtt.as_secs_f64() * 1e3),
            path_mtu: peer.path_mtu,
            epoch: peer.epoch,
            rekeys: peer.rekeys,
            fault: fault(peer),
        }
    }

    fn network(&self, network: &Network) -> SealedNetwork {
        let fault = self.network_fault(network);
        let unreachable = match fault {
            Some(_) => BTreeMap::new(),
            None => self.unreachable(network),
        };
        let traffic = self.counters.networks.get(&network.id).cloned().unwrap_or_default();
        SealedNetwork {
            network: network.name.clone(),
            network_id: network.id,
            carried: fault.is_none(),
            fault,
            unreachable,
            sealed_packets: traffic.sealed_packets,
            opened_packets: traffic.opened_packets,
            drops: traffic.drops.iter().map(|(why, n)| (why.as_str().into(), *n)).collect(),
        }
    }

    /// Why nothing of `network` leaves this host.
    fn network_fault(&self, network: &Network) -> Option<String> {
        if let Err(missing) = &self.offer {
            return Some(format!("this host has no encryption: {}", why(missing)));
        }
        let before = self.snapshot.cluster.conflict(network.id);
        if let Some(before) = before.filter(|before| is_mistakable(before, network)) {
            return Some(format!(
                "it stands back before {} ({}): remove one of them",
                before.name,
                before.id.short()
            ));
        }
        let plane = self.plane.networks.get(&network.id);
        match plane.and_then(|plane| plane.carriage) {
            Some(Carriage::Sealed { served: true }) => {
                self.tunnel.networks.get(&network.id)?.fault.clone()
            }
            Some(
                Carriage::Sealed { served: false }
                | Carriage::Vxlan
                | Carriage::Local
                | Carriage::Macvlan,
            )
            | None => {
                let tables = plane.into_iter().flat_map(|plane| plane.tables.values());
                let error = tables.filter_map(|table| table.error.clone()).next();
                Some(error.unwrap_or_else(|| "its TAP is not there yet".into()))
            }
        }
    }

    /// The nodes that have endpoints in `network` and are not reached, and why.
    fn unreachable(&self, network: &Network) -> BTreeMap<Label, String> {
        let Snapshot { me, cluster, .. } = self.snapshot;
        let nodes: BTreeSet<_> = cluster.endpoints(network.id).map(|placed| placed.node).collect();
        let others = nodes.into_iter().filter(|node| node != me);
        others.filter_map(|node| self.unreached(cluster, node)).collect()
    }

    fn unreached(&self, cluster: &Cluster, node: NodeId) -> Option<(Label, String)> {
        let name: Label = cluster.node_name(node).parse().expect("names and short ids are labels");
        match self.tunnel.peers.get(&node) {
            Some(peer) => Some((name, fault(peer)?)),
            None => {
                let fault = format!("the tunnel has not heard of {name} yet");
                Some((name, fault))
            }
        }
    }
}

/// What of encryption an operator should look at.
pub(crate) fn findings(status: &EncryptionStatus) -> impl Iterator<Item = String> {
    let networks = status.networks.iter().flat_map(|network| {
        let name = &network.network;
        let failed = network.fault.iter().map(move |fault| {
            format!("encrypted network {name} has failed closed on this host: {fault}")
        });
        failed.chain(network.unreachable.iter().map(move |(node, fault)| {
            format!("encrypted network {name} does not reach node {node}: {fault}")
        }))
    });
    networks.chain(status.warnings.iter().cloned())
}

fn why(missing: &Missing) -> String {
    format!("{}: {}", missing.reason, missing.remedy)
}

fn fault(peer: &PeerStatus) -> Option<String> {
    let silent = || match (peer.confirmed, peer.path) {
        (true, PathStatus::Down) => Some(format!("no path to {} works", peer.name)),
        (false, _) => Some(format!("{} has not proved its key yet", peer.name)),
        (true, _) => None,
    };
    peer.fault.clone().or_else(silent)
}

fn offload(status: &OffloadStatus) -> OffloadReport {
    OffloadReport {
        offload: status.offload.as_str().into(),
        on: status.state.is_on(),
        state: status.state.to_string(),
        used: status.used,
        refused: status.refused,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use weft_seal::CarriedStatus;

    use super::*;
    use crate::fixture::{Builder, book_with, network, network_id, node_id};

    struct Case {
        snapshot: Snapshot,
        missing: Option<Missing>,
        tunnel: TunnelStatus,
        counters: Counters,
        plane: Status,
    }

    impl Case {
        fn status(&self) -> EncryptionStatus {
            let offer = Sealing { port: 6791, lanes: 1, suites: Vec::new(), relay: true };
            let offer = match &self.missing {
                None => Ok(offer),
                Some(missing) => Err(missing),
            };
            let Self { snapshot, tunnel, counters, plane, .. } = self;
            Readings { snapshot, offer, tunnel, counters, plane }.status()
        }

        fn findings(&self) -> Vec<String> {
            findings(&self.status()).collect()
        }
    }

    /// Node 1 with an endpoint in an encrypted network that all is well with, node 2 in it too.
    fn well() -> Case {
        let secret = Network { encrypted: true, ..network(1, "secret") };
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &secret)
            .endpoint(1, &secret, "web", "10.1.0.8")
            .endpoint(2, &secret, "db", "10.1.0.9")
            .build();
        let book = book_with(&secret, "web", "10.1.0.8");
        let mut plane = Status::default();
        let carriage = Some(Carriage::Sealed { served: true });
        let there = weft_vxlan::NetworkStatus { carriage, ..Default::default() };
        plane.networks.insert(secret.id, there);
        let mut tunnel = TunnelStatus::default();
        let carried = CarriedStatus { tap: "tap0".into(), queues: 1, fault: None };
        tunnel.networks.insert(secret.id, carried);
        tunnel.peers.insert(node_id(2), reached());
        Case {
            snapshot: Snapshot {
                me: node_id(1),
                cluster: Arc::new(cluster),
                book: Arc::new(book),
                warming_up: false,
            },
            missing: None,
            tunnel,
            counters: Counters::default(),
            plane,
        }
    }

    fn reached() -> PeerStatus {
        PeerStatus {
            name: "h2".parse().unwrap(),
            address: [192, 0, 2, 2].into(),
            path: PathStatus::Direct("192.0.2.2:6791".parse().unwrap()),
            confirmed: true,
            suite: None,
            rtt: Some(Duration::from_micros(300)),
            path_mtu: Some(1500),
            epoch: 0,
            rekeys: 0,
            fault: None,
        }
    }

    #[test]
    fn a_network_that_reaches_everybody_is_carried_and_nothing_is_to_be_found() {
        let case = well();
        let status = case.status();
        assert!(status.available && status.networks[0].carried, "{status:?}");
        assert_eq!(status.peers[0].address, Some("192.0.2.2:6791".parse().unwrap()));
        assert_eq!(case.findings(), Vec::<String>::new());
    }

    #[test]
    fn every_reason_for_carrying_nothing_is_told_by_its_network() {
        let missing = Missing { feature: "encryption", remedy: "set it", reason: "off".into() };
        let off = Case { missing: Some(missing), ..well() };

        let mut without_tap = well();
        let plane = without_tap.plane.networks.get_mut(&network_id(1)).unwrap();
        plane.carriage = Some(Carriage::Sealed { served: false });

        let mut refused = well();
        let carried = refused.tunnel.networks.get_mut(&network_id(1)).unwrap();
        carried.fault = Some("the tag is another network's too".into());

        for (case, words) in [
            (off, "this host has no encryption: off: set it"),
            (without_tap, "its TAP is not there yet"),
            (refused, "the tag is another network's too"),
        ] {
            let network = &case.status().networks[0];
            assert!(!network.carried && network.fault.as_deref() == Some(words), "{network:?}");
            let expected =
                format!("encrypted network secret has failed closed on this host: {words}");
            assert_eq!(case.findings(), [expected]);
        }
    }

    #[test]
    fn a_node_that_is_not_reached_is_told_with_the_reason_while_the_network_is_carried() {
        let peer = |change: fn(&mut PeerStatus)| {
            let mut case = well();
            change(case.tunnel.peers.get_mut(&node_id(2)).unwrap());
            case
        };
        let mut unheard = well();
        unheard.tunnel.peers.clear();
        for (case, words) in [
            (peer(|p| p.fault = Some("no session".into())), "no session"),
            (peer(|p| p.path = PathStatus::Down), "no path to h2 works"),
            (peer(|p| p.confirmed = false), "h2 has not proved its key yet"),
            (unheard, "the tunnel has not heard of h2 yet"),
        ] {
            assert!(case.status().networks[0].carried);
            let expected = format!("encrypted network secret does not reach node h2: {words}");
            assert_eq!(case.findings(), [expected]);
        }
    }

    #[test]
    fn a_relayed_peer_is_told_with_the_name_of_the_relay() {
        let mut case = well();
        case.tunnel.peers.get_mut(&node_id(2)).unwrap().path =
            PathStatus::Relay { via: node_id(1) };
        let peer = &case.status().peers[0];
        assert_eq!((peer.path.as_str(), peer.via.as_deref()), ("relay", Some("h1")));
    }
}
