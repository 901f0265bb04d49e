//! What the API tells: pure readings of the keeper's snapshot and the reconcilers' status.

mod services;

use std::{collections::BTreeMap, sync::Arc};

use ipnet::IpNet;
use time::OffsetDateTime;
use tokio::sync::watch;
use weft_balance::Balancer;
use weft_gossip::{Liveness, Member, quic::QuicCarrier};
use weft_model::{DnsName, Endpoint, EndpointId, Label, Network, NodeId};
use weft_seal::Tunnel;
use weft_vxlan::Parents;

use crate::{
    api::types::{
        Attached, EncryptionStatus, EndpointStatus, NetworkState, NetworkStatus, NodeLiveness,
        NodeStatus, Resolved, ResolvedAddress, Sandbox, Status, TableStatus,
    },
    cluster::Cluster,
    encryption::{Encryption, Readings, findings_of},
    ledger::{
        Ledger, Snapshot, Snapshots, SpaceUsage,
        book::{EndpointState, LocalEndpoint},
    },
    listeners::sandboxes::RESOLVER,
    projection,
    refusal::Refusal,
    tokens::rfc3339,
};

/// Answers what is asked about the cluster and this node. Cheap to clone.
#[derive(Clone)]
pub struct Report {
    ledger: Ledger,
    snapshots: Snapshots,
    plane: watch::Receiver<Arc<weft_vxlan::Status>>,
    balancer: Balancer,
    carrier: Arc<QuicCarrier>,
    encryption: Encryption,
    parents: Parents,
    domain: DnsName,
    rtt: RoundTrips,
}

/// What a report reads.
pub struct Sources {
    pub ledger: Ledger,
    pub snapshots: Snapshots,
    pub plane: watch::Receiver<Arc<weft_vxlan::Status>>,
    pub balancer: Balancer,
    pub carrier: Arc<QuicCarrier>,
    pub encryption: Encryption,
    pub parents: Parents,
}

/// Reads the round-trip times to peers, in milliseconds.
pub type RoundTrips = Arc<dyn Fn() -> BTreeMap<NodeId, f64> + Send + Sync>;

