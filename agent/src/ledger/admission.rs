//! From a request to an endpoint: checks, addresses and ports.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use weft_ipam::Ask;
use weft_model::{
    AddressGrant, Endpoint, EndpointId, Family, MacAddr, Network, NetworkId, SandboxId,
};

use super::{
    GRANT_DEADLINE, NETWORK_DEADLINE, Reply,
    book::{EndpointState, LocalEndpoint},
    gateways,
    keeper::Keeper,
    macvlan,
    survey::Survey,
    waiting::{Errand, Obstacle},
};
use crate::{
    api::types::Attach,
    bulk::{MOST_PORTS, label_bytes, refuse_bulk, too_many_ports},
    chain::Chain,
    definition::DEFAULT_BRIDGE,
    projection::{free_slot, uplink_capacity},
    refusal::{Refusal, RefusalKind, refuse},
};

/// An attachment that is asked for.
pub(super) struct Claim {
    request: Attach,
    sandbox: SandboxId,
    /// What was reserved for it.
    reserved: Vec<EndpointId>,
}

impl Keeper {
    /// Takes a request in; it is met at once or waits for its network or a lender.
    pub(super) fn admit(
        &mut self,
        request: Attach,
        reserved: Vec<EndpointId>,
        reply: Reply<EndpointId>,
    ) {
        match check_request(&request) {
            Ok(sandbox) => {
                let claim = Box::new(Claim { request, sandbox, reserved });
                self.wait_for(Errand::Attach { claim, reply });
            }
            Err(refusal) => drop(reply.send(Err(refusal))),
        }
    }

    pub(super) fn grant_address(
        &mut self,
        id: EndpointId,
        network: NetworkId,
        ask: Ask,
    ) -> Result<IpAddr, Obstacle> {
        let gone = || Refusal {
            field: Some("network"),
            ..Refusal::missing(format!(
                "network {} is not there any more: create it again",
                network.short()
            ))
        };
        let network = self.cluster.network(network).cloned().ok_or_else(gone)?;
        self.check_network(&network)?;
        self.allocate(&network, id, ask).map(|grant| grant.ip)
    }

    /// Writes the endpoint into the book, if everything that it needs is there.
    pub(super) fn grant_endpoint(
        &mut self,
        id: EndpointId,
        claim: &Claim,
        survey: &Survey,
    ) -> Result<(), Obstacle> {
        let request = &claim.request;
        let Some(network) = self.cluster.find_network(&request.network).cloned() else {
            if request.network == DEFAULT_BRIDGE && !self.has_default_bridge() {
                self.create_default_bridge()?;
            }
            return Err(Obstacle::Waits {
                reason: Refusal {
                    field: Some("network"),
                    ..Refusal::missing(format!(
                        "there is no network {}: create it, or see weft network ls",
                        request.network
                    ))
                },
                patience: NETWORK_DEADLINE,
            });
        };
        self.check_network(&network)?;
        self.check_fit(&network, request, &claim.sandbox)?;
        for reservation in &claim.reserved {
            self.release_everywhere(*reservation);
        }
        let addresses = self.addresses(&network, id, request)?;
        let mac = request.mac.unwrap_or_else(|| MacAddr::for_address(network.id, addresses[0].ip));
        self.check_mac(&network, mac)?;
        let ports = self.host_ports_for(&network, &request.ports, survey)?;
        self.take_uplink(&network)?;

        let gateway_priority = gateways::priority(request, &network);
        let default_route = gateways::goes_first(&self.book, &claim.sandbox, gateway_priority);
        if default_route {
            self.displace(&claim.sandbox);
        }
        let endpoint = Endpoint {
            id,
            network: network.id,
            name: request.name.clone(),
            aliases: request.aliases.clone(),
            mac,
            addresses,
            sandbox: claim.sandbox.clone(),
            seq: 0,
            service: request.service.clone(),
            labels: request.labels.clone(),
            default_route: false,
        };
        let local = LocalEndpoint {
            endpoint,
            sandbox: request.sandbox.clone(),
            ifname: request.ifname.clone(),
            state: EndpointState::Attaching,
            default_route,
            gateway_priority,
            ports,
        };
        Arc::make_mut(&mut self.book).endpoints.insert(id, local);
        Ok(())
    }

