//! What is told of services.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use weft_balance::{HostPort, HostPublish};
use weft_model::{EndpointId, Label, Network, Publication};

use super::{Report, find, label};
use crate::{
    api::types::{
        BackendStatus, PublicationStatus, PublishedPort, ServiceMode, ServiceStatus, TableStatus,
    },
    cluster::{Backend, BackendState, ServiceView},
    ledger::{ServiceKey, Snapshot},
    projection::{host_ports, is_local_only, source_in_force, weight},
    refusal::Refusal,
};

impl Report {
    /// The services of every network, by network and name.
    pub fn services(&self) -> Vec<ServiceStatus> {
        let snapshot = self.snapshot();
        let balance = Arc::clone(&self.balancer.status().borrow());
        let mut networks: Vec<&Arc<Network>> = snapshot.cluster.networks().collect();
        networks.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        let reading = Reading { snapshot: &snapshot, balance: &balance };
        let of_network = |network| {
            let services = reading.snapshot.cluster.services(network);
            services.map(|service| reading.service(&service))
        };
        networks.into_iter().flat_map(|network| of_network(network.id)).collect()
    }

    /// One service, of `network` or of the only network that has one of that name, with the
    /// connections that its backends have.
    pub async fn service_with_connections(
        &self,
        name: &Label,
        network: Option<&str>,
    ) -> Result<ServiceStatus, Refusal> {
        let mut service = self.service(name, network)?;
        // Where the kernel has none of its frontends, or cannot be read, nothing is known.
        let Ok(connections) = self.balancer.connections(service.network_id).await else {
            return Ok(service);
        };
        let status = self.balancer.status().borrow().clone();
        let applied = status.networks.get(&service.network_id);
        let Some(applied) = applied.and_then(|status| status.applied.clone()) else {
            return Ok(service);
        };
        let own = connections.iter().filter(|(frontend, _)| {
            applied.frontends.get(frontend).is_some_and(|pool| pool.service == service.name)
        });
        let mut counts: BTreeMap<IpAddr, u64> = BTreeMap::new();
        for (backend, count) in own.flat_map(|(_, backends)| backends) {
            *counts.entry(backend.ip()).or_default() += count;
        }
        for backend in &mut service.backends {
            let of_backend = backend.addresses.iter().filter_map(|ip| counts.get(ip));
            backend.connections = Some(of_backend.sum());
        }
        Ok(service)
    }

    /// One service, of `network` or of the only network that has one of that name.
    pub fn service(&self, name: &Label, network: Option<&str>) -> Result<ServiceStatus, Refusal> {
        let snapshot = self.snapshot();
        let cluster = &snapshot.cluster;
        let found: Vec<ServiceView<'_>> = match network {
            Some(text) => cluster.service(find(cluster, text)?.id, name).into_iter().collect(),
            None => cluster.networks().filter_map(|n| cluster.service(n.id, name)).collect(),
        };
        let balance = Arc::clone(&self.balancer.status().borrow());
        let reading = Reading { snapshot: &snapshot, balance: &balance };
        match found.as_slice() {
            [service] => Ok(reading.service(service)),
            [] => Err(Refusal::missing(format!(
                "there is no service {name}{}: weft service ls lists them",
                network.map(|network| format!(" in network {network}")).unwrap_or_default()
            ))),
            several => {
                let names = several.iter().filter_map(|service| cluster.network(service.network));
                let names: Vec<_> = names.map(|network| network.name.to_string()).collect();
                Err(Refusal::conflict(
                    "network",
                    format!("service {name} is in {}: name one with --network", names.join(", ")),
                ))
            }
        }
    }

    /// How the kernel's tables of services and published ports stand.
    pub(super) fn service_tables(&self) -> Vec<TableStatus> {
        let status = self.balancer.status().borrow().clone();
        let cluster = &self.snapshot().cluster;
        let networks = status.networks.iter().map(|(id, status)| TableStatus {
            table: "services".into(),
            network: cluster.network(*id).map(|network| network.name.clone()),
            operations: status.changes,
            drift_repaired: status.repairs,
            lag_ms: status.lag.map_or(0.0, |lag| lag.as_secs_f64() * 1e3),
            error: status.error.clone(),
        });
        let host = &status.host;
        let published = TableStatus {
            table: "publish".into(),
            network: None,
            operations: u64::try_from(host.open.len()).unwrap_or(u64::MAX),
            drift_repaired: host.repairs,
            lag_ms: 0.0,
            error: host.error.clone(),
        };
        let is_used = host.applied.as_ref().is_some_and(|ports| **ports != HostPublish::default());
        networks.chain(is_used.then_some(published)).collect()
    }

    /// What an operator should look at of services.
    pub(super) fn service_findings(&self) -> Vec<String> {
        let snapshot = self.snapshot();
        let status = self.balancer.status().borrow().clone();
        let taken = status.host.taken.iter().map(|(port, owner)| {
            format!("published port {port} is not open on this host: {owner} has it")
        });
        let services =
            snapshot.cluster.networks().flat_map(|network| snapshot.cluster.services(network.id));
        let unconfirmed = services.filter_map(|service| {
            let said = service.definition()?.vips.len();
            (service.vips.len() < said).then(|| {
                format!(
                    "service {}: its lender does not confirm a virtual address, or another has it: weft service update {0} --vip none, and then --vip auto",
                    service.name
                )
            })
        });
        taken.chain(unconfirmed).collect()
    }

    pub fn service_of(&self, key: &ServiceKey) -> Result<ServiceStatus, Refusal> {
        self.service(&key.name, Some(&key.network.to_string()))
    }

    /// The ports of this host that lead to its endpoints of one name, and those at which services
    /// with such a backend are published.
    pub fn ports(&self, endpoint: &str) -> Result<Vec<PublishedPort>, Refusal> {
        let snapshot = self.snapshot();
        let is_meant = |id: EndpointId, name: &Label| {
            name.as_str() == endpoint
                || (endpoint.len() >= 8 && id.to_string().starts_with(endpoint))
        };
        let here = snapshot.book.endpoints.values();
        let here: Vec<_> =
            here.filter(|local| is_meant(local.endpoint.id, &local.endpoint.name)).collect();
        if here.is_empty() {
            return Err(Refusal::missing(format!(
                "there is no endpoint {endpoint} on this host: weft ps lists them"
            )));
        }
        let mut ports: Vec<PublishedPort> = here.iter().flat_map(|l| l.ports.clone()).collect();
        for local in here {
            for service in snapshot.cluster.services(local.endpoint.network) {
                let serves = service.backends().any(|b| b.endpoint.id == local.endpoint.id);
                let published = service.definition().filter(|_| serves);
                let published = published.into_iter().flat_map(|service| &service.published);
                ports.extend(published.map(|its| PublishedPort {
                    host_ip: its.host_ip,
                    host_port: its.port.get(),
                    container_port: its.target.get(),
                    protocol: its.protocol,
                }));
            }
        }
        ports
            .sort_by_key(|port| (port.container_port, port.protocol, port.host_port, port.host_ip));
        ports.dedup();
        Ok(ports)
    }
}

