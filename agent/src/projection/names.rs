use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use weft_dns::{Directory, Entry, NetworkNames};
use weft_model::{DnsName, Network, NetworkId, NodeId, SandboxId};
use weft_vxlan::{OverlayNetwork, Status};

use crate::{
    cluster::{Cluster, Placed},
    ledger::book::Book,
};

/// Builds the directory of names; keeps the networks that did not change.
pub struct NamesProjection {
    domain: DnsName,
    built: BTreeMap<NetworkId, (Vec<Entry>, Arc<NetworkNames>)>,
}

impl NamesProjection {
    pub fn new(domain: DnsName) -> Self {
        Self { domain, built: BTreeMap::new() }
    }

    /// The names of every network, and who may ask for which.
    ///
    /// In a network that this host carries, an endpoint of another host is named once the kernel
    /// can reach it: `plane` says what it has.
    pub fn directory(
        &mut self,
        me: NodeId,
        cluster: &Cluster,
        book: &Book,
        plane: &Status,
    ) -> Directory {
        let active = book.active();
        let mut directory = Directory::new(self.domain.clone());
        let mut built = BTreeMap::new();
        for network in cluster.networks() {
            let reached = active.contains(&network.id).then(|| reached(plane, network.id));
            let entries = entries(me, cluster, network, reached);
            let names = match self.built.remove(&network.id) {
                Some((before, names)) if before == entries => names,
                _ => Arc::new(names(network, entries.clone())),
            };
            directory.networks.insert(network.id, Arc::clone(&names));
            built.insert(network.id, (entries, names));
        }
        self.built = built;
        directory.askers = askers(book);
        directory
    }
}

/// What of a network the kernel can reach; nothing before its first complete pass.
fn reached(plane: &Status, network: NetworkId) -> Option<&OverlayNetwork> {
    plane.networks.get(&network)?.reached.as_deref()
}

/// The endpoints that may be answered: those of nodes that are alive and, where the network is
/// carried here, within the kernel's reach.
fn entries(
    me: NodeId,
    cluster: &Cluster,
    network: &Network,
    carried: Option<Option<&OverlayNetwork>>,
) -> Vec<Entry> {
    let within_reach = |placed: &Placed<'_>| match carried {
        None => true,
        Some(_) if placed.node == me => true,
        Some(reached) => {
            let station = reached.and_then(|reached| reached.remotes.get(&placed.endpoint.mac));
            let node = cluster.node(placed.node);
            station.zip(node).is_some_and(|(station, node)| station.vtep == node.vtep)
        }
    };
    cluster
        .endpoints(network.id)
        .filter(|placed| placed.alive && within_reach(placed))
        .map(|placed| Entry::endpoint(placed.endpoint))
        .collect()
}

fn names(network: &Network, entries: Vec<Entry>) -> NetworkNames {
    let subnets = network.pools.iter().map(|pool| pool.subnet).collect();
    NetworkNames::new(network.name.clone(), network.internal, subnets, entries)
}

/// For each local address the networks of its sandbox, the address's own first.
fn askers(book: &Book) -> BTreeMap<(NetworkId, IpAddr), Vec<NetworkId>> {
    let mut sandboxes: BTreeMap<&SandboxId, Vec<NetworkId>> = BTreeMap::new();
    for local in book.endpoints.values() {
        sandboxes.entry(&local.endpoint.sandbox).or_default().push(local.endpoint.network);
    }
    let mut askers = BTreeMap::new();
    for local in book.endpoints.values() {
        let own = local.endpoint.network;
        let others = sandboxes[&local.endpoint.sandbox].iter().copied().filter(|id| *id != own);
        let networks: Vec<_> = [own].into_iter().chain(others).collect();
        for ip in local.endpoint.ips() {
            askers.insert((own, ip), networks.clone());
        }
    }
    askers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixture::{Builder, book_with, network, node_id, plane_context},
        projection::plane,
    };

    #[test]
    fn a_remote_name_is_answered_once_the_kernel_reaches_it() {
        let app = network(1, "app");
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &app)
            .endpoint(1, &app, "web", "10.1.0.8")
            .endpoint(2, &app, "far", "10.1.0.9")
            .build();
        let book = book_with(&app, "web", "10.1.0.8");
        let desired = plane(plane_context(), &cluster, &book, false);

        let named = |status: &Status| -> Vec<String> {
            let entries = entries(node_id(1), &cluster, &app, Some(reached(status, app.id)));
            entries.iter().map(|entry| entry.names[0].to_string()).collect()
        };
        let mut status = Status::default();
        assert_eq!(named(&status), ["web"]);
        status.networks.entry(app.id).or_default().reached =
            Some(Arc::clone(&desired.networks[&app.id]));
        let mut both = named(&status);
        both.sort();
        assert_eq!(both, ["far", "web"]);
        assert_eq!(entries(node_id(1), &cluster, &app, None).len(), 2);
    }
}
