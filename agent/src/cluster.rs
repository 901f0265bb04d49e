//! What the cluster's records mean: which networks there are, and who has which endpoint.
//!
//! Pure. Every node derives the same from the same records, so conflicts need no negotiation.

mod addresses;
mod fitness;
mod services;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use weft_gossip::{ClusterView, Liveness, Member};
use weft_model::{
    Endpoint, EndpointId, Label, Network, NetworkId, NetworkRecord, Node, NodeId, Vni,
};

pub(crate) use self::services::supersedes;
pub use self::{
    fitness::BackendState,
    services::{Backend, ServiceView},
};

/// The cluster as this node understands it. Immutable.
#[derive(Clone, Debug)]
pub struct Cluster {
    view: Arc<ClusterView>,
    networks: BTreeMap<NetworkId, Arc<Network>>,
    removed: BTreeSet<NetworkId>,
    /// The network that a name stands for.
    names: BTreeMap<Label, NetworkId>,
    /// Networks that must stand back, and the one before which they do.
    conflicts: BTreeMap<NetworkId, NetworkId>,
    endpoints: BTreeMap<NetworkId, Vec<Place>>,
    services: BTreeMap<NetworkId, services::Services>,
}

/// Where an endpoint is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Place {
    node: NodeId,
    endpoint: EndpointId,
}

/// An endpoint, the node that has it, and whether that node can be reached.
#[derive(Clone, Copy, Debug)]
pub struct Placed<'a> {
    pub node: NodeId,
    pub endpoint: &'a Endpoint,
    pub alive: bool,
}

impl Cluster {
    /// Derives the cluster from the records of all members.
    ///
    /// `known` are definitions that this node remembers: a network lives on although none of
    /// those who carry it has been heard yet. `ended` are those whose removal it tells, or is about
    /// to tell.
    pub fn resolve(
        view: Arc<ClusterView>,
        known: &BTreeMap<NetworkId, Network>,
        ended: &BTreeSet<NetworkId>,
    ) -> Self {
        let mut removed = removed(&view);
        removed.extend(ended);
        let networks = networks(&view, known, &removed);
        let (names, conflicts) = settle(&networks);
        let mut endpoints = BTreeMap::new();
        let mut services = BTreeMap::new();
        for network in networks.values() {
            let registers = registers(&view, network.id);
            let places = places(&view, network, &registers);
            services.insert(network.id, services::services(&view, network, &registers, &places));
            endpoints.insert(network.id, places);
        }
        Self { view, networks, removed, names, conflicts, endpoints, services }
    }

    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.view.members.values().map(AsRef::as_ref)
    }

    pub fn member(&self, id: NodeId) -> Option<&Member> {
        self.view.members.get(&id).map(AsRef::as_ref)
    }

    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.member(id)?.node.as_ref()
    }

    /// The node's name; its id where it has not been heard yet.
    pub fn node_name(&self, id: NodeId) -> String {
        self.node(id).map_or_else(|| id.short(), |node| node.name.to_string())
    }

    pub fn is_alive(&self, id: NodeId) -> bool {
        self.member(id).is_some_and(|member| member.liveness == Liveness::Alive)
    }

    pub fn alive(&self) -> BTreeSet<NodeId> {
        self.members().filter(|m| m.liveness == Liveness::Alive).map(|m| m.id).collect()
    }

    pub fn networks(&self) -> impl Iterator<Item = &Arc<Network>> {
        self.networks.values()
    }

    pub fn network(&self, id: NetworkId) -> Option<&Arc<Network>> {
        self.networks.get(&id)
    }

    /// Finds a network by name, id, or the start of an id that only one network has.
    pub fn find_network(&self, text: &str) -> Option<&Arc<Network>> {
        if let Some(id) = text.parse().ok().and_then(|name: Label| self.names.get(&name)) {
            return self.network(*id);
        }
        let mut matches = self
            .networks
            .values()
            .filter(|n| text.len() >= 4 && n.id.to_string().starts_with(text));
        matches.next().filter(|_| matches.next().is_none())
    }

    pub fn is_removed(&self, id: NetworkId) -> bool {
        self.removed.contains(&id)
    }

    /// The network before which `id` stands back, having the same name or VNI.
    pub fn conflict(&self, id: NetworkId) -> Option<&Arc<Network>> {
        self.network(*self.conflicts.get(&id)?)
    }

    /// The endpoints of a network that hold a valid address, on all nodes.
    pub fn endpoints(&self, network: NetworkId) -> impl Iterator<Item = Placed<'_>> {
        let places = self.endpoints.get(&network).into_iter().flatten();
        places.map(move |place| self.placed(network, *place))
    }

    fn placed(&self, network: NetworkId, place: Place) -> Placed<'_> {
        let member = &self.view.members[&place.node];
        Placed {
            node: place.node,
            endpoint: &member.endpoints[&network][&place.endpoint],
            alive: member.liveness == Liveness::Alive,
        }
    }

    /// What the address space of `network` decides from.
    pub fn space_view(&self, network: NetworkId) -> weft_ipam::View<'_> {
        let mut view = registers(&self.view, network);
        for placed in self.endpoints(network) {
            let owner = (placed.node, placed.endpoint.id);
            view.endpoints.extend(placed.endpoint.ips().map(|ip| (ip, owner)));
        }
        for service in self.services(network) {
            let lease = service.definition().and_then(|definition| definition.lease);
            let owner = lease.map(|lease| (lease.node, lease.id));
            view.endpoints.extend(service.vips.iter().zip(owner).map(|(ip, owner)| (*ip, owner)));
        }
        view
    }

    pub fn endpoint_count(&self) -> usize {
        self.endpoints.values().map(Vec::len).sum()
    }
}

