use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use weft_model::{
    Condition, Endpoint, EndpointId, HoldRecord, Label, LoanRecord, NetworkId, NetworkRecord, Node,
    NodeId, NodeState, ServiceRecord, WantRecord,
};

use crate::{Record, replica::Replica, table::Key};

/// All nodes and their records, as this node knows them; its own are among them. Never changes:
/// a change makes a new view that shares the members which did not change.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ClusterView {
    pub members: BTreeMap<NodeId, Arc<Member>>,
}

impl ClusterView {
    /// The view with the members `dirty` made anew, unless that changes nothing. Members that the
    /// replica has forgotten leave it.
    pub(crate) fn refreshed(
        &self,
        dirty: BTreeSet<NodeId>,
        replica: &Replica,
        heard: impl Fn(NodeId) -> bool,
    ) -> Option<Self> {
        let mut members = self.members.clone();
        let mut changed = false;
        for node in dirty {
            if replica.is_forgotten(node) {
                changed |= members.remove(&node).is_some();
                continue;
            }
            let member = Member::assemble(node, heard(node), replica);
            if members.get(&node).is_none_or(|old| **old != member) {
                members.insert(node, Arc::new(member));
                changed = true;
            }
        }
        changed.then_some(Self { members })
    }
}

/// One node and the newest known of its records.
///
/// A suspect member keeps its records: whoever reads them decides what to hide (names, backends)
/// and what to keep (forwarding entries), and all is back at once when the node returns.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Member {
    pub id: NodeId,
    pub liveness: Liveness,
    /// Absent until the node's own record has arrived.
    pub node: Option<Node>,
    pub networks: BTreeMap<NetworkId, NetworkRecord>,
    pub endpoints: BTreeMap<NetworkId, BTreeMap<EndpointId, Endpoint>>,
    pub loans: BTreeMap<NetworkId, LoanRecord>,
    pub holds: BTreeMap<NetworkId, HoldRecord>,
    pub wants: BTreeMap<NetworkId, WantRecord>,
    pub services: BTreeMap<NetworkId, BTreeMap<Label, ServiceRecord>>,
    pub conditions: BTreeMap<NetworkId, BTreeMap<EndpointId, Condition>>,
    /// The draining endpoints that the node sends no new flow to.
    pub drained: BTreeMap<NetworkId, BTreeSet<EndpointId>>,
    /// Keys of a newer version than this one.
    pub unknown_keys: usize,
    /// Values that this version cannot read.
    pub undecodable: usize,
}

/// Whether a member can be reckoned with.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Liveness {
    Alive,
    /// It has not been heard for too long, or not yet.
    Suspect,
    /// It has announced that it stops.
    Left,
}

impl Member {
    pub(crate) fn assemble(id: NodeId, heard: bool, replica: &Replica) -> Self {
        let (unknown_keys, undecodable) = replica.unreadable(id);
        let mut member = Self {
            id,
            liveness: if heard { Liveness::Alive } else { Liveness::Suspect },
            node: None,
            networks: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            loans: BTreeMap::new(),
            holds: BTreeMap::new(),
            wants: BTreeMap::new(),
            services: BTreeMap::new(),
            conditions: BTreeMap::new(),
            drained: BTreeMap::new(),
            unknown_keys,
            undecodable,
        };
        for (key, record) in replica.records(id) {
            member.add(key, record);
        }
        if member.node.as_ref().is_some_and(|node| node.state == NodeState::Leaving) {
            member.liveness = Liveness::Left;
        }
        member
    }

    /// Whether the node takes part in `network`: it carries its definition or has endpoints in it.
    pub fn is_in(&self, network: NetworkId) -> bool {
        self.networks.contains_key(&network) || self.endpoints.contains_key(&network)
    }

    pub(crate) fn has_left(&self) -> bool {
        self.liveness == Liveness::Left
    }

    /// Takes in one record of this member's.
    pub fn add(&mut self, key: Key, record: &Record) {
        match record {
            Record::Node(node) => self.node = Some(node.clone()),
            Record::Network(network) => insert(&mut self.networks, key, network),
            Record::Endpoints(endpoints) => {
                for endpoint in endpoints {
                    let network = self.endpoints.entry(endpoint.network).or_default();
                    network.insert(endpoint.id, endpoint.clone());
                }
            }
            Record::Loan(loans) => insert(&mut self.loans, key, loans),
            Record::Hold(holds) => insert(&mut self.holds, key, holds),
            Record::Want(wants) => insert(&mut self.wants, key, wants),
            Record::Services(services) => {
                let by_name =
                    services.iter().map(|service| (service.name.clone(), service.clone()));
                extend(&mut self.services, key, by_name);
            }
            Record::Conditions(conditions) => {
                let by_endpoint = conditions.iter().map(|state| (state.endpoint, state.clone()));
                extend(&mut self.conditions, key, by_endpoint);
            }
            Record::Drained(endpoints) => insert(&mut self.drained, key, endpoints),
        }
    }
}

fn extend<K: Ord, T>(
    map: &mut BTreeMap<NetworkId, BTreeMap<K, T>>,
    key: Key,
    records: impl Iterator<Item = (K, T)>,
) {
    if let Some(network) = key.network() {
        map.entry(network).or_default().extend(records);
    }
}

fn insert<T: Clone>(map: &mut BTreeMap<NetworkId, T>, key: Key, record: &T) {
    if let Some(network) = key.network() {
        map.insert(network, record.clone());
    }
}
