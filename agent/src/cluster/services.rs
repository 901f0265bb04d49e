//! Which services there are, and who serves them.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
};

use weft_gossip::{ClusterView, Liveness, Member};
use weft_model::{
    AddressGrant, Condition, Endpoint, Label, Network, NetworkId, NodeId, PublishMode, Service,
    ServiceRecord, ServiceState, Verdict,
};

use super::{Cluster, Place, Placed};

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

    /// Whether a backend would be ready if only its node were heard.
    pub fn is_fit(&self, backend: &Backend<'_>) -> bool {
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

/// Whether a backend gets new connections, and why it does not.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BackendState {
    Ready,
    /// The service has a check, and no verdict has come yet.
    Starting,
    /// With the check's reason, for people.
    Unhealthy(String),
    Draining,
    /// Its node is not heard.
    Unreachable,
}

impl BackendState {
    pub fn is_ready(&self) -> bool {
        *self == Self::Ready
    }

    /// The word in status and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Starting => "starting",
            Self::Unhealthy(_) => "unhealthy",
            Self::Draining => "draining",
            Self::Unreachable => "unreachable",
        }
    }
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

    /// Whether some service of the network is reached at a port of every host.
    pub fn has_ingress(&self, network: NetworkId) -> bool {
        self.services(network).any(|service| service.is_ingress())
    }

    /// The nodes that carry a network: those with endpoints in it, and every node if one of its
    /// services is reached at every host. Those that left are not among them.
    pub fn carriers(&self, network: NetworkId) -> BTreeSet<NodeId> {
        let with_endpoints = self.endpoints(network).map(|placed| placed.node);
        let mut carriers: BTreeSet<NodeId> = with_endpoints.collect();
        let shared = self.network(network).is_some_and(|network| !network.driver.is_local());
        if shared && self.has_ingress(network) {
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

/// A check that is declared fails closed: without a verdict there are no connections.
fn state(
    member: &Member,
    endpoint: &Endpoint,
    name: &Label,
    service: Option<&Service>,
) -> BackendState {
    match member.liveness {
        Liveness::Alive => fitness(condition(member, endpoint), name, service),
        Liveness::Suspect | Liveness::Left => BackendState::Unreachable,
    }
}

fn fitness(condition: Option<&Condition>, name: &Label, service: Option<&Service>) -> BackendState {
    let checked = service.is_some_and(|service| service.check.is_some());
    let verdict = condition.and_then(|condition| condition.verdicts.get(name));
    match verdict {
        _ if condition.is_some_and(|condition| condition.draining) => BackendState::Draining,
        _ if !checked => BackendState::Ready,
        None => BackendState::Starting,
        Some(Verdict::Healthy) => BackendState::Ready,
        Some(Verdict::Unhealthy(reason)) => BackendState::Unhealthy(reason.clone()),
    }
}

fn condition<'a>(member: &'a Member, endpoint: &Endpoint) -> Option<&'a Condition> {
    member.conditions.get(&endpoint.network)?.get(&endpoint.id)
}

/// Lets a virtual address count if its holder has it on loan, and neither an endpoint nor a service
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
        let confirmed =
            |grant: &&AddressGrant| weft_ipam::accepts(network, holder, grant, registers);
        let ips = service.vips.iter().filter(confirmed).map(|grant| grant.ip);
        derived.vips = ips.filter(|ip| taken.insert(*ip)).collect();
    }
}

#[cfg(test)]
mod tests {
    use weft_model::{Check, EndpointId, Probe};

    use super::*;
    use crate::fixture::{Builder, endpoint, network, node_id};

    fn label(name: &str) -> Label {
        name.parse().unwrap()
    }

    fn web(network: &Network) -> Service {
        Service::bare(label("web"), network.id)
    }

    fn nodes(count: u8) -> Builder {
        (1..=count).fold(Builder::default(), Builder::node)
    }

    fn checked(network: &Network) -> Service {
        let check = Check { probe: Probe::Engine, interval: 1, timeout: 1, rise: 1, fall: 1 };
        Service { check: Some(check), ..web(network) }
    }

