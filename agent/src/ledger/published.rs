//! Ports of this host for one endpoint.

use std::ops::RangeInclusive;

use weft_model::{Family, Network};

use super::{keeper::Keeper, services::taken};
use crate::{
    api::types::{PortRequest, PublishedPort},
    projection::{host_ports, overlap},
    refusal::{Refusal, RefusalKind, refuse},
};

/// Where ports come from that nobody asked for by number: Linux's own (net.ipv4.ip_local_port_range).
const EPHEMERAL: RangeInclusive<u16> = 32_768..=60_999;

impl Keeper {
    /// The ports of the host for what an endpoint asks; all or none.
    pub(super) fn host_ports_for(
        &self,
        network: &Network,
        requests: &[PortRequest],
    ) -> Result<Vec<PublishedPort>, Refusal> {
        let mut ports = Vec::new();
        for request in requests {
            check(network, request)?;
            let port = self.host_port_for(request, &ports)?;
            ports.push(port);
        }
        Ok(ports)
    }

    fn host_port_for(
        &self,
        request: &PortRequest,
        others: &[PublishedPort],
    ) -> Result<PublishedPort, Refusal> {
        let candidates = match request.host_port {
            Some(first) => first..=request.host_port_last.unwrap_or(first),
            None => EPHEMERAL,
        };
        let mut obstacle = None;
        for host_port in candidates.clone() {
            let PortRequest { host_ip, container_port, protocol, .. } = *request;
            let mut places = host_ports(host_ip, protocol, host_port);
            let in_the_way = places.find_map(|place| {
                let own = others
                    .iter()
                    .flat_map(|other| host_ports(other.host_ip, other.protocol, other.host_port));
                let owner = match own.into_iter().any(|own| overlap(&own, &place)) {
                    true => Some("the same container".to_owned()),
                    false => self.owner_of_port(&place, None),
                };
                let process = || self.check_processes(&place, "ports").err();
                owner
                    .map(|owner| taken(&place, &owner))
                    .or_else(|| process().map(|refusal| refusal.message))
            });
            match in_the_way {
                None => return Ok(PublishedPort { host_ip, host_port, container_port, protocol }),
                Some(why) => obstacle = Some(why),
            }
        }
        let (first, last) = (candidates.start(), candidates.end());
        let why = obstacle.unwrap_or_else(|| format!("{first}-{last} has no port"));
        Err(Refusal {
            field: Some("ports"),
            ..Refusal::new(
                RefusalKind::Conflict,
                match first == last {
                    true => why,
                    false => format!("no port from {first} to {last} is free: {why}"),
                },
            )
        })
    }
}

fn check(network: &Network, request: &PortRequest) -> Result<(), Refusal> {
    let name = &network.name;
    if network.internal {
        return refuse(
            "ports",
            format!("network {name} is internal: nothing comes in from outside"),
        );
    }
    if !network.driver.has_gateway() {
        return refuse(
            "ports",
            format!(
                "network {name} has driver {}: its containers are on the host's link themselves",
                network.driver
            ),
        );
    }
    if request.container_port == 0 || request.host_port == Some(0) {
        return refuse("ports", "port 0 is none: give one from 1 to 65535");
    }
    let family = request.host_ip.map(Family::of);
    match family.filter(|family| network.pool(*family).is_none()) {
        Some(family) => refuse(
            "ports",
            format!(
                "network {name} has no {family} subnet: publish at an address of the other family"
            ),
        ),
        None => Ok(()),
    }
}