fn removed(view: &ClusterView) -> BTreeSet<NetworkId> {
    let records = view.members.values().flat_map(|member| &member.networks);
    records.filter(|(_, record)| **record == NetworkRecord::Removed).map(|(id, _)| *id).collect()
}

fn networks(
    view: &ClusterView,
    known: &BTreeMap<NetworkId, Network>,
    removed: &BTreeSet<NetworkId>,
) -> BTreeMap<NetworkId, Arc<Network>> {
    let heard = view.members.values().flat_map(|member| member.networks.values());
    let heard = heard.filter_map(|record| match record {
        NetworkRecord::Defined(network) => Some(network),
        NetworkRecord::Removed => None,
    });
    let mut networks: BTreeMap<NetworkId, Arc<Network>> = BTreeMap::new();
    // Of what is another host's alone nothing is to be heard.
    let heard = heard.filter(|network| !network.driver.is_local());
    for network in known.values().chain(heard).filter(|network| !removed.contains(&network.id)) {
        let first = networks.entry(network.id).or_insert_with(|| Arc::new(network.clone()));
        // A definition never changes, and all who carry it repeat it. Whoever says otherwise must
        // not bring a host that hears of the network for the first time to send it in clear.
        if network.encrypted && !first.encrypted && !first.driver.is_local() {
            Arc::make_mut(first).encrypted = true;
        }
    }
    networks
}

/// Settles who has a name, a VNI or a tag that two networks claim: an encrypted one, so that nobody
/// is led to a plain one by its name, then the lower id. Only two sides of a partition, or two hosts
/// in the same moment, can claim the same name or VNI.
///
/// A network of this host alone goes behind those of all hosts, which must agree on them.
fn settle(
    networks: &BTreeMap<NetworkId, Arc<Network>>,
) -> (BTreeMap<Label, NetworkId>, BTreeMap<NetworkId, NetworkId>) {
    let mut names = BTreeMap::new();
    let mut vnis: BTreeMap<Vni, NetworkId> = BTreeMap::new();
    let mut tags: BTreeMap<[u8; 4], NetworkId> = BTreeMap::new();
    let mut conflicts = BTreeMap::new();
    let (local, mut shared): (Vec<_>, Vec<_>) =
        networks.values().partition(|network| network.driver.is_local());
    shared.sort_by_key(|network| !network.encrypted);
    for network in shared.into_iter().chain(local) {
        let name = *names.entry(network.name.clone()).or_insert(network.id);
        let vni = match network.driver.is_local() {
            true => network.id,
            false => *vnis.entry(network.vni).or_insert(network.id),
        };
        let tag = match sealed_tag(network) {
            Some(tag) => *tags.entry(tag).or_insert(network.id),
            None => network.id,
        };
        if let Some(before) = [vni, tag, name].into_iter().find(|id| *id != network.id) {
            conflicts.insert(network.id, before);
        }
    }
    (names, conflicts)
}

/// What names an encrypted network inside a sealed packet.
fn sealed_tag(network: &Network) -> Option<[u8; 4]> {
    network.encrypted.then(|| *network.id.as_bytes().first_chunk().expect("an id has 16 bytes"))
}

/// Whether packets of one of the two networks could be taken for packets of the other.
pub(crate) fn is_mistakable(one: &Network, other: &Network) -> bool {
    if one.driver.is_local() || other.driver.is_local() {
        return false;
    }
    one.vni == other.vni || sealed_tag(one).is_some_and(|tag| sealed_tag(other) == Some(tag))
}

