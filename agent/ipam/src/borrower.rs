use std::net::IpAddr;

use weft_model::{BlockIndex, Family, Unit};

use crate::{
    demand::{Clock, Demand, Requests},
    sight::Sight,
    state::{Move, State},
};

/// Holds that their lender has given to another turn: only after this node was removed by an
/// operator, rightly or not.
pub(crate) fn fences(sight: &Sight<'_>, own: &State) -> Vec<Move> {
    let taken = |unit: Unit, seq: u64| {
        let moved =
            |loan: &weft_model::Loan| loan.seq > seq || (loan.seq == seq && loan.to != own.node);
        sight.loan(unit).is_some_and(moved)
    };
    let lost = own.holds.held.iter().filter(|(unit, hold)| taken(**unit, hold.seq));
    lost.map(|(&unit, _)| Move::End { unit }).collect()
}

/// Loans to this node that it has neither begun nor ended.
pub(crate) fn starts(sight: &Sight<'_>, own: &State) -> Vec<Move> {
    let mut starts = Vec::new();
    for lender in sight.layout.lenders_for(own.node) {
        for (&unit, loan) in sight.loans(lender).into_iter().flat_map(|record| &record.loans) {
            let ended = own.holds.released.get(&unit).copied().unwrap_or(0);
            let new = loan.seq > ended && !own.holds.held.contains_key(&unit);
            if loan.to == own.node && new && sight.layout.lender(unit) == Some(lender) {
                starts.push(Move::Start { unit, seq: loan.seq, except: loan.except.clone() });
            }
        }
    }
    starts
}

/// Addresses that another node asks for by number and that lie idle in a block held here. They
/// go back to the lender for the rest of the loan; a resting one too, as it is asked for.
pub(crate) fn cessions(sight: &Sight<'_>, own: &State, requests: &Requests) -> Vec<Move> {
    let mut cessions = Vec::new();
    for ip in wanted_elsewhere(sight, own) {
        let Some(block) = sight.layout.block_of(ip) else { continue };
        let ours = own.holder_of(sight.layout.network(), ip).is_some_and(|(unit, _)| unit == block);
        let idle = !own.leases.contains_key(&ip) && !requests.names(ip);
        let lender = sight.layout.lender(block);
        if ours && idle && lender.is_some_and(|lender| sight.answers(lender)) {
            cessions.push(Move::Cede { block, ip });
        }
    }
    cessions
}

/// Holds to give back: single addresses out of use, blocks that another node needs more, and
/// blocks beyond the reserve that have been empty for long.
pub(crate) fn returns(
    sight: &Sight<'_>,
    own: &State,
    requests: &Requests,
    clock: &Clock<'_>,
) -> Vec<Move> {
    let mut returns = single_returns(sight, own, requests, clock);
    for family in [Family::V4, Family::V6] {
        returns.extend(block_returns(sight, own, requests, clock, family));
    }
    returns
}

fn single_returns(
    sight: &Sight<'_>,
    own: &State,
    requests: &Requests,
    clock: &Clock<'_>,
) -> Vec<Move> {
    let wanted = wanted_elsewhere(sight, own);
    let over = |ip: &IpAddr| {
        let resting = own.is_resting(*ip, clock.rest, clock.now);
        !own.leases.contains_key(ip) && !requests.names(*ip) && (!resting || wanted.contains(ip))
    };
    let singles = own.holds.held.keys().filter_map(|unit| match unit {
        Unit::Address(ip) => Some(*ip),
        Unit::Block(..) => None,
    });
    singles.filter(over).map(|ip| Move::End { unit: Unit::Address(ip) }).collect()
}

fn block_returns(
    sight: &Sight<'_>,
    own: &State,
    requests: &Requests,
    clock: &Clock<'_>,
    family: Family,
) -> Vec<Move> {
    let mut demand = Demand::of(sight, own, requests, clock, family);
    let mut hungry = sight.starving(family);
    let mut returns = Vec::new();

    // A block given back to a lender that is away would be nobody's until it returns.
    let can_take = |index: BlockIndex| {
        let lender = sight.layout.lender(Unit::Block(family, index));
        lender.is_some_and(|lender| sight.answers(lender))
    };
    let blocks = own.blocks(family).filter(|(index, _)| can_take(*index));
    for (index, hold) in blocks {
        let addresses: Vec<IpAddr> = sight.layout.usable_in(family, index).collect();
        let busy =
            |ip: &IpAddr| own.leases.contains_key(ip) || own.is_resting(*ip, clock.rest, clock.now);
        if addresses.iter().any(busy) {
            continue;
        }
        let unit = Unit::Block(family, index);
        let free = addresses.iter().filter(|ip| !hold.ceded.contains(ip)).count();
        let needed_here = demand.pending > demand.free - free;
        let in_reserve = free > 0 && demand.free - free < demand.pending + demand.reserve;
        let quiet = clock.quiet_for(unit) >= clock.idle;
        let needed_there = hungry > 0 && !needed_here;
        if needed_there || (quiet && !in_reserve) {
            hungry = hungry.saturating_sub(1);
            demand.free -= free;
            returns.push(Move::End { unit });
        }
    }
    returns
}

/// Addresses that other live nodes ask for by number and do not have yet.
fn wanted_elsewhere(sight: &Sight<'_>, own: &State) -> std::collections::BTreeSet<IpAddr> {
    let others = sight.wants().filter(|(node, _)| *node != own.node);
    let wanted = others.flat_map(|(node, want)| want.addresses.iter().map(move |&ip| (node, ip)));
    let met = |node, ip| {
        sight.outstanding(Unit::Address(ip)).is_some_and(|loan: &weft_model::Loan| loan.to == node)
    };
    wanted.filter(|&(node, ip)| !met(node, ip)).map(|(_, ip)| ip).collect()
}
