//! Draining: an endpoint gets no new connections, and those that it has may end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::sync::watch;
use weft_model::{EndpointId, NetworkId, NodeId};

use super::{EngineContainers, connections};
use crate::{
    api::types::{Drain, DrainStatus, Sandbox, WaitedFor},
    chain::Chain,
    cluster::Cluster,
    engines::{attachment, docker},
    ledger::{DrainTarget, Ledger, Snapshot, Snapshots, book::LocalEndpoint},
    refusal::{Refusal, RefusalKind},
};

/// Drains endpoints of this host. Cheap to clone.
#[derive(Clone)]
pub struct Drains {
    pub ledger: Ledger,
    pub snapshots: Snapshots,
    pub containers: watch::Receiver<Arc<EngineContainers>>,
    /// Absent where Docker is switched off.
    pub docker: Option<docker::Handle>,
}

impl Drains {
    /// Begins to drain, or goes on.
    ///
    /// # Errors
    ///
    /// What is named is not on this host, or cannot be stopped although it shall be.
    pub async fn begin(&self, request: &Drain) -> Result<Vec<DrainStatus>, Refusal> {
        let snapshot = self.snapshot();
        let targets = self.find(&snapshot, request)?;
        if request.to_stop {
            for local in targets.endpoints(&snapshot) {
                self.way_to_stop(local)?;
            }
        }
        let endpoints = self.set(&targets, true).await?;
        self.status(|id| endpoints.contains(id)).await
    }

    /// Lets endpoints have new connections again.
    ///
    /// # Errors
    ///
    /// What is named is not on this host.
    pub async fn undo(&self, request: &Drain) -> Result<BTreeSet<EndpointId>, Refusal> {
        let targets = self.find(&self.snapshot(), request)?;
        self.set(&targets, false).await
    }

    /// How far the endpoints of this host have got that are being drained.
    ///
    /// # Errors
    ///
    /// A container's namespace cannot be looked into.
    pub async fn list(&self) -> Result<Vec<DrainStatus>, Refusal> {
        let snapshot = self.snapshot();
        self.status(|id| snapshot.book.is_draining(*id)).await
    }

    /// Stops what is drained, each container once: Docker's by Docker, which returns when it has
    /// stopped; the process by which one was attached, as `weft run` does it, is told to end.
    ///
    /// # Errors
    ///
    /// What is named is not on this host, weft does not know how to stop it, or Docker refuses. The
    /// rest is stopped all the same.
    pub async fn stop(&self, request: &Drain) -> Result<(), Refusal> {
        let snapshot = self.snapshot();
        let targets = self.find(&snapshot, request)?;
        let by_container: BTreeMap<_, _> =
            targets.endpoints(&snapshot).map(|local| (&local.endpoint.sandbox, local)).collect();
        let mut outcome = Ok(());
        for local in by_container.into_values() {
            outcome = outcome.and(self.stop_container(local).await);
        }
        outcome
    }

    async fn stop_container(&self, local: &LocalEndpoint) -> Result<(), Refusal> {
        match self.way_to_stop(local)? {
            WayToStop::Docker(docker, container) => docker.stop_container(&container).await,
            WayToStop::Signal(pid) => kill(pid, Signal::SIGTERM).map_err(|errno| {
                let name = &local.endpoint.name;
                let message = format!("cannot end {name}, process {pid}: {errno}");
                Refusal::new(RefusalKind::Failed, message)
            }),
        }
    }

