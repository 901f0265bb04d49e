//! Where names are answered: at the gateways of networks that have one of weft's, in the sandboxes of
//! the others.

use std::net::IpAddr;

use weft_model::NetworkId;

use super::{book::LocalEndpoint, keeper::Keeper};
use crate::{
    chain::Chain,
    listeners::sandboxes::{self, Resident},
    projection::gateway_ips,
    refusal::{Refusal, RefusalKind},
};

impl Keeper {
    /// The addresses of weft's own gateways in a network.
    fn own_gateways(&self, id: NetworkId) -> Vec<IpAddr> {
        let network = self.cluster.network(id).filter(|network| network.driver.has_gateway());
        network.map_or_else(Vec::new, |network| gateway_ips(network))
    }

    /// Answers names in the sandbox itself, where its network has no gateway of weft's. Without
    /// names it is attached all the same: it may have a resolver of its own.
    pub(super) fn listen_inside(&self, local: &LocalEndpoint) -> impl Future<Output = ()> + use<> {
        let network = self.book.networks.get(&local.endpoint.network);
        let bare = network.is_some_and(|network| !network.driver.has_gateway());
        let resident = bare.then(|| Resident::of(local));
        let sandbox = local.sandbox.clone();
        let listeners = self.links.sandbox_listeners.clone();
        async move {
            let Some(resident) = resident else { return };
            if let Err(error) = listeners.serve(&resident).await {
                sandboxes::note(&sandbox, &error);
            }
        }
    }

    /// Answers names on the network's gateway addresses, once its links are there.
    pub(super) fn listen_on(
        &self,
        id: NetworkId,
    ) -> impl Future<Output = Result<(), Refusal>> + use<> {
        let gateways = self.own_gateways(id);
        let listeners = self.links.listeners.clone();
        async move {
            if gateways.is_empty() {
                return Ok(());
            }
            listeners
                .listen(id, &gateways)
                .await
                .map_err(|error| Refusal::new(RefusalKind::Failed, Chain(&error).to_string()))
        }
    }

    /// Answers names again where the sockets went with a namespace that somebody removed.
    pub(super) fn keep_listening(&self) {
        let plane = self.plane_status.borrow();
        let carried = plane.networks.iter().filter(|(_, network)| network.reached.is_some());
        // Where no container is, nobody asks.
        let active = self.book.active();
        for (&id, _) in carried.filter(|(id, _)| active.contains(id)) {
            let gateways = self.own_gateways(id);
            if !gateways.is_empty() && !self.links.listeners.is_serving(id, &gateways) {
                self.listen(id);
            }
        }
    }

    pub(super) fn listen(&self, id: NetworkId) {
        let listen = self.listen_on(id);
        self.links.tracker.spawn(async move {
            if let Err(refusal) = listen.await {
                tracing::warn!(network = %id, error = %refusal, "names are not answered");
            }
        });
    }
}