impl Report {
    pub fn new(sources: Sources, domain: DnsName, rtt: RoundTrips) -> Self {
        let Sources { ledger, snapshots, plane, balancer, carrier, encryption, parents } = sources;
        Self { ledger, snapshots, plane, balancer, carrier, encryption, parents, domain, rtt }
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshots.borrow())
    }

    /// What spreads connections over services on this host.
    pub fn balancer(&self) -> &Balancer {
        &self.balancer
    }

    pub fn nodes(&self) -> Vec<NodeStatus> {
        let snapshot = self.snapshot();
        let rtt = (self.rtt)();
        let mut counts: BTreeMap<NodeId, usize> = BTreeMap::new();
        for network in snapshot.cluster.networks() {
            for placed in snapshot.cluster.endpoints(network.id) {
                *counts.entry(placed.node).or_default() += 1;
            }
        }
        let mut nodes: Vec<NodeStatus> = snapshot
            .cluster
            .members()
            .filter_map(|member| {
                let endpoints = counts.get(&member.id).copied().unwrap_or(0);
                node_status(member, snapshot.me, endpoints, rtt.get(&member.id).copied())
            })
            .collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    pub async fn networks(&self) -> Result<Vec<NetworkStatus>, Refusal> {
        let usage = self.ledger.usage().await?;
        let snapshot = self.snapshot();
        let mut networks: Vec<_> = snapshot
            .cluster
            .networks()
            .map(|network| self.network_status(&snapshot, network, &usage))
            .collect();
        networks.sort_by(|a, b| a.network.name.cmp(&b.network.name));
        Ok(networks)
    }

    pub async fn network(&self, text: &str) -> Result<NetworkStatus, Refusal> {
        let usage = self.ledger.usage().await?;
        let snapshot = self.snapshot();
        let network = find(&snapshot.cluster, text)?;
        Ok(self.network_status(&snapshot, network, &usage))
    }

    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        let snapshot = self.snapshot();
        let networks = snapshot.cluster.networks();
        networks.flat_map(|network| endpoints_of(&snapshot, network)).collect()
    }

    /// The endpoints of this host, in whatever state; `reachable` where they are attached.
    pub fn endpoints_here(&self) -> Vec<EndpointStatus> {
        self.endpoints_here_if(|_| true)
    }

    /// The host's own, in whatever state.
    pub fn exposures(&self) -> Vec<EndpointStatus> {
        self.endpoints_here_if(|local| local.sandbox == Sandbox::Host)
    }

    fn endpoints_here_if(&self, wanted: impl Fn(&LocalEndpoint) -> bool) -> Vec<EndpointStatus> {
        let snapshot = self.snapshot();
        let known = snapshot.book.endpoints.values().filter(|local| wanted(local));
        let known = known.filter_map(|local| {
            let id = local.endpoint.network;
            // A network that was removed a moment ago is still in the book.
            let network = snapshot.cluster.network(id).map(AsRef::as_ref);
            let network = network.or_else(|| snapshot.book.networks.get(&id))?;
            let attached = local.state == EndpointState::Attached;
            Some(endpoint_status(&snapshot, network, snapshot.me, &local.endpoint, attached))
        });
        known.collect()
    }

    /// What the sandbox of an endpoint of this host needs to know.
    pub fn attached(&self, id: EndpointId) -> Result<Attached, Refusal> {
        let snapshot = self.snapshot();
        let gone = || Refusal::missing(format!("endpoint {} is gone already", id.short()));
        let local = snapshot.book.endpoints.get(&id).ok_or_else(gone)?;
        let network = snapshot.cluster.network(local.endpoint.network).ok_or_else(gone)?;
        Ok(Attached {
            endpoint: endpoint_status(&snapshot, network, snapshot.me, &local.endpoint, true),
            resolvers: match network.driver.has_gateway() {
                true => projection::gateway_ips(network),
                false => vec![RESOLVER.into()],
            },
            gateways: projection::gateway_ips(network),
            mtu: self.mtu(network, &snapshot.cluster),
            domain: self.domain.clone(),
            default_route: local.default_route,
            sandbox: local.endpoint.sandbox.clone(),
            reference: Some(local.sandbox.clone()),
        })
    }

    fn network_status(
        &self,
        snapshot: &Snapshot,
        network: &Arc<Network>,
        usage: &SpaceUsage,
    ) -> NetworkStatus {
        let cluster = &snapshot.cluster;
        let state = match cluster.conflict(network.id) {
            None => NetworkState::Ready,
            Some(_) => NetworkState::Conflict,
        };
        NetworkStatus {
            network: network.as_ref().clone(),
            state,
            mtu: self.mtu(network, cluster),
            endpoints: endpoints_of(snapshot, network),
            addresses: usage.get(&network.id).cloned().unwrap_or_default(),
        }
    }

    /// The macvlan networks whose interface is not as it should be.
    fn parents_at_fault(&self, cluster: &Cluster) -> Vec<String> {
        let networks = cluster.networks().filter_map(|network| {
            let parent = network.options.macvlan?.parent?;
            Some(format!("network {}: {}", network.name, self.parents.fault(parent)?))
        });
        networks.collect()
    }

    /// The MTU of a network; where nobody has said it, that of the interface that it is on.
    fn mtu(&self, network: &Network, cluster: &Cluster) -> u16 {
        let unsaid = network.options.macvlan.filter(|_| network.options.mtu.is_none());
        let parent = unsaid.and_then(|macvlan| macvlan.parent);
        let found = parent.and_then(|parent| self.parents.mtu(parent));
        let found = found.map(|mtu| u16::try_from(mtu).unwrap_or(u16::MAX));
        found.unwrap_or_else(|| projection::mtu(network, cluster))
    }

    /// Looks a name up as a container of `network` would; of any network without one.
    pub fn resolve(&self, name: &str, network: Option<&str>) -> Result<Resolved, Refusal> {
        let snapshot = self.snapshot();
        let cluster = &snapshot.cluster;
        let networks: Vec<&Arc<Network>> = match network {
            Some(text) => vec![find(cluster, text)?],
            None => cluster.networks().collect(),
        };
        let asked: DnsName =
            name.parse().map_err(|error| Refusal::field("name", format!("{error}")))?;
        let mut answers = Vec::new();
        for network in networks {
            let name = asked_below(&asked, network, &self.domain);
            answers.extend(answers_to(cluster, network, name));
        }
        match answers.is_empty() {
            false => Ok(Resolved { name: name.to_owned(), answers }),
            true => Err(Refusal::missing(match network {
                Some(network) => format!("{name} has no address in network {network}"),
                None => format!("{name} has no address in any network"),
            })),
        }
    }

    pub fn certificate_expires(&self) -> OffsetDateTime {
        self.carrier.identity().certificate().validity().until
    }

    /// How this node takes part in encrypted networks.
    pub fn encryption(&self) -> EncryptionStatus {
        let tunnel = self.encryption.status();
        let readings = Readings {
            snapshot: &self.snapshot(),
            offer: self.encryption.tunnel().map(Tunnel::offer),
            tunnel: &tunnel,
            counters: &self.encryption.counters(),
            plane: &self.plane.borrow().clone(),
        };
        readings.status()
    }

    pub fn status(&self) -> Status {
        let snapshot = self.snapshot();
        let nodes = self.nodes();
        let mut states: BTreeMap<NodeLiveness, usize> = BTreeMap::new();
        for node in &nodes {
            *states.entry(node.state).or_default() += 1;
        }
        let plane = self.plane.borrow().clone();
        let expires = self.certificate_expires();
        let encryption = self.encryption();
        let mut findings = findings(&snapshot.cluster, &nodes, expires, OffsetDateTime::now_utc());
        findings.extend(findings_of(&encryption));
        findings.extend(self.service_findings());
        let balance = self.service_tables();
        findings.extend(self.parents_at_fault(&snapshot.cluster));
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            cluster: self.carrier.identity().cluster(),
            node: nodes.iter().find(|node| node.this).cloned().expect("this node is a member"),
            nodes: states,
            networks: snapshot.cluster.networks().count(),
            endpoints: snapshot.cluster.endpoint_count(),
            local_endpoints: snapshot.book.endpoints.len(),
            certificate_expires: rfc3339(expires),
            tables: tables(&snapshot.cluster, &plane).into_iter().chain(balance).collect(),
            encryption,
            findings,
        }
    }
}

