use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use weft_balance::NetworkBalance;
use weft_dns::{Backend, BackendPort, Directory, Entry, NetworkNames, Service};
use weft_model::{DnsName, Endpoint, EndpointId, Network, NetworkId, NodeId, Protocol, SandboxId};
use weft_vxlan::OverlayNetwork;

use crate::{
    cluster::{self, Cluster, ServiceView},
    ledger::book::Book,
};

/// The label by which an endpoint names its port where its service declares none: `8080`,
/// `53/udp`.
const PORT_LABEL: &str = "weft.port";
/// The label by which an endpoint says how much of its service's connections it takes.
const WEIGHT_LABEL: &str = "weft.weight";

/// Builds the directory of names; keeps the networks that did not change.
pub struct NamesProjection {
    domain: DnsName,
    built: BTreeMap<NetworkId, (Contents, Arc<NetworkNames>)>,
}

/// What this host's kernel has, as its reconcilers last saw it.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    pub plane: &'a weft_vxlan::Status,
    pub balance: &'a weft_balance::Status,
    /// Whether this agent may not have heard all others since it started. What its predecessor put
    /// into the kernel is there, also before the reconcilers have looked.
    pub warming_up: bool,
}

/// What a network's names are made of.
#[derive(Debug, Eq, PartialEq)]
struct Contents {
    entries: Vec<Entry>,
    services: Vec<Service>,
}

impl NamesProjection {
    pub fn new(domain: DnsName) -> Self {
        Self { domain, built: BTreeMap::new() }
    }

    /// The names of every network, and who may ask for which.
    ///
    /// In a network that this host carries, an endpoint of another host is named once the kernel
    /// can reach it, and a virtual address once the kernel translates it. While this agent is warming
    /// up, names are answered as they were remembered, and none is denied.
    pub fn directory(
        &mut self,
        me: NodeId,
        cluster: &Cluster,
        book: &Book,
        kernel: Kernel<'_>,
    ) -> Directory {
        let active = book.active();
        let mut directory = Directory::new(self.domain.clone());
        directory.incomplete = kernel.warming_up;
        let mut built = BTreeMap::new();
        for network in cluster.networks() {
            let carried = active.contains(&network.id).then(|| kernel.carried(network.id));
            let warming_up = kernel.warming_up;
            let contents = Reach { me, cluster, book, carried, warming_up }.contents(network.id);
            let names = match self.built.remove(&network.id) {
                Some((before, names)) if before == contents => names,
                _ => Arc::new(names(network, &contents)),
            };
            directory.networks.insert(network.id, Arc::clone(&names));
            built.insert(network.id, (contents, names));
        }
        self.built = built;
        directory.askers = askers(book);
        directory
    }
}

impl<'a> Kernel<'a> {
    fn carried(self, network: NetworkId) -> Carried<'a> {
        let Self { plane, balance, .. } = self;
        let overlay = plane.networks.get(&network);
        let services = balance.networks.get(&network);
        Carried {
            overlay: overlay.and_then(|status| status.reached.as_deref()),
            services: services.and_then(|status| status.applied.as_deref()),
        }
    }
}

/// What of a network the kernel has; nothing before its first complete pass.
#[derive(Clone, Copy, Debug)]
struct Carried<'a> {
    overlay: Option<&'a OverlayNetwork>,
    services: Option<&'a NetworkBalance>,
}

/// Decides what of one network may be answered: endpoints of nodes that are alive, or may be, and,
/// where the network is carried here, what the kernel has.
struct Reach<'a> {
    me: NodeId,
    cluster: &'a Cluster,
    book: &'a Book,
    carried: Option<Carried<'a>>,
    warming_up: bool,
}

