//! Which virtual addresses count.

use weft_gossip::ClusterView;
use weft_ipam::Layout;
use weft_model::{AddressGrant, Network, NodeId, Unit};

/// Whether `holder` has the address of a service, as the registers say.
///
/// A service outlives the hosts that gave it its address. Where neither the lender nor the holder is
/// known any more, the service's own record is believed, unless somebody who is known has the address
/// on loan: the lender, whose word alone could give it to another, has lent it to nobody here. If the
/// two come back, their registers decide again.
pub(super) fn confirmed(
    view: &ClusterView,
    network: &Network,
    holder: NodeId,
    grant: &AddressGrant,
    registers: &weft_ipam::View<'_>,
) -> bool {
    if weft_ipam::accepts(network, holder, grant, registers) {
        return true;
    }
    let layout = Layout::of(network);
    let is_known = |node: NodeId| view.members.contains_key(&node);
    let both_are_forgotten = !is_known(holder)
        && layout.covers(grant.unit, grant.ip)
        && layout.lender(grant.unit).is_some_and(|lender| !is_known(lender));
    both_are_forgotten && !is_held(grant, registers)
}

/// Whether somebody has the address on loan: alone, or in a block that was lent to him not before
/// the grant.
fn is_held(grant: &AddressGrant, registers: &weft_ipam::View<'_>) -> bool {
    registers.holds.values().any(|record| {
        let later = record.held.get(&grant.unit).is_some_and(|hold| hold.seq >= grant.seq);
        later || record.held.contains_key(&Unit::Address(grant.ip))
    })
}