/// What services are read from.
#[derive(Clone, Copy)]
struct Reading<'a> {
    snapshot: &'a Snapshot,
    balance: &'a weft_balance::Status,
}

impl Reading<'_> {
    fn service(&self, service: &ServiceView<'_>) -> ServiceStatus {
        let cluster = &self.snapshot.cluster;
        let network = cluster.network(service.network).expect("services are of known networks");
        let definition = service.definition();
        let published = definition.map_or(&[][..], |definition| &definition.published);
        ServiceStatus {
            name: service.name.clone(),
            network: network.name.clone(),
            network_id: network.id,
            mode: match definition {
                None => ServiceMode::Implied,
                Some(definition) if definition.vips.is_empty() => ServiceMode::Dnsrr,
                Some(_) => ServiceMode::Vip,
            },
            vips: service.vips.to_vec(),
            ports: definition.map_or_else(Vec::new, |definition| definition.ports.clone()),
            spread: definition.map(|definition| definition.spread).unwrap_or_default(),
            affinity: definition.and_then(|definition| definition.affinity),
            check: definition.and_then(|definition| definition.check.clone()),
            published: published.iter().map(|its| self.publication(service, its)).collect(),
            labels: definition.map(|definition| definition.labels.clone()).unwrap_or_default(),
            backends: service.backends().map(|backend| self.backend(&backend)).collect(),
            revision: service.record.map_or(0, |record| record.revision),
            writer: service.record.map(|record| label(cluster, record.writer)),
        }
    }

    fn backend(&self, backend: &Backend<'_>) -> BackendStatus {
        let endpoint = backend.endpoint;
        BackendStatus {
            id: endpoint.id,
            name: endpoint.name.clone(),
            node: label(&self.snapshot.cluster, backend.node),
            node_id: backend.node,
            addresses: endpoint.ips().collect(),
            state: backend.state.as_str().into(),
            reason: match backend.state {
                BackendState::Unhealthy(reason) => Some(reason.clone()),
                BackendState::Ready
                | BackendState::Starting
                | BackendState::Draining
                | BackendState::Unreachable => None,
            },
            weight: if backend.state.is_ready() { weight(endpoint) } else { 0 },
            connections: None,
        }
    }

    fn publication(&self, service: &ServiceView<'_>, its: &Publication) -> PublicationStatus {
        let (in_force, reason) = source_in_force(service, its);
        PublicationStatus { publication: *its, in_force, reason, here: self.here(service, its) }
    }

    /// Whether the port is open on this host.
    fn here(&self, service: &ServiceView<'_>, its: &Publication) -> String {
        let host = &self.balance.host;
        let ports: Vec<HostPort> = host_ports(its.host_ip, its.protocol, its.port.get()).collect();
        if let Some((port, owner)) =
            ports.iter().find_map(|port| Some((port, host.taken.get(port)?)))
        {
            return format!("{port} is taken by {owner}");
        }
        let is_backed = service.backends().any(|backend| backend.node == self.snapshot.me);
        match ports.iter().any(|port| host.open.contains(port)) {
            true => "open".into(),
            false if is_local_only(its) && !is_backed => "closed: no backend on this host".into(),
            false => match &host.error {
                Some(error) => format!("not open: {error}"),
                None => "not open yet".into(),
            },
        }
    }
}
