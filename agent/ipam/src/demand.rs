use std::{collections::BTreeMap, net::IpAddr};

use weft_model::{EndpointId, Family, NodeId, Unit, WantRecord};

use crate::{
    sight::{Need, Sight},
    state::State,
};

/// What an endpoint asks for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Ask {
    /// Any address of the family, out of the dynamic range.
    Any(Family),
    /// This very address, from anywhere in the subnet.
    Fixed(IpAddr),
}

impl Ask {
    pub fn family(self) -> Family {
        match self {
            Self::Any(family) => family,
            Self::Fixed(ip) => Family::of(ip),
        }
    }
}

/// The asks that could not be met at once, with the time of the last try. Not kept over a
/// restart: who still waits will ask again.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub(crate) struct Requests(pub(crate) BTreeMap<(EndpointId, Family), (Ask, u64)>);

impl Requests {
    pub(crate) fn names(&self, ip: IpAddr) -> bool {
        self.0.values().any(|(ask, _)| *ask == Ask::Fixed(ip))
    }

    fn fixed(&self) -> impl Iterator<Item = IpAddr> {
        self.0.values().filter_map(|(ask, _)| match ask {
            Ask::Fixed(ip) => Some(*ip),
            Ask::Any(_) => None,
        })
    }

    fn any(&self, family: Family) -> usize {
        self.0.values().filter(|(ask, _)| *ask == Ask::Any(family)).count()
    }
}

/// The local clock and its limits, in seconds. Nothing that others see depends on it.
pub(crate) struct Clock<'a> {
    pub(crate) now: u64,
    pub(crate) rest: u64,
    pub(crate) idle: u64,
    /// Since when each held block is without a lease.
    pub(crate) quiet_since: &'a BTreeMap<Unit, u64>,
}

impl Clock<'_> {
    pub(crate) fn quiet_for(&self, unit: Unit) -> u64 {
        self.quiet_since.get(&unit).map_or(0, |&since| self.now.saturating_sub(since))
    }
}

/// What this node has and needs of one family, in addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    pub(crate) free: usize,
    /// Endpoints that wait for any address.
    pub(crate) pending: usize,
    /// Free addresses to keep at hand: a quarter of a block and at least one, so that the next
    /// block is asked for before it is needed. None where the pool has fewer blocks than there
    /// are nodes: a reserve here would be missing elsewhere.
    pub(crate) reserve: usize,
}

impl Demand {
    pub(crate) fn of(
        sight: &Sight<'_>,
        own: &State,
        requests: &Requests,
        clock: &Clock<'_>,
        family: Family,
    ) -> Self {
        let Some(blocks) = sight.layout.blocks(family) else {
            return Self { free: 0, pending: 0, reserve: 0 };
        };
        let nodes = sight.view.live.iter().filter(|&&node| node != own.node).count() + 1;
        let plenty = sight.layout.usable_blocks(family) >= nodes;
        let reserve = if plenty { (blocks.size() as usize / 4).max(1) } else { 0 };
        let free = free(sight, own, clock, family).count();
        Self { free, pending: requests.any(family), reserve }
    }
}

/// The addresses of held blocks that can be given to whoever asks for any.
pub(crate) fn free<'a>(
    sight: &'a Sight<'_>,
    own: &'a State,
    clock: &'a Clock<'_>,
    family: Family,
) -> impl Iterator<Item = (IpAddr, Unit, u64)> + 'a {
    own.blocks(family).flat_map(move |(index, hold)| {
        let addresses = sight.layout.usable_in(family, index);
        let free = addresses.filter(move |ip| {
            !hold.ceded.contains(ip)
                && !own.leases.contains_key(ip)
                && !own.is_resting(*ip, clock.rest, clock.now)
        });
        free.map(move |ip| (ip, Unit::Block(family, index), hold.seq))
    })
}

/// What to ask of the lenders: the blocks held now, as many more as demand and reserve need, and
/// the addresses that were asked for by number.
///
/// A block for the reserve is asked only of a lender that can spare one after all other wants; a
/// block that an endpoint waits for is asked in any case, marked urgent.
pub(crate) fn wants(
    sight: &Sight<'_>,
    own: &State,
    requests: &Requests,
    clock: &Clock<'_>,
) -> WantRecord {
    let held = |ip| own.holder_of(sight.layout.network(), ip).is_some();
    let mut wants = WantRecord {
        addresses: requests.fixed().filter(|&ip| !held(ip)).collect(),
        ..WantRecord::default()
    };
    for family in [Family::V4, Family::V6] {
        let Some(blocks) = sight.layout.blocks(family) else { continue };
        let demand = Demand::of(sight, own, requests, clock, family);
        let per_block = blocks.size() as usize;
        let missing = |addresses: usize| addresses.saturating_sub(demand.free).div_ceil(per_block);
        let needed = missing(demand.pending);
        let wished = missing(demand.pending + demand.reserve);
        if needed > 0 {
            wants.urgent.insert(family);
        }
        for (index, _) in own.blocks(family) {
            if let Some(lender) = sight.layout.lender(Unit::Block(family, index)) {
                *wants.blocks.entry((lender, family)).or_default() += 1;
            }
        }
        for lender in choose(sight, own, family, needed, wished) {
            *wants.blocks.entry((lender, family)).or_default() += 1;
        }
    }
    wants
}

/// Whom to ask for each further block: the first lender, in this node's order, that answers and
/// can spare one; for a needed block failing that one that has any, then one that answers, then
/// the first of all, which hears of it when it is back.
fn choose(
    sight: &Sight<'_>,
    own: &State,
    family: Family,
    needed: usize,
    wished: usize,
) -> Vec<NodeId> {
    if wished == 0 {
        return Vec::new();
    }
    let order = sight.layout.lenders_for(own.node);
    let revoked = |lender: &NodeId| sight.view.revoked.contains(lender);
    let order: Vec<NodeId> = order.into_iter().filter(|lender| !revoked(lender)).collect();
    let mut stock: Vec<Stock> = order
        .iter()
        .filter(|&&lender| sight.answers(lender))
        .map(|&lender| {
            let free = sight.free_blocks(lender, family);
            let spare = free.saturating_sub(sight.unmet(lender, family, Need::Any));
            Stock { lender, free, spare }
        })
        .collect();
    // Who starves at one lender will turn to the others, so a reserve must leave that many.
    let spare: usize = stock.iter().map(|stock| stock.spare).sum();
    let wished = wished.min(needed.max(spare.saturating_sub(sight.starving(family))));
    let answering = stock.first().map(|stock| stock.lender).or_else(|| order.first().copied());

    let mut chosen = Vec::new();
    for turn in 0..wished {
        let spare = stock.iter().position(|stock| stock.spare > 0);
        let any = || stock.iter().position(|stock| stock.free > 0);
        let place = spare.or_else(|| if turn < needed { any() } else { None });
        match place {
            Some(place) => {
                stock[place].free -= 1;
                stock[place].spare = stock[place].spare.saturating_sub(1);
                chosen.push(stock[place].lender);
            }
            None if turn < needed => chosen.extend(answering),
            None => break,
        }
    }
    chosen
}

struct Stock {
    lender: NodeId,
    free: usize,
    spare: usize,
}
