//! What services this host's kernel shall know.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use weft_balance::{Backend, Desired, Frontend, HostPort, HostPublish, NetworkBalance, Pool};
use weft_model::{
    EndpointId, Family, Label, MacAddr, Network, NetworkId, Protocol, Publication, PublishMode,
    Source, Spread,
};
use weft_vxlan::Uplink;

use super::{
    names::weight,
    plane::{PlaneContext, uplink},
    records::Drained,
};
use crate::{
    api::types::PublishedPort,
    cluster::{Cluster, Placed, ServiceView},
    ledger::book::{Book, EndpointState, LocalEndpoint},
};

/// The services of every network that this host carries, and its published ports.
///
/// What is as it was `before` is the same allocation. While this agent is `warming_up`, a backend
/// whose node has not been heard yet counts as it was remembered.
pub(crate) fn balance(
    context: PlaneContext,
    cluster: &Cluster,
    book: &Book,
    before: Option<&Desired>,
    warming_up: bool,
) -> Desired {
    let view = View { context, cluster, book, warming_up };
    let mut host = HostPublish::default();
    let mut networks = BTreeMap::new();
    for id in carried(cluster, book) {
        let network = cluster.network(id).map(AsRef::as_ref).or_else(|| book.networks.get(&id));
        let Some(network) = network.filter(|n| n.driver.has_gateway()) else { continue };
        let (balance, ports) = view.network(network);
        for (port, Way { to, proxied }) in ports {
            match proxied {
                true => drop(host.proxies.entry(port).or_insert(to)),
                false => drop(host.ports.entry(port).or_insert(to)),
            }
        }
        if balance.frontends.is_empty() {
            continue;
        }
        let same = before.and_then(|before| before.networks.get(&id));
        let balance = match same.filter(|same| ***same == balance) {
            Some(same) => Arc::clone(same),
            None => Arc::new(balance),
        };
        networks.insert(id, balance);
    }
    let same = before.map(|before| &before.host).filter(|same| ***same == host);
    let host = same.cloned().unwrap_or_else(|| Arc::new(host));
    Desired { networks, host }
}

/// The networks that must be in this host's kernel: those with endpoints here, and those with a
/// service that is reached at every host.
pub(crate) fn carried(cluster: &Cluster, book: &Book) -> BTreeSet<NetworkId> {
    let mut carried = book.active();
    let networks = cluster.networks().map(|network| network.id);
    carried.extend(networks.filter(|id| cluster.is_entered_everywhere(*id)));
    carried
}

/// What this host has acknowledged before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acknowledged<'a> {
    pub(crate) drained: &'a Drained,
    /// Whether that goes before what is remembered of a node that has not been heard yet.
    pub(crate) held: bool,
}

/// The draining endpoints that this host's kernel sends no new connection to: of the networks that
/// are `carried` here, where what is in force is what was asked for last, and those of `before` that
/// are still so.
pub(crate) fn drained(
    cluster: &Cluster,
    carried: &BTreeSet<NetworkId>,
    desired: &Desired,
    status: &weft_balance::Status,
    before: Acknowledged<'_>,
) -> Drained {
    let mut drained = Drained::new();
    for id in carried {
        let wanted = desired.networks.get(id);
        let applied = status.networks.get(id).and_then(|status| status.applied.as_ref());
        let settled = match (applied, wanted) {
            (Some(applied), Some(wanted)) => Arc::ptr_eq(applied, wanted) || applied == wanted,
            (None, Some(_)) => false,
            // Where nothing is wanted nothing will be put in force.
            (_, None) => true,
        };
        let Acknowledged { drained: before, held } = before;
        let before =
            |endpoint: &EndpointId| before.get(id).is_some_and(|before| before.contains(endpoint));
        let is_draining = |placed: &Placed<'_>| {
            cluster.condition(placed).is_some_and(|condition| condition.draining)
                || held && !placed.alive && before(&placed.endpoint.id)
        };
        let draining = cluster.endpoints(*id).filter(is_draining);
        let gone: BTreeSet<EndpointId> = draining
            .map(|placed| placed.endpoint.id)
            .filter(|id| settled || before(id))
            .filter(|id| !applied.into_iter().chain(wanted).any(|balance| is_backend(balance, *id)))
            .collect();
        if !gone.is_empty() {
            drained.insert(*id, gone);
        }
    }
    drained
}

fn is_backend(balance: &NetworkBalance, endpoint: EndpointId) -> bool {
    balance.frontends.values().any(|pool| pool.backends.contains_key(&endpoint))
}

/// The one address of a host that a port is at, and the family.
///
/// The unspecified address of a family stands for every address of it.
pub(crate) fn host_ports(
    host_ip: Option<IpAddr>,
    protocol: Protocol,
    port: u16,
) -> impl Iterator<Item = HostPort> {
    let families = [Family::V4, Family::V6].into_iter();
    let families =
        families.filter(move |family| host_ip.is_none_or(|ip| Family::of(ip) == *family));
    let ip = host_ip.filter(|ip| !ip.is_unspecified());
    families.map(move |family| HostPort { ip, family, protocol, port })
}

