use std::sync::Arc;

use weft_model::{Network, NetworkId};

use super::keeper::Keeper;
use crate::{
    api::types::CreateNetwork,
    clock,
    definition::{self, DEFAULT_BRIDGE},
    refusal::{Refusal, RefusalKind},
};

impl Keeper {
    pub(super) fn create_network(&mut self, request: &CreateNetwork) -> Result<NetworkId, Refusal> {
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
    }
}

fn fresh_id() -> NetworkId {
    NetworkId::from(rand::random::<[u8; 16]>())
}
