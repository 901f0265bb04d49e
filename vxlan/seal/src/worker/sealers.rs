use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use crate::{
    DropReason,
    key::{Lane, Limits, RootId, Sealer},
    routes::{Route, Routes},
};

/// What one lane has borrowed from the roots that are sent with.
pub(super) struct Sealers {
    lane: Lane,
    limits: Limits,
    by_root: BTreeMap<RootId, Sealer>,
}

impl Sealers {
    pub(super) fn new(lane: usize, limits: Limits) -> Self {
        let lane = u8::try_from(lane).ok().and_then(|lane| Lane::try_from(lane).ok());
        let lane = lane.expect("a tunnel has no more lanes than a session");
        Self { lane, limits, by_root: BTreeMap::new() }
    }

    #[inline]
    pub(super) fn of(&mut self, route: &Route) -> Result<&mut Sealer, DropReason> {
        match self.by_root.entry(route.root.id()) {
            Entry::Occupied(sealer) => Ok(sealer.into_mut()),
            Entry::Vacant(place) => route
                .root
                .sealer(self.lane, route.suite, self.limits)
                .map(|sealer| place.insert(sealer))
                .map_err(|_| DropReason::NoKey),
        }
    }

    /// Gives back the lane, counter and all, of roots that are sent with no longer.
    pub(super) fn retain(&mut self, routes: &Routes) {
        let used: BTreeSet<_> =
            routes.peers.values().flatten().map(|route| (route.root.id(), route.suite)).collect();
        self.by_root.retain(|root, sealer| used.contains(&(*root, sealer.suite())));
    }
}