/// Whether a connection could come to both.
pub(crate) fn overlap(one: &HostPort, other: &HostPort) -> bool {
    let same_place = one.ip.is_none() || other.ip.is_none() || one.ip == other.ip;
    same_place && (one.family, one.protocol, one.port) == (other.family, other.protocol, other.port)
}

#[derive(Clone, Copy)]
struct View<'a> {
    context: PlaneContext,
    cluster: &'a Cluster,
    book: &'a Book,
    warming_up: bool,
}

/// What is behind one port of the host.
struct Entrance {
    service: Label,
    backends: BTreeMap<EndpointId, Backend>,
    spread: Spread,
    affinity: Option<Duration>,
    source: Source,
    proxied: bool,
}

/// Where a port of the host leads to, and whether by a proxy.
struct Way {
    to: SocketAddr,
    proxied: bool,
}

impl View<'_> {
    fn network(&self, network: &Network) -> (NetworkBalance, BTreeMap<HostPort, Way>) {
        let mut frontends = BTreeMap::new();
        let mut entrances = BTreeMap::new();
        for service in self.cluster.services(network.id) {
            self.add_vips(&service, &mut frontends);
            if !network.internal {
                self.add_entrances(&service, &mut entrances);
            }
        }
        if !network.internal {
            self.add_endpoint_ports(network, &mut entrances);
        }
        let uplink = uplink(self.context, self.book, network);
        let ports = through_uplink(entrances, uplink.as_ref(), &mut frontends);
        let balance = NetworkBalance {
            gateway_mac: MacAddr::for_gateway(network.id),
            gateways: network.pools.iter().map(|pool| pool.gateway).collect(),
            frontends,
        };
        (balance, ports)
    }

    fn add_vips(&self, service: &ServiceView<'_>, frontends: &mut BTreeMap<Frontend, Arc<Pool>>) {
        let Some(definition) = service.definition() else { return };
        for ip in service.vips.iter().copied() {
            let family = Family::of(ip);
            let mut add = |protocol, port: Option<u16>, target: Option<u16>| {
                let pool = Pool {
                    service: service.name.clone(),
                    backends: self.backends(service, family, target, false),
                    spread: definition.spread,
                    affinity: affinity(definition.affinity),
                    source: Source::Preserve,
                };
                frontends.insert(Frontend { ip, protocol, port }, Arc::new(pool));
            };
            for port in &definition.ports {
                add(port.protocol, Some(port.port.get()), Some(port.target.get()));
            }
            if definition.ports.is_empty() {
                add(Protocol::Tcp, None, None);
                add(Protocol::Udp, None, None);
            }
        }
    }

    /// Adds the ports at which the service is published here; returns whether connections may be
    /// handed on to other hosts with their clients' addresses.
    fn add_entrances(
        &self,
        service: &ServiceView<'_>,
        entrances: &mut BTreeMap<HostPort, Entrance>,
    ) {
        let Some(definition) = service.definition() else { return };
        let here = service.backends().any(|backend| backend.node == self.context.me);
        for publication in &definition.published {
            let local_only = is_local_only(publication);
            if local_only && !here {
                continue;
            }
            let (source, _) = source_in_force(service, publication);
            let Publication { protocol, port, host_ip, .. } = *publication;
            for at in host_ports(host_ip, protocol, port.get()) {
                let target = Some(publication.target.get());
                let entrance = Entrance {
                    service: service.name.clone(),
                    backends: self.backends(service, at.family, target, local_only),
                    spread: definition.spread,
                    affinity: affinity(definition.affinity),
                    source,
                    proxied: publication.proxy_protocol,
                };
                entrances.entry(at).or_insert(entrance);
            }
        }
    }

    /// Adds the ports that lead to one endpoint of this host. They were there before any service's.
    fn add_endpoint_ports(&self, network: &Network, entrances: &mut BTreeMap<HostPort, Entrance>) {
        let attached = self.book.endpoints_of(network.id);
        for local in attached.filter(|local| local.state == EndpointState::Attached) {
            for published in &local.ports {
                let at = host_ports(published.host_ip, published.protocol, published.host_port);
                for at in at {
                    entrances.retain(|other, _| !overlap(other, &at));
                    entrances.insert(at, self.entrance_to(local, published, at.family));
                }
            }
        }
    }

    fn entrance_to(
        &self,
        local: &LocalEndpoint,
        published: &PublishedPort,
        family: Family,
    ) -> Entrance {
        let ips = local.endpoint.ips().filter(|ip| Family::of(*ip) == family);
        let backends = ips.map(|ip| {
            let backend = Backend {
                ip,
                port: Some(published.container_port),
                weight: 1,
                node: self.context.me,
                local: true,
            };
            (local.endpoint.id, backend)
        });
        Entrance {
            service: local.endpoint.name.clone(),
            backends: backends.collect(),
            spread: Spread::Hash,
            affinity: None,
            source: match local.default_route {
                true => Source::Preserve,
                false => Source::Snat,
            },
            proxied: false,
        }
    }

    /// Those that get new connections.
    fn backends(
        &self,
        service: &ServiceView<'_>,
        family: Family,
        port: Option<u16>,
        local_only: bool,
    ) -> BTreeMap<EndpointId, Backend> {
        let me = self.context.me;
        let ready = service.backends().filter(|own| {
            let as_remembered = self.warming_up && !self.book.has_drained(own.endpoint);
            service.gets_connections(own, as_remembered)
        });
        let ready = ready.filter(|backend| !local_only || backend.node == me);
        ready
            .filter_map(|backend| {
                let ip = backend.endpoint.ips().find(|ip| Family::of(*ip) == family)?;
                let node = backend.node;
                let weight = weight(backend.endpoint);
                let backend_of = Backend { ip, port, weight, node, local: node == me };
                Some((backend.endpoint.id, backend_of))
            })
            .collect()
    }
}

