//! Which ports of this host other processes have: looked at beside the keeper, which waits for
//! nothing.

use std::collections::{BTreeMap, BTreeSet};

use tokio::task::spawn_blocking;
use weft_balance::{HostPort, Taken};
use weft_model::EndpointId;

use super::{keeper::Keeper, ports::Finished};
use crate::chain::Chain;

/// What has been seen of the ports that one request needs.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Who has it, for those that are taken.
    seen: BTreeMap<HostPort, Option<String>>,
    under_way: bool,
}

/// What is known of a port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sight<'a> {
    Unseen,
    Free,
    /// With a sentence that names the owner.
    Taken(&'a str),
}

impl Survey {
    pub(super) fn sight(&self, port: &HostPort) -> Sight<'_> {
        match self.seen.get(port) {
            None => Sight::Unseen,
            Some(None) => Sight::Free,
            Some(Some(why)) => Sight::Taken(why),
        }
    }

    /// Says that ports are being looked at; returns whether none were already.
    pub(super) fn begin(&mut self) -> bool {
        !std::mem::replace(&mut self.under_way, true)
    }

    pub(super) fn note(&mut self, ports: BTreeSet<HostPort>, taken: &BTreeMap<HostPort, Taken>) {
        self.under_way = false;
        let found = ports.into_iter().map(|port| (port, taken.get(&port).map(Taken::to_string)));
        self.seen.extend(found);
    }
}

impl Keeper {
    /// Has `ports` looked at for the request `id`. A host that cannot be looked at takes no port.
    pub(super) fn start_survey(&self, id: EndpointId, ports: BTreeSet<HostPort>) {
        let (host, finished) = (self.links.balance.ports.clone(), self.finished.clone());
        self.links.tracker.spawn(async move {
            let surveyed = spawn_blocking(move || (host.survey(&ports), ports)).await;
            let Ok((surveyed, ports)) = surveyed else {
                tracing::error!("a look at the host's ports panicked");
                return;
            };
            let taken = surveyed.unwrap_or_else(|error| {
                tracing::warn!(error = %Chain(&error), "cannot look at the host's ports");
                BTreeMap::new()
            });
            let _ = finished.send(Finished::Surveyed { request: id, ports, taken }).await;
        });
    }
}
