//! Endpoints that get no new connections, and what checks have found: what of the conditions of
//! this node's endpoints outlives the agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use weft_model::{Condition, EndpointId, Label, NetworkId, Verdict};

use super::{book::Book, keeper::Keeper};
use crate::{cluster::Cluster, refusal::Refusal};

/// What the checks of this host's endpoints have found. Whether one is draining is not asked of them.
pub type Verdicts = BTreeMap<NetworkId, Vec<Condition>>;

/// What is to be drained, or no longer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DrainTarget {
    Endpoint(EndpointId),
    /// The endpoints of a name or id on this host; on all of its networks where none is given.
    Named {
        endpoint: String,
        network: Option<String>,
    },
    /// Every endpoint of this host, those to come included.
    Node,
}

impl Keeper {
    /// Lets endpoints get no new connections, or get them again. Returns the endpoints.
    pub(super) fn drain(
        &mut self,
        target: &DrainTarget,
        draining: bool,
    ) -> Result<BTreeSet<EndpointId>, Refusal> {
        let endpoints = match target {
            DrainTarget::Endpoint(id) if self.book.endpoints.contains_key(id) => {
                BTreeSet::from([*id])
            }
            DrainTarget::Endpoint(id) => {
                return Err(Refusal::missing(format!(
                    "there is no endpoint {} on this host: weft ps lists them",
                    id.short()
                )));
            }
            DrainTarget::Named { endpoint, network } => {
                self.find_all_local(endpoint, network.as_deref())?
            }
            DrainTarget::Node => self.book.endpoints.keys().copied().collect(),
        };
        let book = Arc::make_mut(&mut self.book);
        if *target == DrainTarget::Node {
            book.drains_all = draining;
            book.draining.clear();
        } else if draining {
            book.draining.extend(&endpoints);
        } else if book.drains_all {
            // The rest of the host goes on draining, one by one.
            book.drains_all = false;
            let rest = book.endpoints.keys().filter(|id| !endpoints.contains(id)).copied();
            book.draining = rest.collect();
        } else {
            book.draining.retain(|id| !endpoints.contains(id));
        }
        Ok(endpoints)
    }

    /// Writes down what checks have found; forgets the endpoints that have gone.
    pub(super) fn note_verdicts(&mut self) {
        let found = Arc::clone(&self.links.verdicts.borrow_and_update());
        let noted = noted(&self.book, &self.cluster, &found);
        if self.book.verdicts != noted {
            Arc::make_mut(&mut self.book).verdicts = noted;
        }
        let is_here = |id: &EndpointId| self.book.endpoints.contains_key(id);
        if !self.book.draining.iter().all(is_here) {
            let book = Arc::make_mut(&mut self.book);
            let Book { draining, endpoints, .. } = book;
            draining.retain(|id| endpoints.contains_key(id));
        }
    }
}

/// What holds of the checks of this host's endpoints: what was found, and before anything was, what
/// was found by the agent's predecessor.
fn noted(
    book: &Book,
    cluster: &Cluster,
    found: &Verdicts,
) -> BTreeMap<EndpointId, BTreeMap<Label, Verdict>> {
    let found: BTreeMap<EndpointId, &Condition> =
        found.values().flatten().map(|condition| (condition.endpoint, condition)).collect();
    let mut noted = BTreeMap::new();
    for (id, local) in &book.endpoints {
        let network = local.endpoint.network;
        let is_checked = |service: &Label| {
            let service = cluster.service(network, service).and_then(|view| view.definition());
            service.is_some_and(|service| service.check.is_some())
        };
        let before = book.verdicts.get(id).into_iter().flatten();
        let now = found.get(id).into_iter().flat_map(|condition| &condition.verdicts);
        let both = before.chain(now).filter(|(service, _)| is_checked(service));
        let verdicts: BTreeMap<Label, Verdict> =
            both.map(|(service, verdict)| (service.clone(), verdict.clone())).collect();
        if !verdicts.is_empty() {
            noted.insert(*id, verdicts);
        }
    }
    noted
}
