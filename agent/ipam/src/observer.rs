use weft_model::{AddressGrant, Network, NodeId, Unit};

use crate::{Layout, View, sight::Sight};

/// Whether an observer may believe that `node` has `grant`'s address.
///
/// The registers alone decide, so of two grants for one address that different nodes claim, no
/// observer accepts both, whatever it has heard and in whichever order: the lender's register for
/// a unit names one node, and a grant out of a block does not count while the address is lent
/// singly.
///
/// An observer that has never heard the lender, because it came after the lender's end, goes by
/// the borrowers' registers: the node with the latest turn of the unit has it. There is one such
/// node at most, and a lender that is gone lends no further turn.
///
/// `view` holds the observer's own registers too, if it has any.
pub fn accepts(network: &Network, node: NodeId, grant: &AddressGrant, view: &View<'_>) -> bool {
    let layout = Layout::of(network);
    let sight = Sight { layout, view, own: None };
    let Some(lender) = layout.lender(grant.unit) else { return false };
    layout.covers(grant.unit, grant.ip)
        && match view.loans.contains_key(&lender) {
            true => lender_agrees(&sight, node, grant),
            false => borrowers_agree(view, node, grant),
        }
}

fn lender_agrees(sight: &Sight<'_>, node: NodeId, grant: &AddressGrant) -> bool {
    let Some(loan) = sight.outstanding(grant.unit) else { return false };
    loan.to == node
        && loan.seq == grant.seq
        && match grant.unit {
            Unit::Address(_) => true,
            Unit::Block(..) => {
                !loan.except.contains(&grant.ip)
                    && sight.outstanding(Unit::Address(grant.ip)).is_none()
            }
        }
}

fn borrowers_agree(view: &View<'_>, node: NodeId, grant: &AddressGrant) -> bool {
    let holds = |unit: Unit| {
        let of_unit = view.holds.iter().filter(|(id, _)| !view.revoked.contains(id));
        of_unit.filter_map(move |(id, record)| Some((*id, record.held.get(&unit)?)))
    };
    let own = holds(grant.unit).find(|(id, _)| *id == node).map(|(_, hold)| hold);
    let latest = holds(grant.unit).all(|(id, hold)| id == node || hold.seq < grant.seq);
    let Some(own) = own.filter(|hold| hold.seq == grant.seq && latest) else { return false };
    match grant.unit {
        Unit::Address(_) => true,
        Unit::Block(..) => {
            !own.ceded.contains(&grant.ip) && holds(Unit::Address(grant.ip)).next().is_none()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use weft_model::{Driver, Family, Hold, HoldRecord, NetworkId, NetworkOptions, Pool, Vni};

    use super::*;

    fn node(n: u8) -> NodeId {
        NodeId::from([n; 16])
    }

    fn network() -> Network {
        let subnet: weft_model::Subnet = "10.1.0.0/24".parse().unwrap();
        let pool = Pool { subnet, gateway: subnet.first_host(), range: None, aux: BTreeMap::new() };
        Network {
            id: NetworkId::from([1; 16]),
            name: "app".parse().unwrap(),
            driver: Driver::Overlay,
            vni: Vni::try_from(5000).unwrap(),
            pools: vec![pool],
            internal: false,
            encrypted: false,
            labels: BTreeMap::new(),
            options: NetworkOptions::default(),
            creator: node(1),
            lenders: vec![node(1)],
            created: 0,
        }
    }

    fn holding(units: &[(Unit, u64)]) -> HoldRecord {
        let hold = |seq| Hold { seq, ceded: BTreeSet::new() };
        let held = units.iter().map(|(unit, seq)| (*unit, hold(*seq))).collect();
        HoldRecord { held, released: BTreeMap::new() }
    }

    #[test]
    fn without_the_lender_the_latest_borrower_is_believed_and_a_single_loan_goes_first() {
        let network = network();
        let ip = "10.1.0.9".parse().unwrap();
        let block = Layout::of(&network).block_of(ip).unwrap();
        assert!(matches!(block, Unit::Block(Family::V4, _)));
        let grant = |unit, seq| AddressGrant { ip, unit, seq };
        let believed = |holds: &BTreeMap<NodeId, HoldRecord>, n, grant: AddressGrant| {
            let holds = holds.iter().map(|(id, record)| (*id, record)).collect();
            accepts(&network, node(n), &grant, &View { holds, ..View::default() })
        };

        let mut holds = BTreeMap::from([(node(2), holding(&[(block, 1)]))]);
        assert!(believed(&holds, 2, grant(block, 1)));
        assert!(!believed(&holds, 2, grant(block, 2)));
        assert!(!believed(&holds, 3, grant(block, 1)));

        holds.insert(node(3), holding(&[(block, 2)]));
        assert!(!believed(&holds, 2, grant(block, 1)));
        assert!(believed(&holds, 3, grant(block, 2)));

        holds.insert(node(4), holding(&[(Unit::Address(ip), 1)]));
        assert!(!believed(&holds, 3, grant(block, 2)));
        assert!(believed(&holds, 4, grant(Unit::Address(ip), 1)));
    }
}
