use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use weft_model::{EndpointId, HoldRecord, LoanRecord, NodeId, WantRecord};

/// What a node has heard of the others, for one network.
///
/// The registers may be old, but of each writer's register an older version must never take the
/// place of a newer one while the process lives. After a restart they may start from nothing.
/// Registers of dead nodes and of revoked lenders stay in it: what they lent is still lent.
#[derive(Clone, Debug, Default)]
pub struct View<'a> {
    pub loans: BTreeMap<NodeId, &'a LoanRecord>,
    pub holds: BTreeMap<NodeId, &'a HoldRecord>,
    pub wants: BTreeMap<NodeId, &'a WantRecord>,
    /// Nodes that the failure detector believes to be up. Decides whom to ask and whom to wait
    /// for, never whom an address belongs to.
    pub live: BTreeSet<NodeId>,
    /// Nodes removed by an operator, for good: their space may be lent again.
    pub revoked: BTreeSet<NodeId>,
    /// Who has which address, of the endpoints that are accepted. Only for refusals that name
    /// the other side.
    pub endpoints: BTreeMap<IpAddr, (NodeId, EndpointId)>,
}