/// The endpoints that the lenders' registers confirm. Of two nodes that claim the same endpoint,
/// the higher sequence number has it, then the lower node id (RFC 7432 §7.7, with our tie rule).
fn places(view: &ClusterView, network: &Network, registers: &weft_ipam::View<'_>) -> Vec<Place> {
    let mut claims: BTreeMap<EndpointId, (u64, NodeId)> = BTreeMap::new();
    for member in view.members.values().filter(|m| m.liveness != Liveness::Left) {
        for endpoint in member.endpoints.get(&network.id).into_iter().flat_map(|m| m.values()) {
            let granted = endpoint
                .addresses
                .iter()
                .all(|grant| weft_ipam::accepts(network, member.id, grant, registers));
            if !granted {
                continue;
            }
            let claim = claims.entry(endpoint.id).or_insert((endpoint.seq, member.id));
            if endpoint.seq > claim.0 {
                *claim = (endpoint.seq, member.id);
            }
        }
    }
    claims.into_iter().map(|(endpoint, (_, node))| Place { node, endpoint }).collect()
}

/// The registers of one network, as all members have published them.
fn registers(view: &ClusterView, network: NetworkId) -> weft_ipam::View<'_> {
    let mut registers = weft_ipam::View::default();
    for member in view.members.values() {
        let id = member.id;
        registers.loans.extend(member.loans.get(&network).map(|record| (id, record)));
        registers.holds.extend(member.holds.get(&network).map(|record| (id, record)));
        registers.wants.extend(member.wants.get(&network).map(|record| (id, record)));
        if member.liveness == Liveness::Alive {
            registers.live.insert(id);
        }
    }
    registers
}

#[cfg(test)]
mod tests {
    use weft_model::Driver;

    use super::*;
    use crate::fixture::{Builder, endpoint, network, network_id, node_id};

    fn names(cluster: &Cluster, id: NetworkId) -> Vec<(String, NodeId, bool)> {
        let mut names: Vec<_> =
            cluster.endpoints(id).map(|p| (p.endpoint.name.to_string(), p.node, p.alive)).collect();
        names.sort();
        names
    }

    #[test]
    fn a_network_removed_here_has_ended_before_anybody_heard() {
        let app = network(1, "app");
        let view = Builder::default().node(1).node(2).network(2, &app).view();
        let known = BTreeMap::from([(app.id, app.clone())]);
        let cluster = Cluster::resolve(view, &known, &BTreeSet::from([app.id]));
        assert!(cluster.find_network("app").is_none());
        assert!(cluster.is_removed(app.id));
    }

