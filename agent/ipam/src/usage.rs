use weft_model::{Family, Network, Unit};

use crate::{Layout, State, View, demand, demand::Clock, sight::Sight};

/// What a node has of one family of a network. `owned` is the sum of the next four.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Usage {
    /// Blocks held.
    pub blocks: usize,
    /// Addresses that this node may give out: of its blocks, and held singly.
    pub owned: usize,
    pub leased: usize,
    pub resting: usize,
    /// Given to whoever asks for any.
    pub free: usize,
    /// Held singly, without an endpoint yet.
    pub set_aside: usize,
}

pub(crate) fn of(network: &Network, own: &State, clock: &Clock<'_>, family: Family) -> Usage {
    let layout = Layout::of(network);
    let view = View::default();
    let sight = Sight { layout, view: &view, own: Some(own) };
    let of_blocks = own.blocks(family).flat_map(|(index, hold)| {
        layout.usable_in(family, index).filter(|ip| !hold.ceded.contains(ip))
    });
    let singles = own.holds.held.keys().filter_map(|unit| match unit {
        Unit::Address(ip) => (Family::of(*ip) == family).then_some(*ip),
        Unit::Block(..) => None,
    });
    let all: std::collections::BTreeSet<_> = of_blocks.chain(singles).collect();

    let leased = all.iter().filter(|ip| own.leases.contains_key(ip)).count();
    let rests = |ip| own.is_resting(ip, clock.rest, clock.now) && !own.leases.contains_key(&ip);
    let resting = all.iter().filter(|&&ip| rests(ip)).count();
    let free = demand::free(&sight, own, clock, family).count();
    let owned = all.len();
    let set_aside = owned - leased - resting - free;
    Usage { blocks: own.blocks(family).count(), owned, leased, resting, free, set_aside }
}
