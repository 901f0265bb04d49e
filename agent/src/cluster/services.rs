//! Which services there are, and who serves them.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
};

use weft_gossip::{ClusterView, Liveness};
use weft_model::{
    AddressGrant, Condition, Endpoint, Label, Network, NetworkId, NodeId, PublishMode, Service,
    ServiceRecord, ServiceState,
};

use super::{
    Cluster, Place, Placed,
    addresses::confirmed,
    fitness::{BackendState, condition, fitness, state},
};

/// A service of a network, as every node understands it.
#[derive(Clone, Copy, Debug)]
pub struct ServiceView<'a> {
    pub name: &'a Label,
    pub network: NetworkId,
    /// The revision that holds; absent where nobody declared the service and endpoints call
    /// themselves members of it.
    pub record: Option<&'a ServiceRecord>,
    /// The virtual addresses that the lender's registers confirm.
    pub vips: &'a [IpAddr],
    cluster: &'a Cluster,
    backends: &'a [(Place, BackendState)],
}

impl<'a> ServiceView<'a> {
    /// What was declared; nothing if it is implied.
    pub fn definition(&self) -> Option<&'a Service> {
        defined(self.record?)
    }

    /// Every endpoint that serves it, or would if it could, on all nodes.
    pub fn backends(&self) -> impl Iterator<Item = Backend<'a>> + use<'a> {
        let (cluster, network) = (self.cluster, self.network);
        self.backends.iter().map(move |(place, state)| {
            let Placed { node, endpoint, .. } = cluster.placed(network, *place);
            Backend { node, endpoint, state }
        })
    }

    /// Whether a backend gets new connections. One whose node is not heard counts `as_remembered`, or
    /// not at all.
    pub fn gets_connections(&self, backend: &Backend<'_>, as_remembered: bool) -> bool {
        match backend.state {
            BackendState::Ready => true,
            BackendState::Unreachable => as_remembered && self.is_fit(backend),
            BackendState::Starting | BackendState::Unhealthy(_) | BackendState::Draining => false,
        }
    }

    /// Whether a backend would be ready if only its node were heard.
    fn is_fit(&self, backend: &Backend<'_>) -> bool {
        let Some(member) = self.cluster.member(backend.node) else { return false };
        let condition = condition(member, backend.endpoint);
        fitness(condition, self.name, self.definition()).is_ready()
    }

    /// Whether it is reached at a port of every host, which therefore all carry its network.
    pub fn is_ingress(&self) -> bool {
        let published = self.definition().into_iter().flat_map(|service| &service.published);
        published.into_iter().any(|port| port.mode == PublishMode::Ingress)
    }
}

/// An endpoint that serves.
#[derive(Clone, Copy, Debug)]
pub struct Backend<'a> {
    pub node: NodeId,
    pub endpoint: &'a Endpoint,
    pub state: &'a BackendState,
}

/// What was derived of one service.
#[derive(Clone, Debug, Default)]
pub(super) struct Derived {
    /// The member whose word is repeated: of several that say the same, any.
    teller: Option<NodeId>,
    vips: Vec<IpAddr>,
    backends: Vec<(Place, BackendState)>,
}

/// The services of one network, removed ones apart.
#[derive(Clone, Debug, Default)]
pub(super) struct Services {
    standing: BTreeMap<Label, Derived>,
    removed: BTreeMap<Label, NodeId>,
}

impl Cluster {
    /// The services of a network, by name: the declared ones, and those that endpoints imply.
    pub fn services(&self, network: NetworkId) -> impl Iterator<Item = ServiceView<'_>> {
        let services = self.services.get(&network).into_iter();
        services
            .flat_map(|services| &services.standing)
            .map(move |(name, derived)| self.service_view(network, name, derived))
    }

    pub fn service(&self, network: NetworkId, name: &Label) -> Option<ServiceView<'_>> {
        let (name, derived) = self.services.get(&network)?.standing.get_key_value(name)?;
        Some(self.service_view(network, name, derived))
    }

    fn service_view<'a>(
        &'a self,
        network: NetworkId,
        name: &'a Label,
        derived: &'a Derived,
    ) -> ServiceView<'a> {
        ServiceView {
            name,
            network,
            record: derived.teller.and_then(|node| self.said(network, name, node)),
            vips: &derived.vips,
            cluster: self,
            backends: &derived.backends,
        }
    }

    /// The revisions that hold in a network, removals among them.
    pub fn service_records(&self, network: NetworkId) -> impl Iterator<Item = &ServiceRecord> {
        let services = self.services.get(&network).into_iter();
        services.flat_map(move |services| {
            let standing = services.standing.iter();
            let standing = standing.filter_map(|(name, derived)| Some((name, derived.teller?)));
            let removed = services.removed.iter().map(|(name, teller)| (name, *teller));
            standing
                .chain(removed)
                .filter_map(move |(name, teller)| self.said(network, name, teller))
        })
    }

    /// The revision of a name that holds, a removal or not.
    pub fn service_record(&self, network: NetworkId, name: &Label) -> Option<&ServiceRecord> {
        let services = self.services.get(&network)?;
        let standing = services.standing.get(name).and_then(|derived| derived.teller);
        let teller = standing.or_else(|| services.removed.get(name).copied())?;
        self.said(network, name, teller)
    }

    fn said(&self, network: NetworkId, name: &Label, node: NodeId) -> Option<&ServiceRecord> {
        self.member(node)?.services.get(&network)?.get(name)
    }

    /// What the node of an endpoint says of its state.
    pub fn condition(&self, placed: &Placed<'_>) -> Option<&Condition> {
        condition(self.member(placed.node)?, placed.endpoint)
    }

    /// Whether some service of the network is reached at a port of every host that carries it:
    /// nothing comes into a network that is internal, or of one host alone.
    pub fn has_ingress(&self, network: NetworkId) -> bool {
        let open = |network: &Network| !network.internal && !network.driver.is_local();
        self.network(network).is_some_and(|network| open(network))
            && self.services(network).any(|service| service.is_ingress())
    }

    /// Whether every node is to carry the network, for such a service. No node is drawn into one that
    /// stands back before another.
    pub fn is_entered_everywhere(&self, network: NetworkId) -> bool {
        self.conflict(network).is_none() && self.has_ingress(network)
    }

    /// The nodes that carry a network: those with endpoints in it, and every node if it is
    /// entered everywhere. Those that left are not among them.
    pub fn carriers(&self, network: NetworkId) -> BTreeSet<NodeId> {
        let with_endpoints = self.endpoints(network).map(|placed| placed.node);
        let mut carriers: BTreeSet<NodeId> = with_endpoints.collect();
        if self.is_entered_everywhere(network) {
            let present = self.members().filter(|member| member.liveness != Liveness::Left);
            carriers.extend(present.map(|member| member.id));
        }
        carriers
    }
}