fn endpoints_of(snapshot: &Snapshot, network: &Network) -> Vec<EndpointStatus> {
    let mut endpoints: Vec<_> = snapshot
        .cluster
        .endpoints(network.id)
        .map(|placed| {
            endpoint_status(snapshot, network, placed.node, placed.endpoint, placed.alive)
        })
        .collect();
    endpoints.sort_by(|a, b| (&a.name, &a.node).cmp(&(&b.name, &b.node)));
    endpoints
}

fn find<'a>(cluster: &'a Cluster, text: &str) -> Result<&'a Arc<Network>, Refusal> {
    cluster.find_network(text).ok_or_else(|| {
        Refusal::missing(format!("there is no network {text}: weft network ls lists them"))
    })
}

fn node_status(
    member: &Member,
    me: NodeId,
    endpoints: usize,
    rtt_ms: Option<f64>,
) -> Option<NodeStatus> {
    let node = member.node.as_ref()?;
    Some(NodeStatus {
        id: member.id,
        name: node.name.clone(),
        state: match member.liveness {
            Liveness::Alive => NodeLiveness::Alive,
            Liveness::Suspect => NodeLiveness::Suspect,
            Liveness::Left => NodeLiveness::Left,
        },
        this: member.id == me,
        address: node.address,
        vtep: node.vtep,
        version: node.version.clone(),
        underlay_mtu: node.underlay_mtu,
        endpoints,
        rtt_ms,
        sealing: node.sealing.clone(),
    })
}

fn endpoint_status(
    snapshot: &Snapshot,
    network: &Network,
    node: NodeId,
    endpoint: &Endpoint,
    alive: bool,
) -> EndpointStatus {
    let prefix = |ip| {
        let length = network.pool_of(ip).map_or(32, |pool| pool.subnet.prefix_len());
        IpNet::new(ip, length).expect("the length is of the address's own subnet")
    };
    let local = snapshot.book.endpoints.get(&endpoint.id);
    EndpointStatus {
        id: endpoint.id,
        name: endpoint.name.clone(),
        aliases: endpoint.aliases.clone(),
        network: network.name.clone(),
        network_id: network.id,
        node: label(&snapshot.cluster, node),
        node_id: node,
        mac: endpoint.mac,
        addresses: endpoint.ips().map(prefix).collect(),
        ifname: local
            // What an engine calls it inside, the engine does not tell.
            .filter(|local| node == snapshot.me && !matches!(local.sandbox, Sandbox::Engine(_)))
            .and_then(|local| local.ifname.clone()),
        ports: local
            .filter(|_| node == snapshot.me)
            .map_or_else(Vec::new, |local| local.ports.clone()),
        reachable: alive,
        service: endpoint.service.clone(),
        labels: endpoint.labels.clone(),
    }
}

