//! The host's own addresses on networks.
//!
//! The host's namespace is always there. So an endpoint of the host's that has gone from the kernel,
//! be it by a reboot, is made again, where a container's would be given up.

use std::net::IpAddr;

use tokio::time::{Duration, Instant};
use weft_model::{EndpointId, Labels, NetworkId};

use super::{
    Reply,
    book::{EndpointState, LocalEndpoint},
    keeper::Keeper,
    ports::{KernelWork, Release},
};
use crate::{
    api::types::{Attach, Sandbox},
    refusal::Refusal,
};

/// How long the host rests after it could not be put back on its networks.
pub(super) const REST: Duration = Duration::from_secs(10);

impl Keeper {
    /// Puts the host on a network; nothing to do if it is.
    pub(super) fn expose(&mut self, network: String, ips: Vec<IpAddr>, reply: Reply<EndpointId>) {
        let found = self.cluster.find_network(&network);
        let present = found.and_then(|found| self.exposure(found.id));
        let present = present.filter(|local| local.state != EndpointState::Detaching);
        let Some(local) = present else {
            let name = self.links.node.borrow().name.clone();
            let request = Attach {
                network,
                name,
                sandbox: Sandbox::Host,
                aliases: Vec::new(),
                addresses: ips,
                mac: None,
                ifname: None,
                default_route: false,
                gateway_priority: 0,
                service: None,
                ports: Vec::new(),
                labels: Labels::new(),
            };
            return self.admit(request, Vec::new(), reply);
        };
        let (id, state) = (local.endpoint.id, local.state);
        let own: Vec<_> = local.endpoint.ips().collect();
        if let Some(other) = ips.into_iter().find(|ip| !own.contains(ip)) {
            let own: Vec<_> = own.iter().map(ToString::to_string).collect();
            let message = format!(
                "this host is on {network} as {} already, not as {other}: weft hide {network} first",
                own.join(", ")
            );
            let _ = reply.send(Err(Refusal::conflict("addresses", message)));
        } else if state == EndpointState::Attached {
            let _ = reply.send(Ok(id));
        } else {
            self.replies.entry(id).or_default().push(Release::Attach(reply));
        }
    }

    /// Takes the host off a network; nothing to do if it is not on it.
    pub(super) fn hide(&mut self, network: &str, reply: Reply<()>) {
        let Some(found) = self.cluster.find_network(network) else {
            let message = format!("there is no network {network}: weft network ls lists them");
            return drop(reply.send(Err(Refusal::missing(message))));
        };
        match self.exposure(found.id).map(|local| local.endpoint.id) {
            Some(id) => self.begin_detach(id, Some(reply)),
            None => drop(reply.send(Ok(()))),
        }
    }

    fn exposure(&self, network: NetworkId) -> Option<&LocalEndpoint> {
        self.book.endpoints_of(network).find(|local| local.sandbox == Sandbox::Host)
    }

    /// Makes an endpoint of the host's again that has gone.
    pub(super) fn expose_again(&mut self, id: EndpointId) {
        self.local_mut(id).state = EndpointState::Attaching;
        self.starts.push(KernelWork::Attach(id));
    }

    /// Puts the host back on its networks where that is not under way. What has failed is left to
    /// rest first.
    pub(super) fn retry_exposing(&mut self) {
        let waiting = self.book.endpoints.values().filter(|local| {
            local.sandbox == Sandbox::Host
                && local.state == EndpointState::Attaching
                && !self.in_flight.contains(&local.endpoint.id)
                && self.replies.get(&local.endpoint.id).is_none_or(Vec::is_empty)
        });
        let waiting: Vec<_> = waiting.map(|local| local.endpoint.id).collect();
        if waiting.is_empty() || self.exposed.is_some_and(|at| at.elapsed() < REST) {
            return;
        }
        self.exposed = Some(Instant::now());
        self.starts.extend(waiting.into_iter().map(KernelWork::Attach));
    }

    /// Whether an endpoint that could not be made is to be tried again rather than given up.
    pub(super) fn is_to_be_exposed(&self, id: EndpointId) -> bool {
        let local = self.book.endpoints.get(&id);
        let wanted = local.is_some_and(|local| {
            local.sandbox == Sandbox::Host && local.state == EndpointState::Attaching
        });
        wanted && !self.replies.contains_key(&id) && !self.doomed.contains(&id)
    }
}
