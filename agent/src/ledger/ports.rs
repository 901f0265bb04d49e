//! Endpoints between book and kernel: what is started, what has finished, what is taken back.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use weft_balance::{HostPort, Taken};
use weft_model::{EndpointId, Family, InterfaceName, NetworkId};
use weft_vxlan::{AttachError, AttachSpec, Attached, DataPlane, Prefix};

use super::{
    Description, Reply,
    book::{EndpointState, LocalEndpoint},
    keeper::Keeper,
    waiting::Answer,
};
use crate::{
    api::types::{CreateNetwork, Sandbox},
    chain::Chain,
    projection::gateway_ips,
    refusal::{Refusal, RefusalKind},
};

/// Kernel work that the book already speaks of.
pub(super) enum KernelWork {
    Attach(EndpointId),
    Detach(EndpointId),
}

impl KernelWork {
    /// Whether an endpoint in `state` still needs the work: it may have been withdrawn between
    /// the request and its start.
    fn is_due(&self, state: EndpointState) -> bool {
        match self {
            Self::Attach(_) => state == EndpointState::Attaching,
            Self::Detach(_) => state == EndpointState::Detaching,
        }
    }
}

/// Kernel work that has ended.
pub(super) enum Finished {
    Attached {
        endpoint: EndpointId,
        outcome: Result<Attached, Refusal>,
    },
    Detached {
        endpoint: EndpointId,
        outcome: Result<(), Refusal>,
    },
    /// An interface was tried out for a network to come.
    Parent {
        parent: InterfaceName,
        request: CreateNetwork,
        outcome: Result<Vec<IpAddr>, Refusal>,
        reply: Reply<NetworkId>,
    },
    /// Ports of this host were looked at for a request that waits.
    Surveyed {
        request: EndpointId,
        ports: BTreeSet<HostPort>,
        taken: BTreeMap<HostPort, Taken>,
    },
}

/// Connects a sandbox. One that has a default route already keeps it.
async fn attach(plane: &DataPlane, mut spec: AttachSpec) -> Result<Attached, Refusal> {
    loop {
        match plane.attach(spec.clone()).await {
            Err(AttachError::DefaultRouteTaken { gateway, .. })
                if spec.gateways.contains(&gateway) =>
            {
                spec.gateways.retain(|ip| *ip != gateway);
            }
            outcome => return outcome.map_err(|error| refusal_of(&error)),
        }
    }
}

fn refusal_of(error: &AttachError) -> Refusal {
    let message = Chain(error).to_string();
    match error {
        AttachError::InvalidIfname { .. } => Refusal::field("ifname", message),
        AttachError::IfnameTaken { .. } => Refusal::conflict("ifname", message),
        AttachError::Sandbox { .. }
        | AttachError::HostSandbox { .. }
        | AttachError::Unmovable { .. } => Refusal::field("sandbox", message),
        AttachError::MacTaken { .. } => Refusal::conflict("mac", message),
        AttachError::Parent(_) | AttachError::RouteTaken { .. } => {
            Refusal::conflict("network", message)
        }
        AttachError::DefaultRouteTaken { .. }
        | AttachError::UnknownNetwork { .. }
        | AttachError::NotReady { .. }
        | AttachError::Kernel { .. }
        | AttachError::Stopped => Refusal::new(RefusalKind::Failed, message),
    }
}

/// Who waits for an endpoint's kernel work.
pub(super) enum Release {
    Attach(Reply<EndpointId>),
    Detach(Reply<()>),
}

impl Release {
    /// Whether nobody waits any more.
    fn is_closed(&self) -> bool {
        match self {
            Self::Attach(reply) => reply.is_closed(),
            Self::Detach(reply) => reply.is_closed(),
        }
    }
}

fn withdrawn() -> Refusal {
    Refusal::new(
        RefusalKind::Conflict,
        "the network was removed, or the endpoint detached, in the meantime",
    )
}

impl Keeper {
    /// Takes up the endpoints of the last run: answers their names again, and goes on with what
    /// was not finished.
    pub(super) fn adopt(&mut self) {
        self.retry_detaching();
        self.retry_exposing();
        for network in self.book.active() {
            self.listen(network);
        }
    }

