use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use weft_gossip::{Bucket, ClusterView, Key, Member, Record};
use weft_ipam::Ipam;
use weft_model::{
    Condition, Endpoint, EndpointId, Network, NetworkId, NetworkRecord, Node, NodeId, ServiceRecord,
};

use crate::ledger::book::{Book, EndpointState};

/// The draining endpoints that a node sends no new connection to, by network.
pub type Drained = BTreeMap<NetworkId, BTreeSet<EndpointId>>;

/// The records of a node's own key space.
#[derive(Clone, Debug, Default)]
pub struct OwnRecords {
    /// What everybody is told.
    pub public: BTreeMap<Key, Record>,
    /// What is of this host alone: the records of its local networks.
    pub private: BTreeMap<Key, Record>,
}

/// Everything that this node says.
pub fn own_records(
    me: NodeId,
    node: &Node,
    book: &Book,
    spaces: &BTreeMap<NetworkId, Ipam>,
) -> OwnRecords {
    let is_private = |key: &Key| {
        let network = key.network().and_then(|id| book.networks.get(&id));
        network.is_some_and(|network| network.driver.is_local())
    };
    let mut all = all_records(me, node, book, spaces);
    all.extend(service_records(book));
    let is_known = |id: &NetworkId| book.networks.contains_key(id);
    let drained = book.drained.iter().filter(|(id, _)| is_known(id));
    all.extend(drained.map(|(id, gone)| (Key::Drained(*id), Record::Drained(gone.clone()))));
    let all = all.into_iter();
    let (private, public) = all.partition(|(key, _)| is_private(key));
    OwnRecords { public, private }
}

/// The view, as it would be if this node had told everybody what is `private`: so a network of one
/// host comes to its names and addresses by the same rules as those of all hosts.
pub fn with_private(
    view: &Arc<ClusterView>,
    me: NodeId,
    private: &BTreeMap<Key, Record>,
) -> Arc<ClusterView> {
    let Some(member) = view.members.get(&me).filter(|_| !private.is_empty()) else {
        return Arc::clone(view);
    };
    let mut member = Member::clone(member);
    for (key, record) in private {
        member.add(*key, record);
    }
    let mut whole = ClusterView::clone(view);
    whole.members.insert(me, Arc::new(member));
    Arc::new(whole)
}

fn all_records(
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
        let endpoint = Endpoint { default_route: local.default_route, ..local.endpoint.clone() };
        buckets.entry(key).or_default().push(endpoint);
    }
    records.extend(buckets.into_iter().map(|(key, bucket)| (key, Record::Endpoints(bucket))));
    records
}

/// What this node says about services and about the state of its endpoints.
fn service_records(book: &Book) -> BTreeMap<Key, Record> {
    let mut services: BTreeMap<Key, Vec<ServiceRecord>> = BTreeMap::new();
    for (network, known) in &book.services {
        for (name, record) in known {
            let key = Key::Services(*network, Bucket::named(name));
            services.entry(key).or_default().push(record.clone());
        }
    }
    let mut conditions: BTreeMap<Key, Vec<Condition>> = BTreeMap::new();
    for local in book.endpoints.values().filter(|e| e.state == EndpointState::Attached) {
        let Endpoint { id, network, .. } = local.endpoint;
        let condition = Condition {
            endpoint: id,
            draining: book.is_draining(id),
            verdicts: book.verdicts.get(&id).cloned().unwrap_or_default(),
        };
        if condition.draining || !condition.verdicts.is_empty() {
            conditions.entry(Key::Conditions(network, Bucket::of(id))).or_default().push(condition);
        }
    }
    let services = services.into_iter().map(|(key, bucket)| (key, Record::Services(bucket)));
    let conditions = conditions.into_iter().map(|(key, bucket)| (key, Record::Conditions(bucket)));
    services.chain(conditions).collect()
}

/// Whether this node repeats the definition of `network`: so a network is known as long as one of
/// those lives who made it, lend its addresses or have endpoints in it.
fn carries(me: NodeId, active: &BTreeSet<NetworkId>, network: &Network) -> bool {
    network.creator == me || network.lenders.contains(&me) || active.contains(&network.id)
}

#[cfg(test)]
mod tests {
    use weft_model::Driver;

    use super::*;
    use crate::{
        cluster::Cluster,
        fixture::{Builder, book_with, network, node_id},
    };

    #[test]
    fn a_network_of_this_host_is_told_to_nobody_and_known_here() {
        let local = Network { driver: Driver::Bridge, ..network(1, "local") };
        let mut book = book_with(&local, "web", "10.1.0.8");
        for network in [&local, &network(2, "app")] {
            book.networks.insert(network.id, network.clone());
        }
        let view = Builder::default().node(1).node(2).endpoint(1, &local, "web", "10.1.0.8").view();
        let space = Ipam::new(Arc::new(local.clone()), node_id(1), Default::default());
        let node = view.members[&node_id(1)].node.clone().unwrap();
        let spaces = BTreeMap::from([(local.id, space)]);
        let own = own_records(node_id(1), &node, &book, &spaces);
        assert!(own.public.keys().all(|key| key.network() != Some(local.id)), "{own:?}");
        assert!(own.public.contains_key(&Key::Node));
        assert!(own.private.keys().all(|key| key.network() == Some(local.id)), "{own:?}");

        let told = Builder::default().node(1).node(2).view();
        let whole = with_private(&told, node_id(1), &own.private);
        let (known, ended) = (BTreeMap::new(), BTreeSet::new());
        let cluster = Cluster::resolve(whole, &book.networks, &ended);
        assert_eq!(cluster.find_network("local").unwrap().id, local.id);
        let member = cluster.member(node_id(1)).unwrap();
        assert_eq!(member.endpoints[&local.id].len(), 1);
        // Nobody else has a part in it.
        assert!(Cluster::resolve(told, &known, &ended).find_network("local").is_none());
    }
}