/// Derives the services of one network from what all members say.
pub(super) fn services(
    view: &ClusterView,
    network: &Network,
    registers: &weft_ipam::View<'_>,
    places: &[Place],
) -> Services {
    let mut services = Services::default();
    for (name, (record, teller)) in latest(view, network.id) {
        match defined(record) {
            None => drop(services.removed.insert(name.clone(), teller)),
            Some(_) => {
                let derived = Derived { teller: Some(teller), ..Derived::default() };
                services.standing.insert(name.clone(), derived);
            }
        }
    }
    add_backends(view, network.id, places, &mut services.standing);
    if !services.standing.is_empty() {
        confirm_vips(view, network, registers, places, &mut services.standing);
    }
    services
}

/// Of all that is said of a name, the highest revision, and of two alike the higher writer's.
fn latest(view: &ClusterView, network: NetworkId) -> BTreeMap<&Label, (&ServiceRecord, NodeId)> {
    let mut latest: BTreeMap<&Label, (&ServiceRecord, NodeId)> = BTreeMap::new();
    for member in view.members.values() {
        for record in member.services.get(&network).into_iter().flat_map(BTreeMap::values) {
            if !is_of(record, network) || record.revision > LAST_REVISION {
                continue;
            }
            match latest.entry(&record.name) {
                Entry::Vacant(entry) => drop(entry.insert((record, member.id))),
                Entry::Occupied(mut entry) if supersedes(record, entry.get().0) => {
                    entry.insert((record, member.id));
                }
                Entry::Occupied(_) => {}
            }
        }
    }
    latest
}

/// More than people can write. Whoever claims a higher one wants to have the last word for good.
const LAST_REVISION: u64 = 1 << 48;

/// Whether `record` holds where `other` is said, too.
pub(crate) fn supersedes(record: &ServiceRecord, other: &ServiceRecord) -> bool {
    (record.revision, record.writer) > (other.revision, other.writer)
}

fn defined(record: &ServiceRecord) -> Option<&Service> {
    match &record.state {
        ServiceState::Defined(service) => Some(service),
        ServiceState::Removed => None,
    }
}

/// Whether what is said of a name is about that name in that network.
fn is_of(record: &ServiceRecord, network: NetworkId) -> bool {
    defined(record).is_none_or(|service| service.name == record.name && service.network == network)
}

/// An endpoint serves what it says; one that says nothing serves what is declared under one of its
/// names.
fn add_backends(
    view: &ClusterView,
    network: NetworkId,
    places: &[Place],
    standing: &mut BTreeMap<Label, Derived>,
) {
    let declared: BTreeMap<String, Label> =
        standing.keys().map(|name| (name.to_string(), name.clone())).collect();
    for place in places {
        let member = &view.members[&place.node];
        let endpoint = &member.endpoints[&network][&place.endpoint];
        let served: BTreeSet<&Label> = match &endpoint.service {
            Some(service) => BTreeSet::from([service]),
            None => {
                let aliases = endpoint.aliases.iter().map(|alias| alias.as_str());
                let names = aliases.chain([endpoint.name.as_str()]);
                names.filter_map(|name| declared.get(name)).collect()
            }
        };
        for name in served {
            let teller = standing.get(name).and_then(|derived| derived.teller);
            let service = teller.and_then(|teller| {
                defined(view.members.get(&teller)?.services.get(&network)?.get(name)?)
            });
            let state = state(member, endpoint, name, service);
            let derived = standing.entry(name.clone()).or_default();
            derived.backends.push((*place, state));
        }
    }
}

/// Lets a virtual address count if its holder's grant of it is confirmed, and neither an endpoint nor a service
/// before it in the alphabet has it.
fn confirm_vips(
    view: &ClusterView,
    network: &Network,
    registers: &weft_ipam::View<'_>,
    places: &[Place],
    standing: &mut BTreeMap<Label, Derived>,
) {
    let mut taken: BTreeSet<IpAddr> = places
        .iter()
        .flat_map(|place| view.members[&place.node].endpoints[&network.id][&place.endpoint].ips())
        .collect();
    for (name, derived) in standing {
        let Some(record) = derived
            .teller
            .and_then(|teller| view.members.get(&teller)?.services.get(&network.id)?.get(name))
        else {
            continue;
        };
        let Some(service) = defined(record) else { continue };
        let holder = service.lease.map_or(record.writer, |lease| lease.node);
        let counts = |grant: &&AddressGrant| confirmed(view, network, holder, grant, registers);
        let ips = service.vips.iter().filter(counts).map(|grant| grant.ip);
        derived.vips = ips.filter(|ip| taken.insert(*ip)).collect();
    }
}

#[cfg(test)]
mod tests;
