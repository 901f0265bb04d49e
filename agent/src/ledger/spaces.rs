//! Address space: the state machines at work, and their place in the book.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use weft_ipam::{Ask, Ipam, RestoreError, State, Timing};
use weft_model::{AddressGrant, EndpointId, Network, NetworkId, NodeId};

use super::{
    GRANT_DEADLINE, SpaceUsage,
    book::{Book, BookError},
    keeper::Keeper,
    waiting::Obstacle,
};
use crate::{
    api::types::SpaceStatus,
    clock,
    cluster::{Cluster, ServiceView},
    refusal::{Refusal, RefusalKind},
};

impl Keeper {
    /// Advances the space of every network, and detaches what was fenced.
    pub(super) fn step_spaces(&mut self) {
        let cluster = Arc::clone(&self.cluster);
        let (now, me, timing) = (clock::unix_seconds(), self.context.me, self.timing);
        let mut fenced = Vec::new();
        self.released = false;
        for network in cluster.networks() {
            let space = self.spaces.entry(network.id);
            let space = space.or_insert_with(|| Ipam::new(Arc::clone(network), me, timing));
            let step = space.step(&cluster.space_view(network.id), now);
            fenced.extend(step.fenced);
        }
        for lease in fenced {
            tracing::warn!(
                endpoint = %lease.endpoint, address = %lease.grant.ip,
                "the address was lent to another node, because this one was removed: detaching"
            );
            self.begin_detach(lease.endpoint, None);
            if Arc::make_mut(&mut self.book).vips.remove(&lease.endpoint).is_some() {
                self.release_everywhere(lease.endpoint);
            }
        }
    }

    pub(super) fn allocate(
        &mut self,
        network: &Network,
        endpoint: EndpointId,
        ask: Ask,
    ) -> Result<AddressGrant, Obstacle> {
        let cluster = Arc::clone(&self.cluster);
        let space = self.spaces.get_mut(&network.id).expect("every network was stepped before");
        let view = cluster.space_view(network.id);
        space.allocate(endpoint, ask, &view, clock::unix_seconds()).map_err(|why| {
            let message = with_names(&cluster, network.id, &why);
            let reason = Refusal::new(RefusalKind::Unavailable, message);
            match why {
                why if why.may_pass() => Obstacle::Waits { reason, patience: GRANT_DEADLINE },
                weft_ipam::Refusal::InUse { .. } => Obstacle::Refused(Refusal {
                    kind: RefusalKind::Conflict,
                    field: Some("addresses"),
                    ..reason
                }),
                _ => Obstacle::Refused(Refusal {
                    kind: RefusalKind::Invalid,
                    field: Some("addresses"),
                    ..reason
                }),
            }
        })
    }

    /// Takes back whatever a request that is given up had been given. In every network: its name
    /// may have come to stand for another one meanwhile.
    pub(super) fn release_everywhere(&mut self, endpoint: EndpointId) {
        for space in self.spaces.values_mut() {
            space.release(endpoint, clock::unix_seconds());
        }
        self.released = true;
    }

    /// Takes back the addresses of an endpoint, and what it still asks for.
    pub(super) fn release(&mut self, network: NetworkId, endpoint: EndpointId) {
        if let Some(space) = self.spaces.get_mut(&network) {
            space.release(endpoint, clock::unix_seconds());
            self.released = true;
        }
    }

    pub(super) fn usage(&self) -> SpaceUsage {
        let now = clock::unix_seconds();
        let rows = |space: &Ipam| {
            let families = space.network().pools.iter().map(|pool| pool.subnet.family());
            let row = |family| {
                let usage = space.usage(family, now);
                SpaceStatus {
                    family,
                    owned: usage.owned as u64,
                    free: usage.free as u64,
                    leased: usage.leased as u64,
                    resting: usage.resting as u64,
                }
            };
            families.map(row).collect()
        };
        self.spaces.iter().map(|(id, space)| (*id, rows(space))).collect()
    }