    pub(super) fn check_network(&self, network: &Network) -> Result<(), Refusal> {
        if network.encrypted
            && let Err(missing) = self.links.encryption.tunnel()
        {
            return Err(Refusal {
                field: Some("network"),
                ..Refusal::new(
                    RefusalKind::Unavailable,
                    format!("network {} is encrypted, but here is {missing}", network.name),
                )
            });
        }
        match self.cluster.conflict(network.id) {
            None => Ok(()),
            Some(other) => Err(Refusal::conflict(
                "network",
                format!(
                    "network {} ({}) stands back before {} ({}), which has the same name or VNI: remove one of them",
                    network.name,
                    network.id.short(),
                    other.name,
                    other.id.short()
                ),
            )),
        }
    }

    /// Checks the request against what this sandbox and this host have already.
    fn check_fit(
        &self,
        network: &Network,
        request: &Attach,
        sandbox: &SandboxId,
    ) -> Result<(), Obstacle> {
        macvlan::check(network, request)?;
        for ip in &request.addresses {
            if network.pool_of(*ip).is_none() {
                let subnets: Vec<_> = network.pools.iter().map(|p| p.subnet.to_string()).collect();
                let message = format!(
                    "{ip} lies outside {} of network {}: give one inside it",
                    subnets.join(", "),
                    network.name
                );
                return Err(Refusal::field("addresses", message).into());
            }
        }
        for local in self.book.endpoints.values() {
            match self.check_beside(local, network, request, sandbox) {
                Ok(()) => {}
                // It is about to be gone.
                Err(reason) if local.state == EndpointState::Detaching => {
                    return Err(Obstacle::Waits { reason, patience: GRANT_DEADLINE });
                }
                Err(refusal) => return Err(Obstacle::Refused(refusal)),
            }
        }
        Ok(())
    }

    /// Checks the request against one endpoint of this host.
    fn check_beside(
        &self,
        local: &LocalEndpoint,
        network: &Network,
        request: &Attach,
        sandbox: &SandboxId,
    ) -> Result<(), Refusal> {
        let other = &local.endpoint;
        let name = self.network_name(other.network);
        if other.network == network.id && other.name == request.name {
            return Err(Refusal::conflict(
                "name",
                format!(
                    "{} is attached to {name} on this host already: detach it, or take another name",
                    other.name
                ),
            ));
        }
        macvlan::check_beside(network, other)?;
        let others = self.book.networks.get(&other.network);
        macvlan::check_mac(network, request, other, others)?;
        if other.sandbox != *sandbox {
            return Ok(());
        }
        if other.network == network.id {
            return Err(Refusal::conflict(
                "sandbox",
                format!("the sandbox is attached to {name} already, as {}", other.name),
            ));
        }
        self.check_overlap(network, other.network)?;
        if request.ifname.is_some() && local.ifname == request.ifname {
            return Err(Refusal::conflict(
                "ifname",
                format!(
                    "the sandbox has an interface of that name already, on {name}: take another"
                ),
            ));
        }
        Ok(())
    }

    /// One sandbox cannot tell apart two networks with overlapping subnets.
    fn check_overlap(&self, network: &Network, other: NetworkId) -> Result<(), Refusal> {
        let Some(other) = self.cluster.network(other) else { return Ok(()) };
        for pool in &network.pools {
            if let Some(same) = other.pools.iter().find(|o| pool.subnet.overlaps(o.subnet.net())) {
                return Err(Refusal::conflict(
                    "network",
                    format!(
                        "{} of {} overlaps {} of {}, to which the sandbox is attached: use networks with different subnets",
                        pool.subnet, network.name, same.subnet, other.name
                    ),
                ));
            }
        }
        Ok(())
    }

    fn check_mac(&self, network: &Network, mac: MacAddr) -> Result<(), Refusal> {
        let here = self.book.endpoints_of(network.id).map(|l| (&l.endpoint, self.context.me));
        let there = self.cluster.endpoints(network.id).map(|p| (p.endpoint, p.node));
        let gateway = MacAddr::for_gateway(network.id);
        if mac == gateway {
            return Err(Refusal::conflict("mac", format!("{mac} is the gateway's: take another")));
        }
        match here.chain(there).find(|(endpoint, _)| endpoint.mac == mac) {
            None => Ok(()),
            Some((endpoint, node)) => Err(Refusal::conflict(
                "mac",
                format!(
                    "{mac} is in use by {} on {}: take another",
                    endpoint.name,
                    self.cluster.node_name(node)
                ),
            )),
        }
    }