impl Reach<'_> {
    /// A service that somebody declared has its name for itself, whatever endpoints are called. A
    /// backend that is not ready does not answer to its service's name.
    fn contents(&self, network: NetworkId) -> Contents {
        let declared: BTreeSet<&str> = self
            .cluster
            .services(network)
            .filter(|service| service.definition().is_some())
            .map(|service| service.name.as_str())
            .collect();
        let resting: BTreeSet<(EndpointId, &str)> = self
            .cluster
            .services(network)
            .flat_map(|service| service.backends().map(move |backend| (service, backend)))
            .filter(|(service, backend)| !self.is_ready(*service, backend))
            .map(|(service, backend)| (backend.endpoint.id, service.name.as_str()))
            .collect();
        let endpoints = self.cluster.endpoints(network);
        let endpoints = endpoints
            .filter(|p| (p.alive || self.warming_up) && self.has_endpoint(p.node, p.endpoint));
        let mut entries: Vec<Entry> = endpoints
            .map(|placed| {
                let mut entry = Entry::endpoint(placed.endpoint);
                entry.names.retain(|name| {
                    let name = name.as_str();
                    !declared.contains(name) && !resting.contains(&(placed.endpoint.id, name))
                });
                entry
            })
            .collect();
        let mut services = Vec::new();
        for service in self.cluster.services(network) {
            let backends = self.backends(service);
            let ips: Vec<IpAddr> =
                backends.iter().flat_map(|backend| backend.addresses.iter().copied()).collect();
            let is_virtual = service.definition().is_some_and(|own| !own.vips.is_empty());
            let own = match is_virtual {
                true => service.vips.iter().copied().filter(|ip| self.translates(*ip)).collect(),
                false => ips.clone(),
            };
            entries.push(Entry::service(service.name.clone(), own));
            entries.push(Entry::tasks(service.name, ips));
            services.push(Service { name: service.name.clone(), backends });
        }
        Contents { entries, services }
    }

    fn backends(&self, service: ServiceView<'_>) -> Vec<Backend> {
        let ready = service.backends().filter(|backend| {
            self.is_ready(service, backend) && self.has_endpoint(backend.node, backend.endpoint)
        });
        ready
            .filter_map(|backend| {
                Some(Backend {
                    target: backend.endpoint.id.short().parse().ok()?,
                    addresses: backend.endpoint.ips().collect(),
                    weight: weight(backend.endpoint),
                    ports: ports(service, backend.endpoint),
                })
            })
            .collect()
    }

    /// As the balancer sees it.
    fn is_ready(&self, service: ServiceView<'_>, backend: &cluster::Backend<'_>) -> bool {
        let as_remembered = self.warming_up && !self.book.has_drained(backend.endpoint);
        service.gets_connections(backend, as_remembered)
    }

    fn has_endpoint(&self, node: NodeId, endpoint: &Endpoint) -> bool {
        match self.carried {
            None => true,
            Some(_) if node == self.me => true,
            Some(Carried { overlay: None, .. }) if self.warming_up => true,
            Some(carried) => {
                let station =
                    carried.overlay.and_then(|overlay| overlay.remotes.get(&endpoint.mac));
                let node = self.cluster.node(node);
                station.zip(node).is_some_and(|(station, node)| station.vtep == node.vtep)
            }
        }
    }

    fn translates(&self, vip: IpAddr) -> bool {
        self.carried.is_none_or(|carried| {
            // The gateway must have taken the address on, too.
            let taken_on =
                carried.overlay.map_or(self.warming_up, |overlay| overlay.vips.contains(&vip));
            let is_in = |own: &NetworkBalance| own.frontends.keys().any(|at| at.ip == vip);
            taken_on && carried.services.map_or(self.warming_up, is_in)
        })
    }
}

/// The ports that a backend serves: those that its service declares, else the one that it names
/// itself.
fn ports(service: ServiceView<'_>, endpoint: &Endpoint) -> Vec<BackendPort> {
    let declared = service.definition().into_iter().flat_map(|service| &service.ports);
    let declared: Vec<_> = declared
        .map(|port| BackendPort {
            protocol: port.protocol,
            port: port.port.get(),
            target: port.target.get(),
        })
        .collect();
    match declared.is_empty() {
        true => endpoint.labels.get(PORT_LABEL).and_then(|text| port(text)).into_iter().collect(),
        false => declared,
    }
}

