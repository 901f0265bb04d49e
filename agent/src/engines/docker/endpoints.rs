//! The calls of Docker's network plugin that are about endpoints.

use std::{net::IpAddr, path::Path};

use tokio::time;
use weft_model::{EndpointId, Family, Label, MacAddr, Network};

use super::{
    client::NetworkInspect,
    driver::{Driver, QUICK},
    names, ports,
    protocol::{
        CreateEndpoint, EndpointCreated, EndpointNamed, EngineId, InterfaceGiven, InterfaceName,
        Join, Joined, ProgramExternalConnectivity,
    },
    registry::{DockerEndpoint, DockerNetwork, JoinedAs, Known},
};
use crate::{
    api::types::{Attach, PublishedPort, Sandbox},
    chain::Chain,
    clock,
    refusal::{Refusal, RefusalKind, refuse},
};

impl Driver {
    /// Takes up an endpoint, of which Docker has asked for the addresses before.
    pub(super) async fn create_endpoint(
        &self,
        asked: CreateEndpoint,
    ) -> Result<EndpointCreated, Refusal> {
        let network = self.bind(&asked.network_id).await?;
        let addresses: Vec<IpAddr> = [asked.interface.address, asked.interface.address_v6]
            .into_iter()
            .flatten()
            .map(|net| net.addr())
            .collect();
        check_addresses(&network, &addresses)?;
        let given = asked.interface.mac_address;
        let mac = given.unwrap_or_else(|| MacAddr::for_address(network.id, addresses[0]));
        let endpoint = DockerEndpoint {
            network: asked.network_id,
            addresses,
            mac,
            joined: None,
            since: clock::unix_seconds(),
        };
        self.change(|known| known.endpoints.entry(asked.endpoint_id).or_insert(endpoint).mac)
            .await?;
        let mac_address = given.is_none().then_some(mac);
        Ok(EndpointCreated { interface: InterfaceGiven { mac_address } })
    }

    /// Makes the endpoint's interface, which Docker moves into the sandbox, and publishes its name.
    pub(super) async fn join(&self, asked: Join) -> Result<Joined, Refusal> {
        let id = &asked.endpoint_id;
        let docker = self.docker_network(&asked.network_id).await?;
        let network = self.bind(&asked.network_id).await?;
        let endpoint = self.registry.read(|known| known.endpoints.get(id).cloned()).await;
        let endpoint = endpoint.ok_or_else(|| {
            Refusal::missing(format!("weft does not know endpoint {id}: start the container again"))
        })?;
        let sandbox = Path::new(&asked.sandbox_key);
        if !sandbox.is_absolute() {
            return refuse(
                "sandbox",
                format!("{:?} is no sandbox's path: give an absolute one", asked.sandbox_key),
            );
        }
        let before = endpoint.joined.as_ref();
        let attached = match before.filter(|before| before.sandbox == sandbox) {
            Some(before) if self.ifname(before.endpoint).is_some() => before.endpoint,
            _ => {
                self.leave_sandbox(id).await?;
                self.attach(&asked, &docker, &network, &endpoint).await?
            }
        };
        let src_name = self.ifname(attached).ok_or_else(|| {
            Refusal::missing(format!(
                "endpoint {id} has ended in the meantime: start the container again"
            ))
        })?;
        let gateway = |family| {
            let pool = network.pool(family).filter(|_| docker.wanted.gateway);
            pool.map(|pool| pool.gateway.to_string())
        };
        Ok(Joined {
            interface_name: InterfaceName { src_name, dst_prefix: "eth".into() },
            gateway: gateway(Family::V4),
            gateway_v6: gateway(Family::V6),
        })
    }

    /// Withdraws an endpoint's names and takes its interface away. Succeeds if it has gone already.
    pub(super) async fn leave(&self, asked: EndpointNamed) -> Result<(), Refusal> {
        self.leave_sandbox(&asked.endpoint_id).await
    }