    fn way_to_stop(&self, local: &LocalEndpoint) -> Result<WayToStop, Refusal> {
        let name = &local.endpoint.name;
        let refuse = |remedy: String| {
            Err(Refusal::field("target", format!("weft cannot stop {name}: {remedy}")))
        };
        match (&local.sandbox, attachment::engine_of(&local.endpoint.labels)) {
            (_, Some((engine, container))) => {
                refuse(format!("drain it, then stop container {container} by {engine}"))
            }
            (Sandbox::Engine(_), None) => {
                let containers = self.containers.borrow();
                match (&self.docker, containers.get(&local.endpoint.id)) {
                    (Some(docker), Some(container)) => {
                        Ok(WayToStop::Docker(docker.clone(), container.id.clone()))
                    }
                    _ => refuse("Docker does not answer; drain it, then docker stop".into()),
                }
            }
            (Sandbox::Path(path), None) => refuse(format!(
                "it is attached by its namespace {}, and its process is not known: drain it, then stop it by what started it",
                path.display()
            )),
            (Sandbox::Host, None) => {
                refuse("it is this host: weft hide takes it off the network".into())
            }
            (Sandbox::Pid(pid), None) => match local.sandbox.open_if(&local.endpoint.sandbox) {
                Ok(Some(_)) => Ok(WayToStop::Signal(Pid::from_raw(pid.cast_signed()))),
                Ok(None) | Err(_) => refuse(format!("its process {pid} has ended already")),
            },
        }
    }

    async fn set(
        &self,
        targets: &Targets,
        draining: bool,
    ) -> Result<BTreeSet<EndpointId>, Refusal> {
        match targets {
            Targets::Node => self.ledger.drain(DrainTarget::Node, draining).await,
            Targets::Endpoints(ids) => {
                for id in ids {
                    self.ledger.drain(DrainTarget::Endpoint(*id), draining).await?;
                }
                Ok(ids.clone())
            }
        }
    }

    /// What a request means: endpoints of this host, or all of them.
    fn find(&self, snapshot: &Snapshot, request: &Drain) -> Result<Targets, Refusal> {
        let containers = self.containers.borrow();
        let by_container = |text: &str| -> BTreeSet<EndpointId> {
            let named =
                containers.iter().filter(|(_, c)| text.len() >= 8 && c.id.starts_with(text));
            named.map(|(endpoint, _)| *endpoint).collect()
        };
        find(snapshot, request, by_container)
    }

    async fn status(
        &self,
        is_wanted: impl Fn(&EndpointId) -> bool,
    ) -> Result<Vec<DrainStatus>, Refusal> {
        let snapshot = self.snapshot();
        let mut all = Vec::new();
        let endpoints =
            snapshot.book.endpoints.iter().filter(|(id, local)| is_wanted(id) && !is_host(local));
        for (id, local) in endpoints {
            let network = local.endpoint.network;
            let waits_for = unacknowledged(&snapshot.cluster, network, *id).into_iter();
            let named = |node_id| WaitedFor { node: snapshot.cluster.node_name(node_id), node_id };
            let Some(name) = snapshot.cluster.network(network).map(|n| n.name.clone()) else {
                continue;
            };
            all.push(DrainStatus {
                id: *id,
                name: local.endpoint.name.clone(),
                network: name,
                waits_for: waits_for.map(named).collect(),
                connections: open_connections(&snapshot.cluster, local).await?,
            });
        }
        Ok(all)
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshots.borrow())
    }
}