    fn states(cluster: &Cluster, network: &Network) -> Vec<(String, BackendState)> {
        let service = cluster.service(network.id, &label("web")).unwrap();
        let states = service.backends();
        states.map(|b| (b.endpoint.name.to_string(), b.state.clone())).collect()
    }

    #[test]
    fn the_highest_revision_holds_and_of_two_alike_the_higher_writers() {
        let app = network(1, "app");
        let said = |first: u64, second: u64| {
            let of = |affinity| Service { affinity: Some(affinity), ..web(&app) };
            let cluster = nodes(3).network(1, &app);
            let cluster = cluster.service(2, first, &of(2)).service(3, second, &of(3)).build();
            let view = cluster.service(app.id, &label("web")).unwrap();
            view.definition().unwrap().affinity.unwrap()
        };
        assert_eq!((said(1, 2), said(2, 1), said(1, 1)), (3, 2, 3));
        // Nobody has the last word.
        assert_eq!(said(1, u64::MAX), 2);
    }

    #[test]
    fn a_removal_is_a_revision_too_and_is_told() {
        let app = network(1, "app");
        let removed = |revision| {
            let cluster = nodes(3).network(1, &app).service(2, 2, &web(&app));
            cluster
                .service_record(3, app.id, &label("web"), revision, ServiceState::Removed)
                .build()
        };
        assert!(removed(1).service(app.id, &label("web")).is_some());
        let gone = removed(3);
        assert!(gone.service(app.id, &label("web")).is_none());
        assert_eq!(gone.service_record(app.id, &label("web")).unwrap().revision, 3);
        assert_eq!(gone.service_records(app.id).count(), 1);
    }

    #[test]
    fn what_is_said_of_another_name_or_network_does_not_count() {
        let (app, db) = (network(1, "app"), network(2, "db"));
        for foreign in [Service { name: label("api"), ..web(&app) }, web(&db)] {
            let state = ServiceState::Defined(Box::new(foreign));
            let cluster = nodes(2).network(1, &app).network(1, &db);
            let cluster = cluster.service_record(2, app.id, &label("web"), 1, state).build();
            assert_eq!(cluster.services(app.id).count(), 0);
        }
    }

    #[test]
    fn an_endpoint_serves_what_it_says_and_without_a_word_what_it_is_called() {
        let app = network(1, "app");
        let cluster = nodes(2)
            .network(1, &app)
            .service(1, 1, &web(&app))
            .endpoint(1, &app, "web", "10.1.0.8")
            .endpoint(1, &app, "alias", "10.1.0.9")
            .endpoint(2, &app, "member", "10.1.0.10")
            .endpoint(2, &app, "web", "10.1.0.11")
            .change_endpoint(1, &app, "10.1.0.9", |own| own.aliases.push("web".parse().unwrap()))
            .change_endpoint(2, &app, "10.1.0.10", |own| own.service = Some(label("web")))
            .change_endpoint(2, &app, "10.1.0.11", |own| own.service = Some(label("other")))
            .build();
        let mut names: Vec<_> = states(&cluster, &app).into_iter().map(|(name, _)| name).collect();
        names.sort();
        assert_eq!(names, ["alias", "member", "web"]);
        let other = cluster.service(app.id, &label("other")).unwrap();
        assert!(other.definition().is_none() && other.record.is_none());
        assert_eq!(other.backends().count(), 1);
    }

    #[test]
    fn a_backend_is_ready_only_if_nothing_speaks_against_it() {
        let app = network(1, "app");
        let id = endpoint(&app, "web", "10.1.0.8").id;
        let state = |service: &Service, liveness, draining, verdict: Option<Verdict>| {
            let verdicts = verdict.into_iter().map(|verdict| (label("web"), verdict)).collect();
            let cluster = nodes(2)
                .network(1, &app)
                .service(1, 1, service)
                .endpoint(2, &app, "web", "10.1.0.8")
                .condition(2, &app, Condition { endpoint: id, draining, verdicts })
                .change(2, |member| member.liveness = liveness)
                .build();
            states(&cluster, &app).remove(0).1
        };
        let (bare, checked) = (web(&app), checked(&app));
        let bad = || Some(Verdict::Unhealthy("refused".into()));
        let alive = Liveness::Alive;
        assert_eq!(state(&bare, alive, false, None), BackendState::Ready);
        assert_eq!(state(&bare, alive, false, bad()), BackendState::Ready);
        assert_eq!(state(&checked, alive, false, None), BackendState::Starting);
        assert_eq!(state(&checked, alive, false, Some(Verdict::Healthy)), BackendState::Ready);
        let unhealthy = BackendState::Unhealthy("refused".into());
        assert_eq!(state(&checked, alive, false, bad()), unhealthy);
        assert_eq!(state(&bare, alive, true, None), BackendState::Draining);
        assert_eq!(state(&bare, Liveness::Suspect, true, None), BackendState::Unreachable);
    }