    /// Lets go of an endpoint. Succeeds if it has gone already.
    pub(super) async fn delete_endpoint(&self, asked: EndpointNamed) -> Result<(), Refusal> {
        self.forget_endpoint(&asked.endpoint_id).await
    }

    /// Opens the ports that Docker was asked to publish for a container of which the default route
    /// leads through this endpoint.
    pub(super) async fn program_ports(
        &self,
        asked: ProgramExternalConnectivity,
    ) -> Result<(), Refusal> {
        let docker = self.docker_network(&asked.network_id).await?;
        if !docker.wanted.gateway {
            // Docker publishes them itself, on its own bridge.
            return Ok(());
        }
        let requests = ports::requests(&asked.options)?;
        let id = &asked.endpoint_id;
        let endpoint = self.joined(id).await.ok_or_else(|| {
            Refusal::missing(format!("endpoint {id} is in no sandbox: start the container again"))
        })?;
        let opened = self.ledger.open_ports(endpoint, requests).await?;
        for PublishedPort { host_ip, host_port, container_port, protocol } in opened {
            tracing::info!(%endpoint, ?host_ip, host_port, container_port, %protocol, "opened a port for Docker");
        }
        Ok(())
    }

    /// Closes them: the container ends, or its default route leads elsewhere now. Succeeds if that
    /// was done already.
    pub(super) async fn revoke_ports(&self, asked: EndpointNamed) -> Result<(), Refusal> {
        match self.joined(&asked.endpoint_id).await {
            Some(endpoint) => self.ledger.close_ports(endpoint).await,
            None => Ok(()),
        }
    }

    /// What an endpoint of Docker's is in the book, while it is in a sandbox.
    async fn joined(&self, id: &EngineId) -> Option<EndpointId> {
        let joined = |known: &Known| known.endpoints.get(id)?.joined.as_ref().map(|j| j.endpoint);
        self.registry.read(joined).await
    }

    pub(super) async fn forget_endpoint(&self, id: &EngineId) -> Result<(), Refusal> {
        self.leave_sandbox(id).await?;
        let removed = self
            .change(|known| {
                let endpoint = known.endpoints.remove(id)?;
                Some((known.network_of(&endpoint)?, endpoint.addresses))
            })
            .await?;
        // Docker gives the addresses back by itself; but not if it has forgotten the endpoint.
        if let Some((network, addresses)) = removed {
            for ip in addresses {
                self.release_reservation(network, ip).await?;
            }
        }
        Ok(())
    }

    /// Detaches an endpoint, and waits until that is done: Docker may ask for its address next.
    async fn leave_sandbox(&self, id: &EngineId) -> Result<(), Refusal> {
        let joined = self
            .registry
            .read(|known| known.endpoints.get(id).and_then(|endpoint| endpoint.joined.clone()))
            .await;
        let Some(joined) = joined else { return Ok(()) };
        self.detach(joined.endpoint).await?;
        self.change(|known| {
            if let Some(endpoint) = known.endpoints.get_mut(id) {
                endpoint.joined = None;
            }
        })
        .await
    }

    pub(super) async fn detach(&self, endpoint: EndpointId) -> Result<(), Refusal> {
        match self.ledger.detach(endpoint.to_string(), None).await {
            Err(refusal) if refusal.kind == RefusalKind::Missing => Ok(()),
            other => other,
        }
    }

