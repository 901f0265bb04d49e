use weft_model::{AddressGrant, Network, NodeId, Unit};

use crate::{Layout, View, sight::Sight};

/// Whether an observer may believe that `node` has `grant`'s address.
///
/// The loan registers alone decide, so of two grants for one address that different nodes claim,
/// no observer accepts both, whatever it has heard and in whichever order: the lender's register
/// for a unit names one node, and a grant out of a block does not count while the address is lent
/// singly. `view` holds the observer's own registers too, if it has any.
pub fn accepts(network: &Network, node: NodeId, grant: &AddressGrant, view: &View<'_>) -> bool {
    let layout = Layout::of(network);
    let sight = Sight { layout, view, own: None };
    let Some(loan) = sight.outstanding(grant.unit) else { return false };
    let theirs = loan.to == node && loan.seq == grant.seq && layout.covers(grant.unit, grant.ip);

    theirs
        && match grant.unit {
            Unit::Address(_) => true,
            Unit::Block(..) => {
                !loan.except.contains(&grant.ip)
                    && sight.outstanding(Unit::Address(grant.ip)).is_none()
            }
        }
}
