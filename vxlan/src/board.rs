//! Where the tasks post what they did.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::sync::watch;
use weft_model::{EndpointId, NetworkId};

use crate::{
    Carriage, NetworkStatus, OverlayNetwork, Status, Table, TableStatus, namespace::namespace_name,
    network::Passes, table::Chain,
};

/// The one place of the status; every task writes its own part of it.
#[derive(Clone, Debug)]
pub(crate) struct Board(Arc<watch::Sender<Arc<Status>>>);

/// Why a pass was made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Wake {
    /// The first since the agent's start.
    Start,
    DesiredChanged,
    /// Somebody asked for a port to be connected or removed.
    Command,
    /// The kernel told of a change.
    KernelChanged,
    Resync,
}

/// What a pass has to be told about, besides its operations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Occasion {
    pub(crate) wake: Wake,
    /// Whether the pass before left nothing to do: only then is a further change somebody else's.
    pub(crate) settled: bool,
    /// Since the desired state changed, if it has not been reached since.
    pub(crate) since: Option<Duration>,
}

impl Board {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Arc::new(Status::default()))))
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Status>> {
        self.0.subscribe()
    }

    /// Posts a pass over a network's tables that aimed at `target`, if the network is desired.
    pub(crate) fn post_network(
        &self,
        id: NetworkId,
        target: Option<Arc<OverlayNetwork>>,
        carriage: Option<Carriage>,
        ports: BTreeSet<EndpointId>,
        passes: &Passes,
        occasion: Occasion,
    ) {
        self.0.send_modify(|status| {
            let networks = &mut Arc::make_mut(status).networks;
            let entry = networks.entry(id).or_insert_with(|| NetworkStatus {
                namespace: namespace_name(id),
                ..NetworkStatus::default()
            });
            entry.desired = target.is_some();
            entry.carriage = carriage;
            if reaches(passes) {
                entry.reached = target;
            }
            entry.ports = ports;
            count(&mut entry.tables, passes, occasion);
        });
    }

    pub(crate) fn post_host(&self, passes: &Passes, sysctls: Vec<String>, occasion: Occasion) {
        self.0.send_modify(|status| {
            let status = Arc::make_mut(status);
            status.sysctls_changed.extend(sysctls);
            count(&mut status.host, passes, occasion);
        });
    }

    pub(crate) fn remove(&self, id: NetworkId) {
        self.0.send_modify(|status| drop(Arc::make_mut(status).networks.remove(&id)));
    }
}

fn converged(passes: &Passes) -> bool {
    passes.values().all(|pass| pass.errors.is_empty())
}

/// Whether the kernel now reaches what it should. A sandbox with an old MTU is reached all the same.
fn reaches(passes: &Passes) -> bool {
    passes.iter().all(|(&table, pass)| table == Table::Mtu || pass.errors.is_empty())
}

fn count(
    tables: &mut std::collections::BTreeMap<Table, TableStatus>,
    passes: &Passes,
    Occasion { wake, settled, since }: Occasion,
) {
    let converged = converged(passes);
    let unasked = settled && matches!(wake, Wake::KernelChanged | Wake::Resync);
    for (&table, pass) in passes {
        let entry = tables.entry(table).or_default();
        entry.applied += pass.applied;
        entry.failed += pass.errors.len() as u64;
        if unasked {
            entry.drift += pass.applied;
        }
        for error in &pass.errors {
            tracing::warn!(?wake, table = table.as_str(), error = %Chain(error), "a table is not as desired");
        }
        entry.error = pass.errors.first().map(|error| Chain(error).to_string());
        if converged && since.is_some() {
            entry.lag = since;
        }
    }
}