    async fn attach(
        &self,
        asked: &Join,
        docker: &DockerNetwork,
        network: &Network,
        endpoint: &DockerEndpoint,
    ) -> Result<EndpointId, Refusal> {
        let id = &asked.endpoint_id;
        let listing = match time::timeout(QUICK, self.client.network(&asked.network_id)).await {
            Ok(Ok(listing)) => Some(listing),
            Ok(Err(error)) => {
                tracing::debug!(endpoint = %id, error = %Chain(&error), "the container's name comes later");
                None
            }
            Err(_) => None,
        };
        let members = listing.iter().flat_map(|listing| listing.containers.values());
        let name = members.clone().find(|member| member.endpoint_id == *id);
        let description = names::at_join(name.map(|member| member.name.as_str()), id);
        if let Some(listing) = &listing {
            self.make_way(&asked.network_id, listing, &description.name).await?;
        }
        let request = Attach {
            network: network.id.to_string(),
            name: description.name,
            sandbox: Sandbox::Engine(asked.sandbox_key.clone().into()),
            aliases: description.aliases,
            addresses: endpoint.addresses.clone(),
            mac: Some(endpoint.mac),
            ifname: None,
            default_route: docker.wanted.gateway,
            gateway_priority: 0,
            service: description.service,
            labels: description.labels,
            ports: Vec::new(),
        };
        let reserved = endpoint.addresses.iter().filter_map(|ip| self.reservation(network.id, *ip));
        let attached = self.ledger.attach_reserved(request, reserved.collect()).await?;
        for ip in &endpoint.addresses {
            self.take_reservation(network.id, *ip);
        }
        let joined = JoinedAs { sandbox: asked.sandbox_key.clone().into(), endpoint: attached };
        let since = clock::unix_seconds();
        let noted = self
            .change(|known| {
                let endpoint = known.endpoints.get_mut(id)?;
                (endpoint.joined, endpoint.since) = (Some(joined), since);
                Some(())
            })
            .await;
        match noted {
            Ok(Some(())) => Ok(attached),
            // Deleted meanwhile, or not to be remembered: nobody would take it away.
            Ok(None) => {
                self.detach(attached).await?;
                Err(Refusal::missing(format!("endpoint {id} was deleted in the meantime")))
            }
            Err(refusal) => {
                self.detach(attached).await?;
                Err(refusal)
            }
        }
    }

    /// Takes away an endpoint of the same name that Docker no longer has: its daemon was killed.
    async fn make_way(
        &self,
        network: &EngineId,
        listing: &NetworkInspect,
        name: &Label,
    ) -> Result<(), Refusal> {
        let book = &self.snapshot().book;
        let stale: Vec<EngineId> = self
            .registry
            .read(|known| {
                let joined = known.endpoints_of(network).filter(|(id, endpoint)| {
                    let joined = endpoint.joined.as_ref();
                    let local = joined.and_then(|joined| book.endpoints.get(&joined.endpoint));
                    local.is_some_and(|local| local.endpoint.name == *name) && !listing.has(id)
                });
                joined.map(|(id, _)| id.clone()).collect()
            })
            .await;
        for id in &stale {
            tracing::info!(endpoint = %id, %name, "took away an endpoint that Docker has lost");
            self.forget_endpoint(id).await?;
        }
        Ok(())
    }

    /// What the interface of an attached endpoint is called in the host's namespace.
    fn ifname(&self, endpoint: EndpointId) -> Option<String> {
        self.snapshot().book.endpoints.get(&endpoint)?.ifname.clone()
    }
}

impl NetworkInspect {
    /// Whether Docker has the endpoint.
    pub(super) fn has(&self, id: &EngineId) -> bool {
        self.containers.values().any(|member| member.endpoint_id == *id)
    }
}

/// An endpoint has one address of each of its network's families.
fn check_addresses(network: &Network, addresses: &[IpAddr]) -> Result<(), Refusal> {
    for pool in &network.pools {
        let family = pool.subnet.family();
        match addresses.iter().find(|ip| Family::of(**ip) == family) {
            Some(ip) if pool.subnet.contains(*ip) => {}
            Some(ip) => {
                return refuse(
                    "addresses",
                    format!("{ip} lies outside {} of network {}", pool.subnet, network.name),
                );
            }
            None => {
                return refuse(
                    "addresses",
                    format!(
                        "the endpoint has no {family} address, but network {} has",
                        network.name
                    ),
                );
            }
        }
    }
    match addresses.len() > network.pools.len() {
        true => {
            refuse("addresses", format!("network {} has one family of addresses", network.name))
        }
        false => Ok(()),
    }
}
