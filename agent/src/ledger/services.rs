//! Services that are declared here, what this node repeats of others', and virtual addresses.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use weft_ipam::Ask;
use weft_model::{
    EndpointId, Family, Label, Network, NetworkId, Protocol, Publication, PublishMode, Service,
    ServiceRecord, ServiceState, VipLease,
};

use super::{
    NETWORK_DEADLINE,
    book::VipReservation,
    keeper::Keeper,
    repeated::{next_revision, repeated},
    survey::{Sight, Survey},
    waiting::Obstacle,
};
use crate::{
    api::types::{CreateService, UpdateService, Vip},
    clock,
    cluster::{Cluster, ServiceView, supersedes},
    declaration::{Change, changed, check, ports_of},
    projection::{host_ports, overlap},
    refusal::{Refusal, RefusalKind},
};

/// Names a service.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct ServiceKey {
    pub network: NetworkId,
    pub name: Label,
}

/// What is asked of a service.
#[derive(Clone, Debug)]
pub enum ServiceOrder {
    Create(CreateService),
    Update {
        name: ServiceName,
        update: UpdateService,
    },
    /// Declares the service without a virtual address where nobody has.
    Publish {
        name: ServiceName,
        publication: Publication,
    },
    /// Takes back every publication that fits.
    Unpublish {
        name: ServiceName,
        port: Option<u16>,
        target: u16,
        protocol: Protocol,
    },
    Remove(ServiceName),
}

/// A service as a user names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServiceName {
    pub service: Label,
    /// A network's name or id; the only one with such a service where absent.
    pub network: Option<String>,
}

impl ServiceOrder {
    fn name(&self) -> ServiceName {
        match self {
            Self::Create(create) => {
                ServiceName { service: create.name.clone(), network: Some(create.network.clone()) }
            }
            Self::Update { name, .. }
            | Self::Publish { name, .. }
            | Self::Unpublish { name, .. }
            | Self::Remove(name) => name.clone(),
        }
    }
}

impl Keeper {
    /// Writes what is ordered into the book, if everything that it needs is there. `id` is to stand
    /// for the service in the address space.
    pub(super) fn grant_service(
        &mut self,
        id: EndpointId,
        order: &ServiceOrder,
        survey: &Survey,
    ) -> Result<ServiceKey, Obstacle> {
        let name = order.name();
        let network = self.network_of(&name, order)?;
        self.check_network(&network)?;
        let key = ServiceKey { network: network.id, name: name.service };
        let standing = self.standing(&key).cloned();
        let Some(Change { mut service, vip }) = changed(standing.as_ref(), order, &network)? else {
            self.remove_service(&key);
            return Ok(key);
        };
        check(&service, &vip, &network)?;
        let before = standing.as_ref().map_or(&[][..], |standing| &standing.published);
        self.check_ports_of(&service, before, survey)?;
        self.take_vips(id, &vip, &network, &mut service)?;
        if service.lease.is_some_and(|lease| lease.id == id) {
            let reservation = VipReservation { network: network.id, service: service.name.clone() };
            Arc::make_mut(&mut self.book).vips.insert(id, reservation);
        }
        tracing::info!(service = %key.name, network = %network.name, "service declared");
        self.write_service(&key, ServiceState::Defined(Box::new(service)));
        Ok(key)
    }

    /// The network that is meant.
    fn network_of(
        &self,
        name: &ServiceName,
        order: &ServiceOrder,
    ) -> Result<Arc<Network>, Obstacle> {
        let Some(text) = &name.network else {
            let is_known = matches!(order, ServiceOrder::Publish { .. });
            let found = find_service(&self.cluster, &name.service, is_known)?;
            return Ok(Arc::clone(found));
        };
        self.cluster.find_network(text).cloned().ok_or_else(|| Obstacle::Waits {
            reason: Refusal {
                field: Some("network"),
                ..Refusal::missing(format!(
                    "there is no network {text}: create it, or see weft network ls"
                ))
            },
            patience: NETWORK_DEADLINE,
        })
    }

    /// The revision that holds: the cluster's, or one that was written a moment ago.
    fn record(&self, key: &ServiceKey) -> Option<&ServiceRecord> {
        let heard = self.cluster.service_record(key.network, &key.name);
        let written = self.book.services.get(&key.network).and_then(|all| all.get(&key.name));
        match (heard, written) {
            (Some(heard), Some(written)) if supersedes(written, heard) => Some(written),
            (None, written) => written,
            (heard, _) => heard,
        }
    }