enum WayToStop {
    Docker(docker::Handle, String),
    Signal(Pid),
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Targets {
    Endpoints(BTreeSet<EndpointId>),
    /// Every endpoint of this host, those to come included.
    Node,
}

impl Targets {
    fn endpoints<'a>(&'a self, snapshot: &'a Snapshot) -> impl Iterator<Item = &'a LocalEndpoint> {
        snapshot.book.endpoints.values().filter(move |local| match self {
            Self::Endpoints(ids) => ids.contains(&local.endpoint.id),
            Self::Node => !is_host(local),
        })
    }
}

/// The nodes that may still send a draining endpoint new connections: of those that carry its
/// network and are heard, the ones that have not said otherwise. One that is not heard is not waited
/// for: it cannot say so, and its clients are behind the same broken wire.
pub fn unacknowledged(
    cluster: &Cluster,
    network: NetworkId,
    endpoint: EndpointId,
) -> BTreeSet<NodeId> {
    let acknowledges = |node: &NodeId| {
        let drained = cluster.member(*node).and_then(|member| member.drained.get(&network));
        drained.is_some_and(|drained| drained.contains(&endpoint))
    };
    let carriers = cluster.carriers(network).into_iter();
    carriers.filter(|node| cluster.is_alive(*node) && !acknowledges(node)).collect()
}

/// Finds the endpoints of a name with the rest of their containers, those of a container that
/// `by_container` knows, or the node.
fn find(
    snapshot: &Snapshot,
    request: &Drain,
    by_container: impl Fn(&str) -> BTreeSet<EndpointId>,
) -> Result<Targets, Refusal> {
    let Snapshot { me, cluster, book, .. } = snapshot;
    let text = request.target.to_ascii_lowercase();
    let network = match &request.network {
        None => None,
        Some(name) => Some(cluster.find_network(name).map(|n| n.id).ok_or_else(|| {
            Refusal::missing(format!("there is no network {name}: weft network ls lists them"))
        })?),
    };
    let mut found = by_container(&text);
    let named = book.endpoints.values().map(|local| &local.endpoint).filter(|endpoint| {
        let id = endpoint.id.to_string();
        endpoint.name.as_str() == text || (text.len() >= 8 && id.starts_with(&text))
    });
    found.extend(named.map(|endpoint| endpoint.id));
    let sandboxes: BTreeSet<_> =
        found.iter().filter_map(|id| Some(&book.endpoints.get(id)?.endpoint.sandbox)).collect();
    let whole = book.endpoints.values().map(|local| &local.endpoint).filter(|endpoint| {
        sandboxes.contains(&endpoint.sandbox) && network.is_none_or(|id| id == endpoint.network)
    });
    let endpoints: BTreeSet<EndpointId> = whole.map(|endpoint| endpoint.id).collect();

    let node = cluster.members().find(|member| {
        let name = member.node.as_ref().map(|node| node.name.as_str());
        name == Some(text.as_str()) || member.id.to_string() == text
    });
    match (endpoints.is_empty(), node) {
        (false, Some(node)) if node.id == *me => Err(Refusal::field(
            "target",
            format!("{text} is both an endpoint and this node: give the id of the one you mean"),
        )),
        (false, _) => Ok(Targets::Endpoints(endpoints)),
        (true, Some(node)) if node.id == *me && network.is_none() => Ok(Targets::Node),
        (true, Some(node)) if node.id != *me => Err(Refusal::missing(format!(
            "{text} is another node, and a node is drained by its own agent: run weft drain {text} there"
        ))),
        (true, _) => Err(not_here(cluster, &text, network)),
    }
}

/// Says that an endpoint is not here, and where it is if that is known.
fn not_here(cluster: &Cluster, text: &str, network: Option<NetworkId>) -> Refusal {
    let elsewhere = cluster
        .networks()
        .filter(|known| network.is_none_or(|id| id == known.id))
        .flat_map(|known| cluster.endpoints(known.id))
        .find(|placed| placed.endpoint.name.as_str() == text);
    Refusal::missing(match elsewhere {
        Some(placed) => {
            let node = cluster.node_name(placed.node);
            format!("{text} is attached on {node}: run weft drain {text} there")
        }
        None => format!(
            "there is no endpoint, container or node {text} on this host: weft ps lists endpoints"
        ),
    })
}

/// Whether it is the host itself that is on a network: it serves nobody there.
fn is_host(local: &LocalEndpoint) -> bool {
    local.sandbox == Sandbox::Host
}

/// Counts the connections that others have to an endpoint. There are none where its namespace has
/// gone.
async fn open_connections(cluster: &Cluster, local: &LocalEndpoint) -> Result<usize, Refusal> {
    let endpoint = &local.endpoint;
    let Ok(Some(namespace)) = local.sandbox.open_if(&endpoint.sandbox) else { return Ok(0) };
    let services = cluster
        .services(endpoint.network)
        .filter(|service| service.backends().any(|backend| backend.endpoint.id == endpoint.id));
    let mut ports = BTreeSet::new();
    for service in services.filter_map(|service| service.definition()) {
        ports.extend(service.ports.iter().map(|port| port.target.get()));
        ports.extend(service.published.iter().map(|port| port.target.get()));
    }
    connections::count(&namespace, endpoint.ips().collect(), ports).await.map_err(|error| {
        let why = Chain(&error);
        let message = format!("cannot count the connections of {}: {why}", endpoint.name);
        Refusal::new(RefusalKind::Failed, message)
    })
}

#[cfg(test)]
mod tests {
    use weft_balance::{Desired, NetworkBalance, NetworkStatus, Pool, Status};
    use weft_gossip::Liveness;
    use weft_model::{Condition, Network, ServiceRecord, ServiceState};