    /// Brings the book to disk with every space that changed. What is published afterwards is
    /// what the disk has.
    pub(super) fn save(&mut self) -> Result<(), BookError> {
        let mut unsaved = Vec::new();
        for (id, space) in &self.spaces {
            if let Some(state) = space.unsaved() {
                Arc::make_mut(&mut self.book).spaces.insert(*id, State::clone(state.state()));
                unsaved.push((*id, state));
            }
        }
        self.file.save(&self.book)?;
        for (id, state) in unsaved {
            self.spaces.get_mut(&id).expect("just seen").saved(state);
        }
        Ok(())
    }
}

/// Sets up the spaces that the book holds. Addresses of what is not in the book are
/// given back: a request had them that waited for more when the agent ended. `now` is in seconds
/// since the Unix epoch.
///
/// # Errors
///
/// One of them is another node's or network's, or newer than this agent.
pub fn restore_spaces(
    book: &Book,
    me: NodeId,
    timing: Timing,
    now: u64,
) -> Result<BTreeMap<NetworkId, Ipam>, RestoreError> {
    let mut spaces = BTreeMap::new();
    for (id, state) in &book.spaces {
        if let Some(network) = book.networks.get(id) {
            let network = Arc::new(network.clone());
            let mut space = Ipam::restore(network, me, timing, state.clone())?;
            let leases = space.leases().map(|lease| lease.endpoint);
            let orphans: BTreeSet<_> = leases.filter(|id| !is_known(book, *id)).collect();
            for endpoint in orphans {
                space.release(endpoint, now);
            }
            spaces.insert(*id, space);
        }
    }
    Ok(spaces)
}

/// Whether an address in use is an endpoint's or a service's.
fn is_known(book: &Book, id: EndpointId) -> bool {
    book.endpoints.contains_key(&id) || book.vips.contains_key(&id)
}

/// What `why` says, with the names of nodes and endpoints in place of their ids.
fn with_names(cluster: &Cluster, network: NetworkId, why: &weft_ipam::Refusal) -> String {
    let text = cluster.members().fold(why.to_string(), |text, member| {
        text.replace(&member.id.short(), &cluster.node_name(member.id))
    });
    let weft_ipam::Refusal::InUse { endpoint: owner, .. } = why else { return text };
    if let Some(placed) = cluster.endpoints(network).find(|p| p.endpoint.id == *owner) {
        return text.replace(&owner.short(), placed.endpoint.name.as_str());
    }
    let holds = |view: &ServiceView<'_>| {
        let lease = view.definition().and_then(|service| service.lease);
        lease.is_some_and(|lease| lease.id == *owner)
    };
    match cluster.services(network).find(holds) {
        Some(service) => text
            .replace(&format!("endpoint {}", owner.short()), &format!("service {}", service.name))
            .replace("that endpoint", "that service"),
        None => text,
    }
}

/// How long addresses rest, and blocks stay; the rest as the state machine has it.
pub fn timing(rest: std::time::Duration) -> Timing {
    Timing { rest, ..Timing::default() }
}

#[cfg(test)]
mod tests {
    use weft_model::Family;

    use super::*;
    use crate::fixture::{Builder, book_with, endpoint, network, node_id};

    #[test]
    fn an_address_without_an_endpoint_is_free_after_a_restart() {
        let app = network(1, "app");
        let cluster = Builder::default().node(1).network(1, &app).build();
        let (view, timing) = (cluster.space_view(app.id), Timing::default());
        let mut space = Ipam::new(Arc::new(app.clone()), node_id(1), timing);
        assert!(space.step(&view, 100).changed);
        let waiting = endpoint(&app, "web", "10.1.0.8").id;
        space.allocate(waiting, Ask::Any(Family::V4), &view, 100).unwrap();
        let unsaved = space.unsaved().unwrap();
        let mut book = Book::default();
        book.networks.insert(app.id, app.clone());
        book.spaces.insert(app.id, unsaved.state().clone());

        let leased = |book: &Book| {
            let spaces = restore_spaces(book, node_id(1), timing, 101).unwrap();
            spaces[&app.id].leases().count()
        };
        assert_eq!(leased(&book), 0);
        let mut attached = book_with(&app, "web", "10.1.0.8");
        (attached.networks, attached.spaces) = (book.networks, book.spaces);
        assert_eq!(leased(&attached), 1);
    }
}