/// What source address the backends of a service see of clients that come to a published port, and
/// why.
///
/// A backend whose default route leads elsewhere would send its answers to a client's own address
/// where nobody waits for them; so it sees the gateway's.
pub(crate) fn source_in_force(
    service: &ServiceView<'_>,
    publication: &Publication,
) -> (Source, String) {
    let stray = service.backends().find(|backend| !backend.endpoint.default_route);
    let source = match (publication.source, stray) {
        (Source::Snat, _) | (_, Some(_)) => Source::Snat,
        (source, None) => source,
    };
    let why = match (publication.source, stray) {
        _ if publication.proxy_protocol => {
            "a proxy makes the connection, and tells the client's address in front of it".into()
        }
        (Source::Preserve | Source::Local, Some(backend)) => {
            format!("the default gateway of backend {} is not ours", backend.endpoint.name)
        }
        (Source::Snat | Source::Local, _) => "as declared".into(),
        (Source::Preserve, None) => "every backend's default gateway is ours".into(),
    };
    (source, why)
}

/// Whether only backends of the host itself get what comes to a published port.
pub(crate) fn is_local_only(publication: &Publication) -> bool {
    publication.mode == PublishMode::Host || publication.source == Source::Local
}

fn affinity(seconds: Option<u32>) -> Option<Duration> {
    seconds.map(|seconds| Duration::from_secs(seconds.into()))
}

/// Gives every entrance a port at the network's end of the uplink.
fn through_uplink(
    entrances: BTreeMap<HostPort, Entrance>,
    uplink: Option<&Uplink>,
    frontends: &mut BTreeMap<Frontend, Arc<Pool>>,
) -> BTreeMap<HostPort, Way> {
    let Some(uplink) = uplink else { return BTreeMap::new() };
    let mut ports = BTreeMap::new();
    for (at, entrance) in entrances {
        let ip = match at.family {
            Family::V4 => uplink.v4.map(|pair| IpAddr::V4(pair.network)),
            Family::V6 => uplink.v6.map(|pair| IpAddr::V6(pair.network)),
        };
        let Some(ip) = ip else { continue };
        let is_free = |port: u16| {
            !frontends.contains_key(&Frontend { ip, protocol: at.protocol, port: Some(port) })
        };
        let Some(port) = internal_port(&entrance.service, &at, is_free) else { continue };
        let Entrance { service, backends, spread, affinity, source, proxied } = entrance;
        let pool = Pool { service, backends, spread, affinity, source };
        let frontend = Frontend { ip, protocol: at.protocol, port: Some(port) };
        frontends.insert(frontend, Arc::new(pool));
        ports.insert(at, Way { to: SocketAddr::new(ip, port), proxied });
    }
    ports
}

/// The port at the network's end of the uplink for a port of the host: where a digest of what it is
/// for falls, or the next free one after it. So only those that collide move when others come and go.
fn internal_port(service: &Label, at: &HostPort, is_free: impl Fn(u16) -> bool) -> Option<u16> {
    // FNV-1a (RFC 9923): small, and the same in every release.
    let mut digest: u32 = 0x811c_9dc5;
    for byte in format!("{service} {at}").bytes() {
        digest = (digest ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    let first = digest % u32::from(u16::MAX);
    (0..u32::from(u16::MAX))
        .map(|step| (first + step) % u32::from(u16::MAX) + 1)
        .map(|port| u16::try_from(port).expect("it is at most 65,535"))
        .find(|port| is_free(*port))
}

#[cfg(test)]
mod tests;
