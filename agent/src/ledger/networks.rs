use std::{collections::BTreeSet, net::IpAddr, panic::resume_unwind, sync::Arc};

use tokio::task::spawn_blocking;
use weft_model::{InterfaceName, Macvlan, Network, NetworkId};

use super::{Reply, keeper::Keeper, ports::Finished};
use crate::{
    api::types::CreateNetwork,
    chain::Chain,
    clock,
    definition::{self, DEFAULT_BRIDGE},
    refusal::{Refusal, RefusalKind},
};

impl Keeper {
    /// Makes a network; one on an interface of this host once that has been tried out.
    pub(super) fn begin_create(&mut self, request: CreateNetwork, reply: Reply<NetworkId>) {
        let now = clock::unix_seconds();
        let planned = definition::define(&request, fresh_id(), self.context.me, &self.cluster, now);
        let macvlan = match &planned {
            Ok(network) => network.options.macvlan,
            Err(_) => None,
        };
        let Some(Macvlan { parent: Some(parent), mode }) = macvlan else {
            let _ = reply.send(self.create_network(&request));
            return;
        };
        let mtu = planned.ok().and_then(|network| network.options.mtu);
        self.tried.push(parent);
        let (parents, finished) = (self.links.parents.clone(), self.finished.clone());
        self.links.tracker.spawn(async move {
            let tried = spawn_blocking(move || parents.try_out(parent, mode, mtu)).await;
            let tried = tried.unwrap_or_else(|panic| resume_unwind(panic.into_panic()));
            let outcome =
                tried.map_err(|error| Refusal::conflict("options", Chain(&error).to_string()));
            let _ = finished.send(Finished::Parent { parent, request, outcome, reply }).await;
        });
    }

    pub(super) fn finish_parent(
        &mut self,
        parent: InterfaceName,
        request: CreateNetwork,
        outcome: Result<Vec<IpAddr>, Refusal>,
        reply: Reply<NetworkId>,
    ) {
        if let Some(at) = self.tried.iter().position(|tried| *tried == parent) {
            self.tried.swap_remove(at);
        }
        let created =
            outcome.and_then(|own| self.create_network(&definition::set_aside(request, &own)));
        let _ = reply.send(created);
    }

    /// Removes VLANs that were made for networks which have gone. An endpoint that needs one after
    /// all has it made again.
    fn release_parents(&mut self) {
        let of_networks = self.book.networks.values().filter_map(|n| n.options.macvlan?.parent);
        let wanted: BTreeSet<_> = of_networks.chain(self.tried.iter().copied()).collect();
        let left = self.parents.as_ref().is_none_or(|before| !before.is_subset(&wanted));
        self.parents = Some(wanted.clone());
        if left {
            let parents = self.links.parents.clone();
            self.links.tracker.spawn(async move {
                let released = spawn_blocking(move || parents.release(&wanted)).await;
                if let Ok(Err(error)) = released {
                    tracing::warn!(error = %Chain(&error), "cannot remove a VLAN");
                }
            });
        }
    }

    fn create_network(&mut self, request: &CreateNetwork) -> Result<NetworkId, Refusal> {
        let id = fresh_id();
        let now = clock::unix_seconds();
        let network = definition::define(request, id, self.context.me, &self.cluster, now)?;
        self.begin_network(network);
        Ok(id)
    }

    /// Makes this host's network that was never asked to be made.
    pub(super) fn create_default_bridge(&mut self) -> Result<(), Refusal> {
        let (me, now) = (self.context.me, clock::unix_seconds());
        let network = definition::define_default_bridge(fresh_id(), me, &self.cluster, now)?;
        self.begin_network(network);
        Ok(())
    }

    /// Whether it is made already, though the cluster may not be understood anew yet.
    pub(super) fn has_default_bridge(&self) -> bool {
        let is_default = |network: &Network| network.name.as_str() == DEFAULT_BRIDGE;
        self.book.networks.values().any(|network| network.driver.is_local() && is_default(network))
    }

    fn begin_network(&mut self, network: Network) {
        let Network { id, driver, .. } = network;
        tracing::info!(network = %network.name, %id, %driver, vni = %network.vni, "network created");
        Arc::make_mut(&mut self.book).networks.insert(id, network);
        self.stale = true;
    }

    pub(super) fn remove_network(&mut self, network: &str, force: bool) -> Result<(), Refusal> {
        let found = self.cluster.find_network(network).cloned().ok_or_else(|| {
            Refusal::missing(format!("there is no network {network}: weft network ls lists them"))
        })?;
        let users = self.users(found.id);
        if !force && !users.is_empty() {
            return Err(Refusal::new(
                RefusalKind::Conflict,
                format!(
                    "network {} is in use by {}: detach them, or remove it with --force",
                    found.name,
                    users.join(", ")
                ),
            ));
        }
        tracing::info!(network = %found.name, id = %found.id, "network removed");
        let book = Arc::make_mut(&mut self.book);
        match found.driver.is_local() {
            true => book.ended.insert(found.id),
            false => book.removed.insert(found.id),
        };
        self.stale = true;
        Ok(())
    }

    /// The endpoints that use a network, as `NAME on HOST`; one host's pending ones included.
    fn users(&self, network: NetworkId) -> Vec<String> {
        let here = self.cluster.node_name(self.context.me);
        let others = self
            .cluster
            .endpoints(network)
            .filter(|placed| placed.node != self.context.me)
            .map(|placed| (placed.endpoint.name.clone(), self.cluster.node_name(placed.node)));
        self.book
            .endpoints_of(network)
            .map(|local| (local.endpoint.name.clone(), here.clone()))
            .chain(others)
            .map(|(name, node)| format!("{name} on {node}"))
            .collect()
    }

    /// Lets go of networks that somebody removed.
    pub(super) fn drop_removed_networks(&mut self) {
        let removed: Vec<NetworkId> = self
            .book
            .spaces
            .keys()
            .chain(self.book.uplinks.keys())
            .copied()
            .chain(self.book.active())
            .filter(|id| self.cluster.is_removed(*id))
            .collect();
        for id in removed {
            let endpoints: Vec<_> =
                self.book.endpoints_of(id).map(|local| local.endpoint.id).collect();
            for endpoint in &endpoints {
                self.begin_detach(*endpoint, None);
            }
            if endpoints.is_empty() {
                let book = Arc::make_mut(&mut self.book);
                book.spaces.remove(&id);
                self.spaces.remove(&id);
                book.uplinks.remove(&id);
            }
        }
        if !self.book.ended.is_empty() {
            Arc::make_mut(&mut self.book).forget_ended();
        }
        self.release_parents();
    }
}

fn fresh_id() -> NetworkId {
    NetworkId::from(rand::random::<[u8; 16]>())
}