    fn standing(&self, key: &ServiceKey) -> Option<&Service> {
        match &self.record(key)?.state {
            ServiceState::Defined(service) => Some(service),
            ServiceState::Removed => None,
        }
    }

    fn write_service(&mut self, key: &ServiceKey, state: ServiceState) {
        let before = self.record(key).map(|record| record.revision);
        let record = ServiceRecord {
            name: key.name.clone(),
            revision: next_revision(before, clock::unix_seconds()),
            writer: self.context.me,
            state,
        };
        let services = &mut Arc::make_mut(&mut self.book).services;
        services.entry(key.network).or_default().insert(key.name.clone(), record);
    }

    fn remove_service(&mut self, key: &ServiceKey) {
        tracing::info!(service = %key.name, network = %key.network, "service removed");
        self.write_service(key, ServiceState::Removed);
    }

    /// Gives a service the virtual addresses that it is to have.
    fn take_vips(
        &mut self,
        id: EndpointId,
        vip: &Vip,
        network: &Network,
        service: &mut Service,
    ) -> Result<(), Obstacle> {
        let fixed: &[IpAddr] = match vip {
            Vip::None => {
                service.vips.clear();
                service.lease = None;
                return Ok(());
            }
            // What it has, it keeps.
            Vip::Auto if service.vips.len() == network.pools.len() => return Ok(()),
            Vip::Auto => &[],
            Vip::Addresses(fixed) => {
                let has = |ip: &IpAddr| service.vips.iter().any(|grant| grant.ip == *ip);
                if service.vips.len() == network.pools.len() && fixed.iter().all(has) {
                    return Ok(());
                }
                fixed
            }
        };
        if let Some(ip) = fixed.iter().find(|ip| network.pool_of(**ip).is_none()) {
            let subnets: Vec<_> = network.pools.iter().map(|p| p.subnet.to_string()).collect();
            return Err(Refusal::field(
                "vip",
                format!(
                    "{ip} lies outside {} of network {}: give one inside it",
                    subnets.join(", "),
                    network.name
                ),
            )
            .into());
        }
        let mut grants = Vec::new();
        for pool in &network.pools {
            let family = pool.subnet.family();
            let asked = fixed.iter().copied().find(|ip| Family::of(*ip) == family);
            let ask = asked.map_or(Ask::Any(family), Ask::Fixed);
            grants.push(self.allocate(network, id, ask)?);
        }
        service.vips = grants;
        service.lease = Some(VipLease { node: self.context.me, id });
        Ok(())
    }

    /// Refuses ports that somebody else has. Those of `before` are held for the service already.
    fn check_ports_of(
        &self,
        service: &Service,
        before: &[Publication],
        survey: &Survey,
    ) -> Result<(), Obstacle> {
        for port in ports_of(service) {
            if let Some(owner) = self.owner_of_port(&port, Some((service.network, &service.name))) {
                return Err(Refusal::conflict("published", taken(&port, &owner)).into());
            }
        }
        // At hosts that have a backend only, this one may have no part.
        let everywhere = |publication: &&Publication| publication.mode == PublishMode::Ingress;
        let fresh = service.published.iter().filter(|its| !before.contains(its));
        let mut unseen = BTreeSet::new();
        for publication in fresh.filter(everywhere) {
            let Publication { host_ip, protocol, port, .. } = *publication;
            for port in host_ports(host_ip, protocol, port.get()) {
                match survey.sight(&port) {
                    Sight::Free => {}
                    Sight::Taken(why) => return Err(Refusal::conflict("published", why).into()),
                    Sight::Unseen => drop(unseen.insert(port)),
                }
            }
        }
        match unseen.is_empty() {
            true => Ok(()),
            false => Err(Obstacle::Unseen(unseen)),
        }
    }

    /// Who has a port of this host already, or of every host; `except` may.
    pub(super) fn owner_of_port(
        &self,
        port: &weft_balance::HostPort,
        except: Option<(NetworkId, &Label)>,
    ) -> Option<String> {
        for network in self.cluster.networks() {
            let services = self.cluster.services(network.id);
            let others = services.filter(|view| except != Some((network.id, view.name)));
            for other in others.filter_map(|view| view.definition()) {
                if ports_of(other).any(|its| overlap(&its, port)) {
                    return Some(format!("service {} of network {}", other.name, network.name));
                }
            }
        }
        self.book.endpoints.values().find_map(|local| {
            let its = local.ports.iter().flat_map(|published| {
                host_ports(published.host_ip, published.protocol, published.host_port)
            });
            its.into_iter().any(|its| overlap(&its, port)).then(|| {
                format!(
                    "container {} of network {} on this host",
                    local.endpoint.name,
                    self.network_name(local.endpoint.network)
                )
            })
        })
    }