    use super::*;
    use crate::{
        fixture::{Builder, book_with, endpoint, network, node_id},
        ledger::book::Book,
        projection::{Acknowledged, drained},
    };

    #[test]
    fn every_host_that_is_heard_and_may_send_connections_must_acknowledge() {
        let app = network(1, "app");
        let web = endpoint(&app, "web", "10.1.0.8").id;
        let start = || cluster(&app);
        let waits = |cluster: Builder| unacknowledged(&cluster.build(), app.id, web);
        // Node 4 has no endpoint in the network.
        assert_eq!(waits(start()), BTreeSet::from([node_id(1), node_id(2), node_id(3)]));
        let told = |cluster: Builder, n| {
            cluster.change(n, |member| {
                member.drained.insert(app.id, BTreeSet::from([web]));
            })
        };
        assert_eq!(waits(told(start(), 2)), BTreeSet::from([node_id(1), node_id(3)]));
        let silent = told(start(), 2).change(3, |member| member.liveness = Liveness::Suspect);
        assert_eq!(waits(silent), BTreeSet::from([node_id(1)]));
        let published = told(start(), 2).change(2, |member| publish(member, &app));
        assert_eq!(waits(published), BTreeSet::from([node_id(1), node_id(3), node_id(4)]));
        assert!(waits([1, 2, 3].into_iter().fold(start(), told)).is_empty());
    }

    #[test]
    fn a_host_acknowledges_when_its_kernel_has_what_was_wanted_last() {
        let app = network(1, "app");
        let web = endpoint(&app, "web", "10.1.0.8").id;
        let cluster = draining(cluster(&app), &app, web).build();
        let (with, without) = (balance(&app, &[web]), balance(&app, &[]));
        let carried = BTreeSet::from([app.id]);
        let acknowledged = |wanted: Option<&Arc<NetworkBalance>>,
                            applied: Option<&Arc<NetworkBalance>>,
                            before: bool| {
            let networks = wanted.map(|wanted| (app.id, Arc::clone(wanted))).into_iter().collect();
            let desired = Desired { networks, ..Desired::default() };
            let mut status = Status::default();
            let applied = applied.cloned();
            status.networks.insert(app.id, NetworkStatus { applied, ..NetworkStatus::default() });
            let before = before.then(|| (app.id, BTreeSet::from([web]))).into_iter().collect();
            let before = Acknowledged { drained: &before, held: false };
            !drained(&cluster, &carried, &desired, &status, before).is_empty()
        };
        let other = balance(&app, &[endpoint(&app, "db", "10.1.0.9").id]);
        assert!(acknowledged(Some(&without), Some(&without), false));
        assert!(!acknowledged(Some(&without), Some(&with), false));
        assert!(!acknowledged(Some(&without), None, false));
        // It does not have it, but what is on its way to the kernel may.
        assert!(!acknowledged(Some(&other), Some(&without), false));
        // What was acknowledged stays so when something else changes.
        assert!(acknowledged(Some(&other), Some(&without), true));
        // No service has ways in any more.
        assert!(acknowledged(None, None, false));
        assert!(!acknowledged(None, Some(&with), true));
    }