    pub(super) fn sandbox_gone(&mut self, endpoint: EndpointId) {
        if let Some(local) = self.book.endpoints.get(&endpoint)
            && local.state != EndpointState::Detaching
        {
            let name = &local.endpoint.name;
            if local.sandbox == Sandbox::Host {
                tracing::warn!(%name, %endpoint, "the host's interface has gone; making it again");
                self.expose_again(endpoint);
            } else {
                tracing::info!(%name, %endpoint, "the sandbox has ended");
                self.begin_detach(endpoint, None);
            }
        }
    }

    /// Compares the book with the kernel, where single notices may have been missed.
    pub(super) async fn look_for_lost(&mut self) {
        let present = match self.links.plane.present_ports().await {
            Ok(present) => present,
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "cannot list the ports");
                return;
            }
        };
        let there = |network, id| present.get(network).is_some_and(|ports| ports.contains(id));
        let lost: Vec<EndpointId> = self
            .book
            .endpoints
            .iter()
            .filter(|(id, local)| {
                local.state == EndpointState::Attached && !there(&local.endpoint.network, id)
            })
            .map(|(id, _)| *id)
            .collect();
        for endpoint in lost {
            self.sandbox_gone(endpoint);
        }
    }

    pub(super) fn detach_named(&mut self, text: &str, network: Option<&str>, reply: Reply<()>) {
        match self.find_local(text, network) {
            Ok(endpoint) => self.begin_detach(endpoint, Some(reply)),
            Err(refusal) => {
                let _ = reply.send(Err(refusal));
            }
        }
    }

    /// The endpoints of this host of a name or id; those of one network, if one is given.
    pub(super) fn find_all_local(
        &self,
        text: &str,
        network: Option<&str>,
    ) -> Result<BTreeSet<EndpointId>, Refusal> {
        let wanted = match network {
            None => None,
            Some(name) => Some(self.cluster.find_network(name).map(|n| n.id).ok_or_else(|| {
                Refusal::missing(format!("there is no network {name}: weft network ls lists them"))
            })?),
        };
        let name = text.to_ascii_lowercase();
        let found: BTreeSet<EndpointId> = self
            .book
            .endpoints
            .values()
            .filter(|local| wanted.is_none_or(|network| network == local.endpoint.network))
            .filter(|local| {
                let id = local.endpoint.id.to_string();
                local.endpoint.name.as_str() == name || (name.len() >= 8 && id.starts_with(&name))
            })
            .map(|local| local.endpoint.id)
            .collect();
        match found.is_empty() {
            true => Err(self.not_here(text, wanted)),
            false => Ok(found),
        }
    }

    fn find_local(&self, text: &str, network: Option<&str>) -> Result<EndpointId, Refusal> {
        let found: Vec<_> = self.find_all_local(text, network)?.into_iter().collect();
        match found.as_slice() {
            [one] => Ok(*one),
            several => {
                let several = several.iter().map(|id| self.book.endpoints[id].endpoint.network);
                let networks = several.map(|network| self.network_name(network));
                Err(Refusal::new(
                    RefusalKind::Conflict,
                    format!(
                        "{text} is on {}: name one with --network",
                        networks.collect::<Vec<_>>().join(", ")
                    ),
                ))
            }
        }
    }

    /// Says that an endpoint is not here, and where it is if that is known.
    fn not_here(&self, text: &str, wanted: Option<NetworkId>) -> Refusal {
        let elsewhere = self
            .cluster
            .networks()
            .filter(|network| wanted.is_none_or(|id| id == network.id))
            .flat_map(|network| self.cluster.endpoints(network.id))
            .find(|placed| placed.endpoint.name.as_str() == text);
        Refusal::missing(match elsewhere {
            Some(placed) => format!(
                "{text} is attached on {}, not here: detach it there",
                self.cluster.node_name(placed.node)
            ),
            None => format!("there is no endpoint {text} on this host: weft ps lists them"),
        })
    }

    /// Gives an endpoint other names.
    pub(super) fn describe(
        &mut self,
        id: EndpointId,
        description: Description,
    ) -> Result<(), Refusal> {
        description.check()?;
        let gone = || {
            let id = id.short();
            Refusal::missing(format!("there is no endpoint {id} on this host: weft ps lists them"))
        };
        let network = self.book.endpoints.get(&id).ok_or_else(gone)?.endpoint.network;
        let taken = self
            .book
            .endpoints_of(network)
            .any(|other| other.endpoint.id != id && other.endpoint.name == description.name);
        if taken {
            return Err(Refusal::conflict(
                "name",
                format!(
                    "another endpoint of this host is called {} in {} already: detach it, or take another name",
                    description.name,
                    self.network_name(network)
                ),
            ));
        }
        let endpoint = &mut self.local_mut(id).endpoint;
        let Description { name, aliases, service, labels } = description;
        endpoint.name = name;
        endpoint.aliases = aliases;
        endpoint.service = service;
        endpoint.labels = labels;
        Ok(())
    }

    pub(super) fn network_name(&self, id: NetworkId) -> String {
        self.cluster.network(id).map_or_else(|| id.short(), |network| network.name.to_string())
    }

    /// Withdraws an endpoint; its port and then its address follow.
    pub(super) fn begin_detach(&mut self, id: EndpointId, reply: Option<Reply<()>>) {
        let Some(local) = self.book.endpoints.get(&id) else { return };
        if let Some(reply) = reply {
            self.replies.entry(id).or_default().push(Release::Detach(reply));
        }
        match local.state {
            EndpointState::Detaching => {}
            // What is being attached is taken back when that has ended.
            EndpointState::Attaching if self.in_flight.contains(&id) => {
                self.doomed.insert(id);
            }
            EndpointState::Attaching | EndpointState::Attached => {
                self.local_mut(id).state = EndpointState::Detaching;
                self.starts.push(KernelWork::Detach(id));
                self.answer_attach(id, Err(withdrawn()));
            }
        }
    }

    /// Starts detaching again where it failed.
    pub(super) fn retry_detaching(&mut self) {
        let stuck = self.book.endpoints.values().filter(|local| {
            local.state == EndpointState::Detaching && !self.in_flight.contains(&local.endpoint.id)
        });
        let stuck: Vec<_> = stuck.map(|local| KernelWork::Detach(local.endpoint.id)).collect();
        self.starts.extend(stuck);
    }

    /// Starts what the book speaks of, now that it is on disk.
    pub(super) fn start_kernel_work(&mut self) {
        for start in std::mem::take(&mut self.starts) {
            let (KernelWork::Attach(id) | KernelWork::Detach(id)) = start;
            let Some(local) = self.book.endpoints.get(&id) else { continue };
            if !start.is_due(local.state) || !self.in_flight.insert(id) {
                continue;
            }
            let network = local.endpoint.network;
            let (plane, finished) = (self.links.plane.clone(), self.finished.clone());
            match start {
                KernelWork::Attach(_) => {
                    let spec = self.attach_spec(local);
                    let way_out = self.way_out(local);
                    let listen = self.listen_on(network);
                    let inside = self.listen_inside(local);
                    self.links.tracker.spawn(async move {
                        let attached = attach(&plane, spec).await;
                        if let (Ok(attached), Some(way_out)) = (&attached, way_out) {
                            way_out.take(attached.ifname.clone()).await;
                        }
                        // Names are answered before the caller hears of success.
                        let outcome = match attached {
                            Ok(attached) => {
                                inside.await;
                                listen.await.map(|()| attached)
                            }
                            Err(refusal) => Err(refusal),
                        };
                        let _ = finished.send(Finished::Attached { endpoint: id, outcome }).await;
                    });
                }
                KernelWork::Detach(_) => {
                    self.links.tracker.spawn(async move {
                        let outcome = plane.detach(network, id).await.map_err(|error| {
                            Refusal::new(RefusalKind::Failed, Chain(&error).to_string())
                        });
                        let _ = finished.send(Finished::Detached { endpoint: id, outcome }).await;
                    });
                }
            }
        }
    }

    pub(super) fn finish(&mut self, finished: Finished) {
        match finished {
            Finished::Attached { endpoint, outcome } => self.finish_attach(endpoint, outcome),
            Finished::Detached { endpoint, outcome } => self.finish_detach(endpoint, outcome),
            Finished::Parent { parent, request, outcome, reply } => {
                self.finish_parent(parent, request, outcome, reply);
            }
            Finished::Surveyed { request, ports, taken } => {
                self.finish_survey(request, ports, &taken);
            }
        }
    }

    fn finish_attach(&mut self, id: EndpointId, outcome: Result<Attached, Refusal>) {
        self.in_flight.remove(&id);
        let doomed = self.doomed.remove(&id);
        match outcome {
            Ok(attached) => {
                let local = self.local_mut(id);
                local.ifname = Some(attached.ifname);
                local.state = EndpointState::Attached;
                tracing::info!(name = %local.endpoint.name, endpoint = %id, "attached");
                // Whoever asked and went away does not know that there is something to detach.
                if doomed || self.is_abandoned(id) {
                    self.begin_detach(id, None);
                } else {
                    self.answer_attach(id, Ok(id));
                }
            }
            Err(refusal) if self.is_to_be_exposed(id) => {
                tracing::warn!(endpoint = %id, error = %refusal, "the host is not on its network; will try again");
            }
            Err(refusal) => {
                self.answer_attach(id, Err(refusal));
                self.begin_detach(id, None);
            }
        }
    }

    fn finish_detach(&mut self, id: EndpointId, outcome: Result<(), Refusal>) {
        self.in_flight.remove(&id);
        let answer = match outcome {
            Ok(()) => {
                if let Some(local) = Arc::make_mut(&mut self.book).endpoints.remove(&id) {
                    let endpoint = &local.endpoint;
                    tracing::info!(name = %endpoint.name, endpoint = %id, "detached");
                    self.release(endpoint.network, id);
                    self.hand_on(&local.endpoint.sandbox);
                }
                Ok(())
            }
            Err(refusal) => {
                tracing::warn!(endpoint = %id, error = %refusal, "cannot detach; will try again");
                Err(refusal)
            }
        };
        for reply in self.replies.remove(&id).unwrap_or_default() {
            if let Release::Detach(reply) = reply {
                let _ = reply.send(answer.clone());
            }
        }
    }

    fn is_abandoned(&self, id: EndpointId) -> bool {
        self.replies.get(&id).is_some_and(|replies| replies.iter().all(Release::is_closed))
    }

    /// Answers who asked for the attachment; who waits for its end goes on waiting.
    fn answer_attach(&mut self, id: EndpointId, answer: Result<EndpointId, Refusal>) {
        let replies = self.replies.remove(&id).unwrap_or_default();
        for reply in replies {
            match reply {
                // Sent after the others were told: what is answered is true everywhere.
                Release::Attach(reply) => {
                    self.answers.push(Answer::Attach(reply, answer.clone()));
                }
                detach @ Release::Detach(_) => self.replies.entry(id).or_default().push(detach),
            }
        }
    }

    fn attach_spec(&self, local: &LocalEndpoint) -> AttachSpec {
        let endpoint = &local.endpoint;
        let network = self.cluster.network(endpoint.network).map(AsRef::as_ref);
        let network = network.or_else(|| self.book.networks.get(&endpoint.network));
        let prefix = |ip| {
            let whole = if Family::of(ip) == Family::V4 { 32 } else { 128 };
            let pool = network.and_then(|network| network.pool_of(ip));
            Prefix { ip, len: pool.map_or(whole, |pool| pool.subnet.prefix_len()) }
        };
        AttachSpec {
            network: endpoint.network,
            endpoint: endpoint.id,
            sandbox: match &local.sandbox {
                Sandbox::Pid(pid) => weft_vxlan::Sandbox::Pid(*pid),
                Sandbox::Path(path) => weft_vxlan::Sandbox::Path(path.clone()),
                Sandbox::Engine(_) => weft_vxlan::Sandbox::Engine,
                Sandbox::Host => weft_vxlan::Sandbox::Host,
            },
            ifname: local.ifname.clone(),
            mac: endpoint.mac,
            addresses: endpoint.ips().map(prefix).collect(),
            gateways: match network {
                Some(network) if local.default_route => gateway_ips(network),
                _ => Vec::new(),
            },
            mtu: None,
        }
    }

    pub(super) fn local_mut(&mut self, id: EndpointId) -> &mut LocalEndpoint {
        let book = Arc::make_mut(&mut self.book);
        book.endpoints.get_mut(&id).expect("an endpoint stays in the book until it is detached")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_withdrawn_before_its_start_is_not_attached() {
        let id = EndpointId::from([1; 16]);
        let (attach, detach) = (KernelWork::Attach(id), KernelWork::Detach(id));
        assert!(attach.is_due(EndpointState::Attaching));
        assert!(!attach.is_due(EndpointState::Detaching));
        assert!(detach.is_due(EndpointState::Detaching));
        assert!(!detach.is_due(EndpointState::Attaching));
    }

    #[test]
    fn an_asker_that_went_away_waits_no_longer() {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let release = Release::Attach(reply);
        assert!(!release.is_closed());
        drop(answer);
        assert!(release.is_closed());
    }
}
