//! Ports of this host that open and close while their endpoint is attached: an engine says so when it
//! knows which of a container's networks leads out. The kernel has them before the engine hears of it.

use std::{collections::BTreeSet, mem, sync::Arc, time::Duration};

use tokio::time::Instant;
use weft_balance::{Desired, HostPort, Status};
use weft_model::{EndpointId, NetworkId};

use super::{
    Reply,
    book::{EndpointState, LocalEndpoint},
    keeper::Keeper,
    survey::Survey,
    waiting::{Errand, Obstacle},
};
use crate::{
    api::types::{PortRequest, PublishedPort},
    bulk::{MOST_PORTS, too_many_ports},
    projection::host_ports,
    refusal::{Refusal, RefusalKind},
};

/// How long the kernel may take for ports.
const KERNEL_DEADLINE: Duration = Duration::from_secs(5);

/// A change of an endpoint's ports that the kernel is yet to take over.
pub(super) struct PortChange {
    endpoint: EndpointId,
    network: NetworkId,
    reply: Reply<Vec<PublishedPort>>,
    deadline: Instant,
}

/// How far the kernel is with what it shall know of ports.
#[derive(Debug, Eq, PartialEq)]
enum Progress {
    Pending,
    Done,
    /// A process was quicker.
    Taken(HostPort, String),
}

impl Keeper {
    /// Changes the ports of an endpoint of an engine's, and whether its container's default route leads
    /// through it: takes both away where there are no requests.
    pub(super) fn change_ports(
        &mut self,
        endpoint: EndpointId,
        requests: Option<Vec<PortRequest>>,
        reply: Reply<Vec<PublishedPort>>,
    ) {
        match requests {
            None => {
                let network = self.take_ports(endpoint);
                self.await_ports(endpoint, network, reply);
            }
            Some(requests) if requests.len() > MOST_PORTS => {
                let refusal = Refusal::field("ports", too_many_ports(requests.len()));
                let _ = reply.send(Err(refusal));
            }
            Some(requests) => self.wait_for(Errand::Ports { endpoint, requests, reply }),
        }
    }

    /// Answers when the kernel has what the book says of an endpoint's ports; at once where no
    /// `network` is concerned.
    pub(super) fn await_ports(
        &mut self,
        endpoint: EndpointId,
        network: Option<NetworkId>,
        reply: Reply<Vec<PublishedPort>>,
    ) {
        match network {
            None => drop(reply.send(Ok(Vec::new()))),
            Some(network) => {
                let deadline = Instant::now() + KERNEL_DEADLINE;
                self.port_changes.push(PortChange { endpoint, network, reply, deadline });
            }
        }
    }

    /// Gives an endpoint ports and its container's default route, in the book. Returns its network, if
    /// it has ports, or had some.
    pub(super) fn grant_ports(
        &mut self,
        id: EndpointId,
        requests: &[PortRequest],
        survey: &Survey,
    ) -> Result<Option<NetworkId>, Obstacle> {
        let local = self.book.endpoints.get(&id);
        let local = local.filter(|local| local.state == EndpointState::Attached);
        let gone = || {
            let id = id.short();
            Refusal::missing(format!("there is no endpoint {id} on this host: weft ps lists them"))
        };
        let LocalEndpoint { endpoint, ports: before, .. } = local.ok_or_else(gone)?.clone();
        let network = endpoint.network;
        let known = self.cluster.network(network).cloned().ok_or_else(gone)?;
        // Those that it has stand in the way of none.
        if !before.is_empty() {
            self.local_mut(id).ports.clear();
        }
        match self.host_ports_for(&known, requests, survey) {
            Ok(ports) => {
                self.displace(&endpoint.sandbox);
                let without = before.is_empty() && ports.is_empty();
                let local = self.local_mut(id);
                (local.default_route, local.ports) = (true, ports);
                Ok((!without).then_some(network))
            }
            Err(obstacle) => {
                if !before.is_empty() {
                    self.local_mut(id).ports = before;
                }
                Err(obstacle)
            }
        }
    }