    /// Takes over what holds by now of the services that this node speaks of.
    pub(super) fn follow_services(&mut self) {
        let (me, now) = (self.context.me, clock::unix_seconds());
        let services = repeated(&self.book, &self.cluster, me, now);
        if self.book.services != services {
            Arc::make_mut(&mut self.book).services = services;
        }
    }

    /// Gives every network that is carried an uplink.
    pub(super) fn take_uplinks(&mut self) {
        let cluster = Arc::clone(&self.cluster);
        for id in crate::projection::carried(&cluster, &self.book) {
            if let Some(network) = cluster.network(id)
                && let Err(refusal) = self.take_uplink(network)
            {
                tracing::warn!(network = %network.name, error = %refusal, "no ingress");
            }
        }
    }

    /// Whether there are virtual addresses that no service has any more.
    pub(super) fn has_spare_vips(&self) -> bool {
        self.book.vips.iter().any(|(id, reservation)| !self.is_vip_used(*id, reservation))
    }

    fn is_vip_used(&self, id: EndpointId, reservation: &VipReservation) -> bool {
        let VipReservation { network, service } = reservation;
        let key = ServiceKey { network: *network, name: service.clone() };
        let lease = self.standing(&key).and_then(|service| service.lease);
        lease == Some(VipLease { node: self.context.me, id })
    }

    /// Gives virtual addresses back that no service has any more, once this host's kernel has let go
    /// of them. Then they rest, as those of endpoints do.
    pub(super) fn give_back_vips(&mut self) {
        if self.is_warming_up() {
            return;
        }
        let spare: Vec<(EndpointId, NetworkId)> = self
            .book
            .vips
            .iter()
            .filter(|(id, reservation)| !self.is_vip_used(**id, reservation))
            .map(|(id, reservation)| (*id, reservation.network))
            .collect();
        for (id, network) in spare {
            if self.is_in_kernel(network, id) {
                continue;
            }
            self.release(network, id);
            Arc::make_mut(&mut self.book).vips.remove(&id);
        }
    }

    /// Whether this host may still answer at an address that `id` stands for.
    fn is_in_kernel(&self, network: NetworkId, id: EndpointId) -> bool {
        let Some(space) = self.spaces.get(&network) else { return false };
        let of_service = space.leases().filter(|lease| lease.endpoint == id);
        let ips: BTreeSet<IpAddr> = of_service.map(|lease| lease.grant.ip).collect();
        let status = self.links.balance.status.borrow();
        let applied = status.networks.get(&network).and_then(|status| status.applied.as_ref());
        applied.is_some_and(|applied| applied.frontends.keys().any(|at| ips.contains(&at.ip)))
    }
}

/// The one network that has a service of that name; with `by_members`, also where nobody declared
/// one but endpoints have the name.
fn find_service<'a>(
    cluster: &'a Cluster,
    name: &Label,
    by_members: bool,
) -> Result<&'a Arc<Network>, Refusal> {
    let has = |network: &&Arc<Network>| {
        let declared = cluster.service(network.id, name).is_some_and(|view| is_declared(&view));
        let mut endpoints = cluster.endpoints(network.id);
        declared
            || by_members
                && endpoints.any(|placed| {
                    let endpoint = placed.endpoint;
                    endpoint.service.as_ref() == Some(name) || endpoint.name == *name
                })
    };
    let found: Vec<_> = cluster.networks().filter(has).collect();
    match found.as_slice() {
        [network] => Ok(network),
        [] => Err(Refusal::missing(match by_members {
            true => format!(
                "there is neither a service nor a container {name}: name its network with --network to publish it all the same"
            ),
            false => format!("there is no service {name}: weft service ls lists them"),
        })),
        several => {
            let names: Vec<_> = several.iter().map(|network| network.name.to_string()).collect();
            Err(Refusal::new(
                RefusalKind::Conflict,
                format!("{name} is in {}: name one with --network", names.join(", ")),
            ))
        }
    }
}

fn is_declared(view: &ServiceView<'_>) -> bool {
    view.definition().is_some()
}

/// Says that a port has an owner.
pub(super) fn taken(port: &weft_balance::HostPort, owner: &str) -> String {
    format!("port {port} belongs to {owner}: take another, or take that one back first")
}
