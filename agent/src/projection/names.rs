use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use weft_dns::{Directory, Entry, NetworkNames};
use weft_model::{DnsName, Network, NetworkId, SandboxId};

use crate::{cluster::Cluster, ledger::book::Book};

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
    pub fn directory(&mut self, cluster: &Cluster, book: &Book) -> Directory {
        let mut directory = Directory::new(self.domain.clone());
        let mut built = BTreeMap::new();
        for network in cluster.networks() {
            let entries = entries(cluster, network);
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

/// The endpoints that may be answered: those of nodes that can be reached.
fn entries(cluster: &Cluster, network: &Network) -> Vec<Entry> {
    cluster
        .endpoints(network.id)
        .filter(|placed| placed.alive)
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