/// Reads `8080` or `53/udp`.
fn port(text: &str) -> Option<BackendPort> {
    let (number, protocol) = match text.split_once('/') {
        Some((number, protocol)) => (number, protocol.parse().ok()?),
        None => (text, Protocol::Tcp),
    };
    let port = number.parse::<std::num::NonZeroU16>().ok()?.get();
    Some(BackendPort { protocol, port, target: port })
}

pub(crate) fn weight(endpoint: &Endpoint) -> u16 {
    endpoint.labels.get(WEIGHT_LABEL).and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn names(network: &Network, contents: &Contents) -> NetworkNames {
    let subnets = network.pools.iter().map(|pool| pool.subnet).collect();
    let (name, entries) = (network.name.clone(), contents.entries.iter().cloned());
    NetworkNames::new(name, network.internal, subnets, entries)
        .with_services(contents.services.iter().cloned())
}

/// For each local address the networks of its sandbox, the address's own first.
fn askers(book: &Book) -> BTreeMap<(NetworkId, IpAddr), Vec<NetworkId>> {
    let mut sandboxes: BTreeMap<&SandboxId, Vec<NetworkId>> = BTreeMap::new();
    for local in book.endpoints.values() {
        sandboxes.entry(&local.endpoint.sandbox).or_default().push(local.endpoint.network);
    }
    let mut askers = BTreeMap::new();
    for local in book.endpoints.values() {
        let own = local.endpoint.network;
        let others = sandboxes[&local.endpoint.sandbox].iter().copied().filter(|id| *id != own);
        let networks: Vec<_> = [own].into_iter().chain(others).collect();
        for ip in local.endpoint.ips() {
            askers.insert((own, ip), networks.clone());
        }
    }
    askers
}

#[cfg(test)]
mod tests {
    use weft_balance::{Frontend, Pool};
    use weft_gossip::Liveness;
    use weft_model::{
        AddressGrant, Condition, MacAddr, Service as Definition, ServicePort, ServiceRecord,
        ServiceState, Source, Spread, Unit,
    };

    use super::*;
    use crate::{
        fixture::{Builder, book_with, network, node_id, plane_context},
        projection::plane,
    };

    /// What answers to each name, sorted.
    fn answers(contents: &Contents) -> BTreeMap<String, BTreeSet<String>> {
        let mut answers: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for entry in &contents.entries {
            for name in &entry.names {
                let ips = entry.addresses.iter().map(ToString::to_string);
                answers.entry(name.to_string()).or_default().extend(ips);
            }
        }
        answers
    }

    fn set(texts: &[&str]) -> BTreeSet<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    /// A service of `app` as node 1 declares it; its virtual address, if it has one, is lent by
    /// node 1 to itself.
    fn definition(network: &Network, name: &str, vip: Option<&str>) -> Definition {
        let bare = serde_json::json!({"name": name, "network": network.id});
        let mut service: Definition = serde_json::from_value(bare).unwrap();
        service.vips = vip
            .map(|ip| ip.parse::<IpAddr>().unwrap())
            .map(|ip| AddressGrant { ip, unit: Unit::Address(ip), seq: 1 })
            .into_iter()
            .collect();
        service
    }

    fn declared(builder: Builder, service: Definition) -> Builder {
        let network = service.network;
        let record = ServiceRecord {
            name: service.name.clone(),
            revision: 1,
            writer: node_id(1),
            state: ServiceState::Defined(Box::new(service.clone())),
        };
        builder.change(1, |member| {
            for grant in &service.vips {
                let loan = weft_model::Loan { to: node_id(1), seq: 1, except: BTreeSet::new() };
                member.loans.entry(network).or_default().loans.insert(grant.unit, loan);
                let hold = weft_model::Hold { seq: 1, ceded: BTreeSet::new() };
                member.holds.entry(network).or_default().held.insert(grant.unit, hold);
            }
            member.services.entry(network).or_default().insert(service.name.clone(), record);
        })
    }

    /// Two backends of `web`, on nodes 1 and 2, and an endpoint that is called so.
    fn cluster(app: &Network) -> Builder {
        let member = |m: &mut weft_gossip::Member| {
            for endpoint in m.endpoints.get_mut(&app.id).unwrap().values_mut() {
                endpoint.labels.insert(PORT_LABEL.into(), "8080".into());
                if endpoint.name.as_str() != "web" {
                    endpoint.service = "web".parse().ok();
                }
            }
        };
        Builder::default()
            .node(1)
            .node(2)
            .network(1, app)
            .endpoint(1, app, "one", "10.1.0.8")
            .endpoint(2, app, "two", "10.1.0.9")
            .endpoint(2, app, "web", "10.1.0.10")
            .change(1, member)
            .change(2, member)
    }

    fn contents(cluster: &Cluster, app: &Network, carried: Option<Carried<'_>>) -> Contents {
        let book = &Book::default();
        Reach { me: node_id(1), cluster, book, carried, warming_up: false }.contents(app.id)
    }

    #[test]
    fn a_remote_name_is_answered_once_the_kernel_reaches_it() {
        let app = network(1, "app");
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &app)
            .endpoint(1, &app, "web", "10.1.0.8")
            .endpoint(2, &app, "far", "10.1.0.9")
            .build();
        let book = book_with(&app, "web", "10.1.0.8");
        let desired = plane(plane_context(), &cluster, &book, false);

        let named = |status: &weft_vxlan::Status| -> Vec<String> {
            let balance = weft_balance::Status::default();
            let kernel = Kernel { plane: status, balance: &balance, warming_up: false };
            let found = contents(&cluster, &app, Some(kernel.carried(app.id)));
            found.entries.iter().map(|entry| entry.names[0].to_string()).collect()
        };
        let mut status = weft_vxlan::Status::default();
        assert_eq!(named(&status), ["web"]);
        status.networks.entry(app.id).or_default().reached =
            Some(Arc::clone(&desired.networks[&app.id]));
        let mut both = named(&status);
        both.sort();
        assert_eq!(both, ["far", "web"]);
        assert_eq!(contents(&cluster, &app, None).entries.len(), 2);
    }

    #[test]
    fn an_agent_that_warms_up_answers_names_as_they_were_remembered() {
        let app = network(1, "app");
        let built = declared(cluster(&app), definition(&app, "web", Some("10.1.0.200")));
        let built = built.change(2, |member| member.liveness = Liveness::Suspect).build();
        let book = book_with(&app, "one", "10.1.0.8");
        let (plane, balance) = Default::default();
        let directory = |warming_up| {
            let kernel = Kernel { plane: &plane, balance: &balance, warming_up };
            let mut names = NamesProjection::new("weft.internal".parse().unwrap());
            let directory = names.directory(node_id(1), &built, &book, kernel);
            let (contents, _) = &names.built[&app.id];
            (directory.incomplete, answers(contents))
        };
        let (incomplete, held) = directory(true);
        assert!(incomplete);
        assert_eq!(held["web"], set(&["10.1.0.200"]));
        assert_eq!(held["tasks.web"], set(&["10.1.0.8", "10.1.0.9", "10.1.0.10"]));
        assert_eq!(held["two"], set(&["10.1.0.9"]));
        let (incomplete, cold) = directory(false);
        assert!(!incomplete && !cold.contains_key("two") && cold["web"].is_empty(), "{cold:?}");
    }

    #[test]
    fn a_declared_service_has_its_name_for_itself_and_an_implied_one_shares_it() {
        let app = network(1, "app");
        let implied = answers(&contents(&cluster(&app).build(), &app, None));
        assert_eq!(implied["web"], set(&["10.1.0.8", "10.1.0.9", "10.1.0.10"]));
        assert_eq!(implied["tasks.web"], set(&["10.1.0.8", "10.1.0.9"]));

        // Declared, it has the endpoint of its name for a backend too.
        let all = set(&["10.1.0.8", "10.1.0.9", "10.1.0.10"]);
        for (vip, own) in [(None, all.clone()), (Some("10.1.0.200"), set(&["10.1.0.200"]))] {
            let built = declared(cluster(&app), definition(&app, "web", vip)).build();
            let found = answers(&contents(&built, &app, None));
            assert_eq!(found["web"], own);
            assert_eq!(found["tasks.web"], all);
            assert_eq!(found["one"], set(&["10.1.0.8"]));
        }
    }

    #[test]
    fn what_is_not_ready_is_in_no_answer_of_its_service_and_the_name_stays() {
        let app = network(1, "app");
        let drained = |builder: Builder| {
            builder.change(1, |member| {
                let id = *member.endpoints[&app.id].keys().next().unwrap();
                let condition =
                    Condition { endpoint: id, draining: true, verdicts: BTreeMap::new() };
                member.conditions.entry(app.id).or_default().insert(id, condition);
            })
        };
        let silent = |b: Builder| b.change(2, |member| member.liveness = Liveness::Suspect);
        let service = || definition(&app, "web", None);
        for is_declared in [false, true] {
            let start = || match is_declared {
                true => declared(cluster(&app), service()),
                false => cluster(&app),
            };
            let found = contents(&drained(start()).build(), &app, None);
            assert!(!answers(&found)["tasks.web"].contains("10.1.0.8"), "{found:?}");
            assert!(!answers(&found)["web"].contains("10.1.0.8"), "{found:?}");
            assert_eq!(answers(&found)["one"], set(&["10.1.0.8"]));
            let names: Vec<_> = found.services[0].backends.iter().map(|b| &b.target).collect();
            assert_eq!(names.len(), answers(&found)["tasks.web"].len());

            let nobody = answers(&contents(&silent(drained(start())).build(), &app, None));
            assert_eq!((&nobody["web"], &nobody["tasks.web"]), (&set(&[]), &set(&[])));
        }
    }

    #[test]
    fn a_virtual_address_is_answered_once_the_kernel_translates_it() {
        let app = network(1, "app");
        let built = declared(cluster(&app), definition(&app, "web", Some("10.1.0.200"))).build();
        let book = book_with(&app, "one", "10.1.0.8");
        let desired = plane(plane_context(), &built, &book, false);
        let named = |services: Option<&NetworkBalance>| {
            let carried = Carried { overlay: Some(&desired.networks[&app.id]), services };
            answers(&contents(&built, &app, Some(carried)))["web"].clone()
        };
        assert_eq!(named(None), set(&[]));
        let pool = Pool {
            service: "web".parse().unwrap(),
            backends: BTreeMap::new(),
            spread: Spread::Hash,
            affinity: None,
            source: Source::Preserve,
        };
        let ip = "10.1.0.200".parse().unwrap();
        let frontend = Frontend { ip, protocol: Protocol::Tcp, port: Some(80) };
        let balance = NetworkBalance {
            gateway_mac: MacAddr::for_gateway(app.id),
            gateways: BTreeSet::new(),
            frontends: [(frontend, Arc::new(pool))].into(),
        };
        assert_eq!(named(Some(&balance)), set(&["10.1.0.200"]));
    }

    #[test]
    fn a_backends_ports_are_the_services_and_else_its_own() {
        let app = network(1, "app");
        let port = |protocol, port, target| BackendPort { protocol, port, target };
        let ports = |builder: Builder| {
            let found = contents(&builder.build(), &app, None);
            found.services[0].backends[0].ports.clone()
        };
        assert_eq!(ports(cluster(&app)), [port(Protocol::Tcp, 8080, 8080)]);
        let mut service = definition(&app, "web", None);
        assert_eq!(
            ports(declared(cluster(&app), service.clone())),
            [port(Protocol::Tcp, 8080, 8080)]
        );
        let number = |n| std::num::NonZeroU16::new(n).unwrap();
        let udp = ServicePort { protocol: Protocol::Udp, port: number(53), target: number(5353) };
        service.ports.push(udp);
        assert_eq!(ports(declared(cluster(&app), service)), [port(Protocol::Udp, 53, 5353)]);
        for (text, protocol) in [("53/udp", Some(Protocol::Udp)), ("53/sctp", None), ("0", None)] {
            assert_eq!(super::port(text).map(|port| port.protocol), protocol, "{text}");
        }
    }
}
