//! Address space: the state machines at work, and their place in the book.

use std::{collections::BTreeMap, sync::Arc};

use weft_ipam::{Ask, Ipam, RestoreError, State, Timing};
use weft_model::{AddressGrant, EndpointId, Network, NetworkId, NodeId};

use super::{
    GRANT_DEADLINE, SpaceUsage,
    admission::Obstacle,
    book::{Book, BookError},
    keeper::Keeper,
};
use crate::{
    api::types::SpaceStatus,
    clock,
    cluster::Cluster,
    refusal::{Refusal, RefusalKind},
};

impl Keeper {
    /// Advances the space of every network, and detaches what was fenced.
    pub(super) fn step_spaces(&mut self) {
        let cluster = Arc::clone(&self.cluster);
        let (now, me, timing) = (clock::unix_seconds(), self.context.me, self.timing);
        let mut fenced = Vec::new();
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

    /// Takes back the addresses of an endpoint, and what it still asks for.
    pub(super) fn release(&mut self, network: NetworkId, endpoint: EndpointId) {
        if let Some(space) = self.spaces.get_mut(&network) {
            space.release(endpoint, clock::unix_seconds());
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

/// Sets up the spaces that the book holds.
///
/// # Errors
///
/// One of them is another node's or network's, or newer than this agent.
pub fn restore_spaces(
    book: &Book,
    me: NodeId,
    timing: Timing,
) -> Result<BTreeMap<NetworkId, Ipam>, RestoreError> {
    let mut spaces = BTreeMap::new();
    for (id, state) in &book.spaces {
        if let Some(network) = book.networks.get(id) {
            let network = Arc::new(network.clone());
            spaces.insert(*id, Ipam::restore(network, me, timing, state.clone())?);
        }
    }
    Ok(spaces)
}

/// What `why` says, with the names of nodes and endpoints in place of their ids.
fn with_names(cluster: &Cluster, network: NetworkId, why: &weft_ipam::Refusal) -> String {
    let text = cluster.members().fold(why.to_string(), |text, member| {
        text.replace(&member.id.short(), &cluster.node_name(member.id))
    });
    let owner = match why {
        weft_ipam::Refusal::InUse { endpoint, .. } => {
            cluster.endpoints(network).find(|placed| placed.endpoint.id == *endpoint)
        }
        _ => None,
    };
    match owner.map(|placed| placed.endpoint) {
        Some(endpoint) => text.replace(&endpoint.id.short(), endpoint.name.as_str()),
        None => text,
    }
}

/// How long addresses rest, and blocks stay; the rest as the state machine has it.
pub fn timing(rest: std::time::Duration) -> Timing {
    Timing { rest, ..Timing::default() }
}