/// A node's name; its short id, which is a label too, where it has not been heard.
fn label(cluster: &Cluster, node: NodeId) -> Label {
    cluster.node_name(node).parse().expect("names and short ids are labels")
}

/// What of `asked` is left once the cluster's domain and the network's name are taken off.
fn asked_below<'a>(asked: &'a DnsName, network: &Network, domain: &DnsName) -> &'a str {
    let strip = |text: &'a str, suffix: &str| text.strip_suffix(suffix)?.strip_suffix('.');
    let text = asked.as_str();
    let inside = strip(text, domain.as_str()).unwrap_or(text);
    strip(inside, network.name.as_str()).unwrap_or(inside)
}

/// What `name` stands for in a network: a declared service, whose name hides endpoints'; else its
/// endpoints and the ready members of the service that they imply.
fn answers_to(cluster: &Cluster, network: &Network, name: &str) -> Vec<ResolvedAddress> {
    let service = |name: &str| cluster.service(network.id, &name.parse().ok()?);
    let own = service(name);
    let answer = |address, endpoint: &Label, node: Option<NodeId>| ResolvedAddress {
        address,
        network: network.name.clone(),
        endpoint: endpoint.clone(),
        node: node.map(|node| label(cluster, node)),
    };
    let definition = own.and_then(|own| own.definition());
    if let Some(own) = own.filter(|_| definition.is_some_and(|own| !own.vips.is_empty())) {
        return own.vips.iter().map(|ip| answer(*ip, own.name, None)).collect();
    }
    let behind = own.or_else(|| service(name.strip_prefix("tasks.")?));
    let ready = behind.into_iter().flat_map(|service| service.backends());
    let ready = ready.filter(|backend| backend.state.is_ready());
    let mut found: BTreeMap<EndpointId, (&Endpoint, NodeId)> =
        ready.map(|backend| (backend.endpoint.id, (backend.endpoint, backend.node))).collect();
    if definition.is_none() {
        let named = cluster.endpoints(network.id).filter(|placed| placed.alive);
        let named = named.filter(|placed| {
            let names = weft_dns::Entry::endpoint(placed.endpoint).names;
            names.iter().any(|own| own.as_str() == name)
        });
        found.extend(named.map(|placed| (placed.endpoint.id, (placed.endpoint, placed.node))));
    }
    let each = found
        .into_values()
        .flat_map(|(endpoint, node)| endpoint.ips().map(move |ip| (ip, &endpoint.name, node)));
    each.map(|(ip, name, node)| answer(ip, name, Some(node))).collect()
}

fn tables(cluster: &Cluster, plane: &weft_vxlan::Status) -> Vec<TableStatus> {
    let host = plane.host.iter().map(|(table, status)| (None, table, status));
    let networks = plane.networks.iter().flat_map(|(id, network)| {
        let name = cluster.network(*id).map(|network| network.name.clone());
        network.tables.iter().map(move |(table, status)| (name.clone(), table, status))
    });
    host.chain(networks)
        .map(|(network, table, status)| TableStatus {
            table: table.as_str().into(),
            network,
            operations: status.applied,
            drift_repaired: status.drift,
            lag_ms: status.lag.map_or(0.0, |lag| lag.as_secs_f64() * 1e3),
            error: status.error.clone(),
        })
        .collect()
}

/// What an operator should look at.
fn findings(
    cluster: &Cluster,
    nodes: &[NodeStatus],
    expires: OffsetDateTime,
    now: OffsetDateTime,
) -> Vec<String> {
    let mut findings = Vec::new();
    if expires - now < time::Duration::days(3) {
        findings.push(format!(
            "this node's certificate ends at {} and was not renewed: see that a node with the authority's key (the one that ran weft init) can be reached",
            rfc3339(expires)
        ));
    }
    for node in nodes.iter().filter(|node| node.state == NodeLiveness::Suspect) {
        findings.push(format!(
            "node {} ({}) is not heard: check its agent and the path to it",
            node.name, node.address
        ));
    }
    for network in cluster.networks() {
        if let Some(before) = cluster.conflict(network.id) {
            findings.push(format!(
                "network {} ({}) stands back before {} ({}): remove one of them",
                network.name,
                network.id.short(),
                before.name,
                before.id.short()
            ));
        }
    }
    for member in cluster.members().filter(|member| member.unknown_keys + member.undecodable > 0) {
        findings.push(format!(
            "node {} says {} things that this version does not understand: upgrade this agent",
            cluster.node_name(member.id),
            member.unknown_keys + member.undecodable
        ));
    }
    findings
}
