use std::collections::BTreeSet;

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
        sight.layout.lender(Unit::Address(ip)) == Some(own.node)
            && sight.layout.is_usable(ip)
            && sight.borrower_of(ip).is_none()
    });
    let (to, ip) = lendable.next()?;
    Some(Move::Lend { unit: Unit::Address(ip), to, except: BTreeSet::new() })
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