    #[test]
    fn an_endpoint_counts_only_if_its_lender_agrees() {
        let app = network(1, "app");
        let forged = endpoint(&app, "forged", "10.1.0.9");
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &app)
            .endpoint(2, &app, "web", "10.1.0.8")
            .change(2, |m| {
                m.endpoints.get_mut(&app.id).unwrap().insert(forged.id, forged.clone());
            })
            .build();
        assert_eq!(names(&cluster, app.id), [("web".into(), node_id(2), true)]);
    }

    #[test]
    fn a_silent_node_keeps_its_endpoints_but_they_are_not_alive() {
        let app = network(1, "app");
        let built = |liveness| {
            Builder::default()
                .node(1)
                .node(2)
                .network(1, &app)
                .endpoint(2, &app, "web", "10.1.0.8")
                .change(2, |m| m.liveness = liveness)
                .build()
        };
        assert_eq!(names(&built(Liveness::Suspect), app.id), [("web".into(), node_id(2), false)]);
        assert!(names(&built(Liveness::Left), app.id).is_empty());
    }

    #[test]
    fn of_two_claims_to_one_endpoint_the_higher_sequence_wins_then_the_lower_node() {
        let app = network(1, "app");
        let claim = |first: u64, second: u64| {
            let mut cluster = Builder::default().node(1).node(2).node(3).network(1, &app);
            // Only one node can hold the address, so the claims differ in the address too.
            cluster =
                cluster.endpoint(2, &app, "web", "10.1.0.8").endpoint(3, &app, "web", "10.1.0.9");
            let id = endpoint(&app, "web", "10.1.0.8").id;
            for (n, seq) in [(2, first), (3, second)] {
                cluster = cluster.change(n, |m| {
                    let all = m.endpoints.get_mut(&app.id).unwrap();
                    let (_, mut endpoint) = all.pop_first().unwrap();
                    endpoint.seq = seq;
                    endpoint.id = id;
                    all.insert(id, endpoint);
                });
            }
            names(&cluster.build(), app.id)
        };
        assert_eq!(claim(0, 1), [("web".into(), node_id(3), true)]);
        assert_eq!(claim(2, 1), [("web".into(), node_id(2), true)]);
        assert_eq!(claim(1, 1), [("web".into(), node_id(2), true)]);
    }

    #[test]
    fn a_removed_network_is_gone_whoever_still_carries_it() {
        let app = network(1, "app");
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &app)
            .change(2, |m| {
                m.networks.insert(app.id, NetworkRecord::Removed);
            })
            .build();
        assert!(cluster.network(app.id).is_none());
        assert!(cluster.is_removed(app.id));
    }

    #[test]
    fn no_member_can_take_the_encryption_off_a_network() {
        let secret = Network { encrypted: true, ..network(1, "secret") };
        let plain = Network { encrypted: false, ..secret.clone() };
        for [first, second] in [[&plain, &secret], [&secret, &plain]] {
            let cluster = Builder::default().node(1).node(2).network(1, first).network(2, second);
            let view = cluster.view();
            for known in [None, Some(&plain), Some(&secret)] {
                let known = known.into_iter().map(|network| (network.id, network.clone()));
                let cluster =
                    Cluster::resolve(Arc::clone(&view), &known.collect(), &BTreeSet::new());
                assert_eq!(cluster.network(secret.id).map(AsRef::as_ref), Some(&secret));
            }
        }
    }

    #[test]
    fn of_two_networks_with_one_name_or_vni_the_lower_id_has_it() {
        let (first, mut second, mut third) =
            (network(1, "app"), network(2, "app"), network(3, "db"));
        second.creator = node_id(2);
        third.vni = first.vni;
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(2, &second)
            .network(1, &first)
            .network(2, &third)
            .build();
        assert_eq!(cluster.find_network("app").unwrap().id, first.id);
        assert_eq!(cluster.conflict(second.id).unwrap().id, first.id);
        assert_eq!(cluster.conflict(third.id).unwrap().id, first.id);
        assert!(cluster.conflict(first.id).is_none());
    }

    #[test]
    fn a_plain_network_never_takes_the_name_of_an_encrypted_one() {
        let secret = Network { encrypted: true, ..network(2, "secret") };
        let plain = network(1, "secret");
        let cluster = Builder::default().node(1).network(1, &plain).network(1, &secret).build();
        assert_eq!(cluster.find_network("secret").unwrap().id, secret.id);
        assert_eq!(cluster.conflict(plain.id).unwrap().id, secret.id);
        assert!(cluster.conflict(secret.id).is_none());
    }

    #[test]
    fn of_two_encrypted_networks_that_packets_cannot_tell_apart_the_lower_id_goes_before() {
        let near = NetworkId::from([1, 1, 1, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]);
        let conflict = |encrypted: [bool; 2]| {
            let first = Network { encrypted: encrypted[0], ..network(1, "app") };
            let second = Network { id: near, encrypted: encrypted[1], ..network(2, "db") };
            let networks = Builder::default().node(1).network(1, &first).network(1, &second);
            networks.build().conflict(near).map(|before| before.id)
        };
        assert_eq!(conflict([true, true]), Some(network_id(1)));
        assert_eq!(conflict([true, false]), None);
        assert_eq!(conflict([false, false]), None);
    }

    #[test]
    fn a_network_of_one_host_goes_behind_those_of_all_and_no_member_has_a_part_in_it() {
        let (shared, other) = (network(2, "app"), network(3, "db"));
        let local = Network { driver: Driver::Bridge, vni: other.vni, ..network(1, "app") };
        let foreign = Network { driver: Driver::Bridge, ..network(4, "foreign") };
        let view = Builder::default()
            .node(1)
            .node(2)
            .network(2, &shared)
            .network(2, &other)
            .network(2, &foreign)
            .network(2, &Network { encrypted: true, ..network(1, "app") })
            .view();
        let known = BTreeMap::from([(local.id, local.clone())]);
        let cluster = Cluster::resolve(view, &known, &BTreeSet::new());
        assert_eq!(cluster.find_network("app").unwrap().id, shared.id);
        assert_eq!(cluster.conflict(local.id).unwrap().id, shared.id);
        assert!(cluster.conflict(other.id).is_none());
        assert_eq!(cluster.network(local.id).map(AsRef::as_ref), Some(&local));
        assert!(cluster.network(foreign.id).is_none());
    }

    #[test]
    fn a_network_is_found_by_name_id_or_unique_start_of_its_id() {
        let cluster = Builder::default()
            .node(1)
            .network(1, &network(1, "app"))
            .network(1, &network(2, "db"))
            .build();
        let found = |text: &str| cluster.find_network(text).map(|n| n.id);
        assert_eq!(found("APP"), Some(network_id(1)));
        assert_eq!(found(&network_id(2).to_string()), Some(network_id(2)));
        assert_eq!(found("0202"), Some(network_id(2)));
        assert_eq!(found("02"), None);
        assert_eq!(found("web"), None);
    }
}