    fn take_ports(&mut self, id: EndpointId) -> Option<NetworkId> {
        let local = self.book.endpoints.get(&id)?;
        if !local.default_route && local.ports.is_empty() {
            return None;
        }
        let local = self.local_mut(id);
        local.default_route = false;
        let had = !mem::take(&mut local.ports).is_empty();
        had.then_some(local.endpoint.network)
    }

    /// Answers who waits for the kernel to take ports over. Takes those back that it cannot have;
    /// returns whether there were any.
    pub(super) fn answer_port_changes(&mut self) -> bool {
        if self.port_changes.is_empty() {
            return false;
        }
        let desired = self.links.balance.desired.borrow().clone();
        let status = Arc::clone(&self.links.balance.status.borrow());
        let mut given_up = false;
        for change in mem::take(&mut self.port_changes) {
            let ports = self.book.endpoints.get(&change.endpoint).map(|local| local.ports.clone());
            let ports = ports.unwrap_or_default();
            let progress = desired.as_deref().map_or(Progress::Pending, |desired| {
                progress(change.network, &ports, desired, &status)
            });
            let refusal = match progress {
                Progress::Done => {
                    let _ = change.reply.send(Ok(ports));
                    continue;
                }
                Progress::Pending if change.deadline > Instant::now() => {
                    self.port_changes.push(change);
                    continue;
                }
                Progress::Pending => Refusal::new(
                    RefusalKind::Failed,
                    "the kernel did not take the ports over in time: see weft status",
                ),
                Progress::Taken(port, owner) => Refusal::conflict(
                    "ports",
                    format!(
                        "port {port} of this host is in use by {owner}: stop it, or publish another port"
                    ),
                ),
            };
            if !ports.is_empty() {
                self.local_mut(change.endpoint).ports.clear();
                given_up = true;
            }
            let _ = change.reply.send(Err(refusal));
        }
        given_up
    }
}

/// How far the kernel is with `desired`, as far as `network` and the ports of one of its endpoints go.
fn progress(
    network: NetworkId,
    ports: &[PublishedPort],
    desired: &Desired,
    status: &Status,
) -> Progress {
    let inside = status.networks.get(&network).and_then(|status| status.applied.as_ref());
    let followed = inside == desired.networks.get(&network)
        && status.host.applied.as_ref() == Some(&desired.host);
    if !followed {
        return Progress::Pending;
    }
    let places: BTreeSet<HostPort> = ports
        .iter()
        .flat_map(|port| host_ports(port.host_ip, port.protocol, port.host_port))
        .collect();
    let lost = status.host.taken.iter().find(|(port, _)| places.contains(port));
    lost.map_or(Progress::Done, |(port, owner)| Progress::Taken(*port, owner.clone()))
}

#[cfg(test)]
mod tests {
    use weft_balance::HostPublish;
    use weft_model::Protocol;

    use super::*;
    use crate::fixture::network;

    #[test]
    fn a_port_is_open_when_the_kernel_follows_and_no_process_was_quicker() {
        let app = network(1, "app").id;
        let own = PublishedPort {
            host_ip: None,
            host_port: 8080,
            container_port: 80,
            protocol: Protocol::Tcp,
        };
        let at = host_ports(None, Protocol::Tcp, 8080).next().unwrap();
        let to = "169.254.192.2:20000".parse().unwrap();
        let host = HostPublish { ports: [(at, to)].into(), ..HostPublish::default() };
        let desired = Desired { host: Arc::new(host), ..Desired::default() };
        let mut status = Status::default();
        assert_eq!(progress(app, &[own], &desired, &status), Progress::Pending);
        status.host.applied = Some(Arc::default());
        assert_eq!(progress(app, &[own], &desired, &status), Progress::Pending);
        status.host.applied = Some(Arc::clone(&desired.host));
        assert_eq!(progress(app, &[own], &desired, &status), Progress::Done);
        status.host.taken.insert(at, "nginx".into());
        let taken = Progress::Taken(at, "nginx".into());
        assert_eq!(progress(app, &[own], &desired, &status), taken);
        // Another's misfortune.
        assert_eq!(progress(app, &[], &desired, &status), Progress::Done);
    }
}