    #[test]
    fn a_target_is_an_endpoint_with_its_container_or_this_node() {
        let (app, db) = (network(1, "app"), network(2, "db"));
        let mut book = book_with(&app, "web", "10.1.0.8");
        let other = book_with(&db, "web-on-db", "10.2.0.8");
        let (id, mut local) = other.endpoints.into_iter().next().unwrap();
        let web = *book.endpoints.keys().next().unwrap();
        local.endpoint.sandbox = book.endpoints[&web].endpoint.sandbox.clone();
        book.endpoints.insert(id, local);
        let snapshot = snapshot(cluster(&app).network(1, &db), book);
        let found = |target: &str, network: Option<&str>| {
            let network = network.map(str::to_owned);
            let request = Drain { target: target.to_owned(), network, to_stop: false };
            let c1 = |text: &str| match text {
                "c0ffeec0ffee" => BTreeSet::from([web]),
                _ => BTreeSet::new(),
            };
            find(&snapshot, &request, c1).map_err(|refusal| refusal.message)
        };
        let both = Targets::Endpoints(BTreeSet::from([web, id]));
        for target in ["web", "web-on-db", "WEB", &web.to_string()[..12], "c0ffeec0ffee"] {
            assert_eq!(found(target, None), Ok(both.clone()), "{target}");
        }
        assert_eq!(found("web", Some("db")), Ok(Targets::Endpoints(BTreeSet::from([id]))));
        assert_eq!(found("h1", None), Ok(Targets::Node));
        assert!(found("h2", None).unwrap_err().contains("run weft drain h2 there"));
        assert!(found("two", None).unwrap_err().contains("attached on h2"));
        assert!(found("nothing", None).unwrap_err().contains("no endpoint, container or node"));
        assert!(found("web", Some("no")).unwrap_err().contains("no network no"));
    }

    /// Node 1 has `web` in the network, nodes 2 and 3 another endpoint each, node 4 none.
    fn cluster(network: &Network) -> Builder {
        let nodes = (1..=4).fold(Builder::default(), Builder::node).network(1, network);
        let one = nodes.endpoint(1, network, "web", "10.1.0.8");
        one.endpoint(2, network, "two", "10.1.0.9").endpoint(3, network, "three", "10.1.0.10")
    }

    fn draining(cluster: Builder, network: &Network, endpoint: EndpointId) -> Builder {
        let condition = Condition { endpoint, draining: true, verdicts: BTreeMap::new() };
        cluster.change(1, |member| {
            member.conditions.entry(network.id).or_default().insert(endpoint, condition);
        })
    }

    fn publish(member: &mut weft_gossip::Member, network: &Network) {
        let definition = serde_json::json!({
            "name": "web",
            "network": network.id,
            "published": [{"protocol": "tcp", "port": 8080, "target": 80}],
        });
        let record = ServiceRecord {
            name: "web".parse().unwrap(),
            revision: 1,
            writer: member.id,
            state: ServiceState::Defined(serde_json::from_value(definition).unwrap()),
        };
        member.services.entry(network.id).or_default().insert(record.name.clone(), record);
    }

    fn balance(network: &Network, backends: &[EndpointId]) -> Arc<NetworkBalance> {
        let ip = "10.1.0.9".parse().unwrap();
        let backend =
            weft_balance::Backend { ip, port: None, weight: 1, node: node_id(1), local: true };
        let pool = Pool {
            service: network.name.clone(),
            backends: backends.iter().map(|id| (*id, backend)).collect(),
            spread: weft_model::Spread::Hash,
            affinity: None,
            source: weft_model::Source::Preserve,
        };
        let frontend = weft_balance::Frontend {
            ip: "10.1.0.100".parse().unwrap(),
            protocol: weft_model::Protocol::Tcp,
            port: None,
        };
        Arc::new(NetworkBalance {
            gateway_mac: weft_model::MacAddr::for_address(network.id, ip),
            gateways: BTreeSet::new(),
            frontends: BTreeMap::from([(frontend, Arc::new(pool))]),
        })
    }

    fn snapshot(cluster: Builder, book: Book) -> Snapshot {
        Snapshot {
            me: node_id(1),
            cluster: Arc::new(cluster.build()),
            book: Arc::new(book),
            warming_up: false,
        }
    }
}