    #[test]
    fn nobody_speaks_for_the_endpoints_of_another_node() {
        let app = network(1, "app");
        let endpoint = endpoint(&app, "web", "10.1.0.8").id;
        let lie = Condition { endpoint, draining: true, verdicts: BTreeMap::new() };
        let cluster = nodes(3)
            .network(1, &app)
            .service(1, 1, &web(&app))
            .endpoint(2, &app, "web", "10.1.0.8")
            .condition(3, &app, lie)
            .build();
        assert_eq!(states(&cluster, &app), [("web".to_owned(), BackendState::Ready)]);
    }

    #[test]
    fn a_virtual_address_counts_if_its_holder_has_it_and_no_endpoint_does() {
        let app = network(1, "app");
        let vips = |holder: u8, said: u8, taken: bool| {
            let mut service = web(&app);
            let mut cluster = nodes(3).network(1, &app);
            cluster = cluster.vip(holder, &app, &mut service, "10.1.0.8");
            service.lease =
                service.lease.map(|lease| weft_model::VipLease { node: node_id(said), ..lease });
            if taken {
                cluster = cluster.endpoint(holder, &app, "box", "10.1.0.8");
            }
            // Whoever changes a service last need not hold its addresses.
            let cluster = cluster.service(3, 1, &service).build();
            cluster.service(app.id, &label("web")).unwrap().vips.len()
        };
        assert_eq!(vips(2, 2, false), 1);
        assert_eq!(vips(2, 1, false), 0);
        assert_eq!(vips(2, 2, true), 0);
    }

    #[test]
    fn of_two_services_with_one_address_the_first_by_name_has_it() {
        let app = network(1, "app");
        let mut service = web(&app);
        let cluster = nodes(2).network(1, &app).vip(2, &app, &mut service, "10.1.0.8");
        let other = Service { name: label("api"), ..service.clone() };
        let cluster = cluster.service(2, 1, &service).service(2, 1, &other).build();
        let has = |name: &str| !cluster.service(app.id, &label(name)).unwrap().vips.is_empty();
        assert!(has("api") && !has("web"));
    }

    #[test]
    fn every_node_carries_a_network_with_a_port_at_every_host() {
        let app = network(1, "app");
        let carriers = |mode: Option<PublishMode>| {
            let mut service = web(&app);
            service.published.extend(mode.map(|mode| weft_model::Publication {
                protocol: weft_model::Protocol::Tcp,
                port: 80.try_into().unwrap(),
                target: 80.try_into().unwrap(),
                mode,
                host_ip: None,
                source: weft_model::Source::Preserve,
                proxy_protocol: false,
            }));
            let cluster = nodes(3).network(1, &app).endpoint(2, &app, "web", "10.1.0.8");
            let cluster = cluster.change(3, |member| member.liveness = Liveness::Suspect);
            cluster.service(1, 1, &service).build().carriers(app.id).len()
        };
        assert_eq!(carriers(None), 1);
        assert_eq!(carriers(Some(PublishMode::Host)), 1);
        assert_eq!(carriers(Some(PublishMode::Ingress)), 3);
    }

    #[test]
    fn an_endpoint_that_nobody_confirms_serves_nothing() {
        let app = network(1, "app");
        let forged = endpoint(&app, "web", "10.1.0.9");
        let cluster = nodes(2).network(1, &app).service(1, 1, &web(&app)).change(2, |member| {
            let all: BTreeMap<EndpointId, Endpoint> = [(forged.id, forged.clone())].into();
            member.endpoints.insert(app.id, all);
        });
        assert!(states(&cluster.build(), &app).is_empty());
    }
}