    /// One address a family; all or none.
    fn addresses(
        &mut self,
        network: &Network,
        id: EndpointId,
        request: &Attach,
    ) -> Result<Vec<AddressGrant>, Obstacle> {
        let fixed = |family| request.addresses.iter().copied().find(|ip| Family::of(*ip) == family);
        let mut grants = Vec::new();
        for pool in &network.pools {
            let family = pool.subnet.family();
            let ask = fixed(family).map_or(Ask::Any(family), Ask::Fixed);
            grants.push(self.allocate(network, id, ask)?);
        }
        Ok(grants)
    }

    pub(super) fn take_uplink(&mut self, network: &Network) -> Result<(), Refusal> {
        let needs_none = network.internal || !network.driver.has_gateway();
        if needs_none || self.book.uplinks.contains_key(&network.id) {
            return Ok(());
        }
        let pool = self.context.uplink_pool;
        let slot = free_slot(&self.book.uplinks, uplink_capacity(pool)).ok_or_else(|| {
            Refusal::new(
                RefusalKind::Unavailable,
                format!("every pair of uplink_pool {pool} is in use: remove networks, or give a larger pool"),
            )
        })?;
        Arc::make_mut(&mut self.book).uplinks.insert(network.id, slot);
        Ok(())
    }
}

/// Checks what the request says by itself, and finds its sandbox.
fn check_request(request: &Attach) -> Result<SandboxId, Refusal> {
    let mut families = BTreeSet::new();
    if let Some(ip) = request.addresses.iter().find(|ip| !families.insert(Family::of(**ip))) {
        return refuse(
            "addresses",
            format!("{ip} is the second {} address: give one a family", Family::of(*ip)),
        );
    }
    if request.ports.len() > MOST_PORTS {
        return refuse("ports", too_many_ports(request.ports.len()));
    }
    let words = request.aliases.iter().map(|alias| alias.as_str().len());
    refuse_bulk("aliases", words.sum())?;
    refuse_bulk("labels", label_bytes(&request.labels))?;
    if let Some(name) = &request.ifname {
        // The kernel's own rule (net/core/dev.c, dev_valid_name).
        let length = 1..=15;
        let odd = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if !length.contains(&name.len())
            || name == "."
            || name == ".."
            || name.contains(odd)
            || name == "lo"
        {
            return refuse(
                "ifname",
                format!(
                    "{name:?} is no interface name: give 1 to 15 characters without blanks, slashes and colons"
                ),
            );
        }
    }
    request.sandbox.identify().map_err(|error| {
        let why = Chain(&error);
        Refusal::field("sandbox", format!("{why}: give a running process or a namespace's path"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_ports_than_the_limit_are_refused_with_both_numbers() {
        let request = |count: usize| {
            let port = |n: usize| serde_json::json!({"container_port": n, "host_port": n});
            let ports: Vec<_> = (1..=count).map(port).collect();
            let request = serde_json::json!({
                "network": "app", "name": "web", "sandbox": {"path": "/nonexistent/netns"},
                "ports": ports,
            });
            check_request(&serde_json::from_value(request).unwrap()).unwrap_err()
        };
        assert_eq!(request(MOST_PORTS).field, Some("sandbox"));
        let refusal = request(MOST_PORTS + 1);
        assert_eq!(refusal.field, Some("ports"));
        assert!(refusal.message.contains("1025") && refusal.message.contains("1024"), "{refusal}");
    }

    #[test]
    fn what_would_fill_a_record_is_refused_before_the_sandbox_is_looked_at() {
        let request = serde_json::json!({
            "network": "app", "name": "web", "sandbox": {"path": "/nonexistent/netns"},
        });
        let refused = |field: &str, value: serde_json::Value| {
            let mut request = request.clone();
            request[field] = value;
            check_request(&serde_json::from_value(request).unwrap()).unwrap_err()
        };
        let fine = refused("labels", serde_json::json!({"a": "x".repeat(1000)}));
        assert_eq!(fine.field, Some("sandbox"));
        let aliases: Vec<_> = (0..1000).map(|n| format!("alias-{n}")).collect();
        assert_eq!(refused("aliases", serde_json::json!(aliases)).field, Some("aliases"));
        let labels = serde_json::json!({"a": "x".repeat(300_000)});
        assert_eq!(refused("labels", labels).field, Some("labels"));
    }
}
