use std::{collections::BTreeSet, net::IpAddr};

use weft_model::{Family, NodeId, Unit};

use crate::{
    sight::Sight,
    state::{Move, State},
};

/// The next unit to lend, if a node wants one that is free: addresses asked for by number first,
/// then blocks.
pub(crate) fn next_loan(sight: &Sight<'_>, own: &State) -> Option<Move> {
    let single = || single_loan(sight, own);
    let block = |family| block_loan(sight, own, family);
    single().or_else(|| block(Family::V4)).or_else(|| block(Family::V6))
}

fn single_loan(sight: &Sight<'_>, own: &State) -> Option<Move> {
    let wanted =
        sight.wants().flat_map(|(to, want)| want.addresses.iter().map(move |&ip| (to, ip)));
    let mut lendable = wanted.filter(|&(_, ip)| {
        let unit = Unit::Address(ip);
        sight.layout.lender(unit) == Some(own.node)
            && sight.layout.is_usable(ip)
            && sight.outstanding(unit).is_none()
            && is_out_of_block(sight, ip)
    });
    let (to, ip) = lendable.next()?;
    Some(Move::Lend { unit: Unit::Address(ip), to, except: BTreeSet::new() })
}

/// Whether no borrower of the block around `ip` may use it: the block is free, it was lent
/// without the address, or the borrower has ceded the address at the present turn.
fn is_out_of_block(sight: &Sight<'_>, ip: IpAddr) -> bool {
    let Some(block) = sight.layout.block_of(ip) else { return true };
    let Some(loan) = sight.outstanding(block) else { return true };
    let hold = sight.holds(loan.to).and_then(|holds| holds.held.get(&block));
    let ceded = hold.is_some_and(|hold| hold.seq == loan.seq && hold.ceded.contains(&ip));
    ceded || loan.except.contains(&ip)
}

fn block_loan(sight: &Sight<'_>, own: &State, family: Family) -> Option<Move> {
    let Borrower { to, urgent } = next_borrower(sight, own.node, family)?;
    // Free blocks are kept for nodes in need that have asked a lender without any: they turn to
    // this one as soon as they see them.
    if !urgent && sight.free_blocks(own.node, family) <= sight.starving(family) {
        return None;
    }
    let free = |index| Some((index, sight.exceptions(family, index)?));
    let (index, except) = sight.layout.share(own.node, family).find_map(free)?;
    Some(Move::Lend { unit: Unit::Block(family, index), to, except })
}

/// Of the nodes that want more blocks than they have: those in need first, then who has fewest.
fn next_borrower(sight: &Sight<'_>, lender: NodeId, family: Family) -> Option<Borrower> {
    let borrowed = sight.borrowed(lender, family);
    let waiting = sight.wants().filter_map(|(node, want)| {
        let has = borrowed.get(&node).copied().unwrap_or(0);
        let wanted = want.blocks.get(&(lender, family)).copied().unwrap_or(0);
        let relaxed = !want.urgent.contains(&family);
        (wanted as usize > has).then_some((relaxed, has, node))
    });
    waiting.min().map(|(relaxed, _, to)| Borrower { to, urgent: !relaxed })
}

struct Borrower {
    to: NodeId,
    urgent: bool,
}
