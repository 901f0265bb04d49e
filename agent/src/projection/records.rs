use std::collections::{BTreeMap, BTreeSet};

use weft_gossip::{Bucket, Key, Record};
use weft_ipam::Ipam;
use weft_model::{Endpoint, Network, NetworkId, NetworkRecord, Node, NodeId};

use crate::ledger::book::{Book, EndpointState};

/// Everything that this node says: the records of its own key space.
pub fn own_records(
    me: NodeId,
    node: &Node,
    book: &Book,
    spaces: &BTreeMap<NetworkId, Ipam>,
) -> BTreeMap<Key, Record> {
    let mut records = BTreeMap::from([(Key::Node, Record::Node(node.clone()))]);

    let active = book.active();
    for network in book.networks.values().filter(|network| carries(me, &active, network)) {
        let record = NetworkRecord::Defined(network.clone());
        records.insert(Key::Network(network.id), Record::Network(record));
    }
    for network in &book.removed {
        records.insert(Key::Network(*network), Record::Network(NetworkRecord::Removed));
    }
    for (network, space) in spaces {
        let own = space.records();
        records.insert(Key::Loan(*network), Record::Loan(own.loans.clone()));
        records.insert(Key::Hold(*network), Record::Hold(own.holds.clone()));
        records.insert(Key::Want(*network), Record::Want(own.wants.clone()));
    }
    let mut buckets: BTreeMap<Key, Vec<Endpoint>> = BTreeMap::new();
    for local in book.endpoints.values().filter(|e| e.state == EndpointState::Attached) {
        let Endpoint { id, network, .. } = local.endpoint;
        let key = Key::Endpoints(network, Bucket::of(id));
        buckets.entry(key).or_default().push(local.endpoint.clone());
    }
    records.extend(buckets.into_iter().map(|(key, bucket)| (key, Record::Endpoints(bucket))));
    records
}

/// Whether this node repeats the definition of `network`: so a network is known as long as one of
/// those lives who made it, lend its addresses or have endpoints in it.
fn carries(me: NodeId, active: &BTreeSet<NetworkId>, network: &Network) -> bool {
    network.creator == me || network.lenders.contains(&me) || active.contains(&network.id)
}
