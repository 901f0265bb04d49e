use std::time::Duration;

use tokio::time::Instant;
use weft_model::NodeId;

use super::{link::Link, timing::Timing};

/// The live connections with one member, in the order of their making.
#[derive(Debug)]
pub(super) struct Links {
    own: NodeId,
    held: Vec<Held>,
}

#[derive(Debug)]
struct Held {
    link: Link,
    /// When to make another in its place.
    renew_at: Instant,
    /// When to close it, since another is used.
    close_at: Option<Instant>,
}

impl Links {
    /// The connections of the node `own`: none.
    pub(super) fn new(own: NodeId) -> Self {
        Self { own, held: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Link> {
        self.held.iter().map(|held| &held.link)
    }

    /// Takes `link` in. `lasts` is the age at which it is to be replaced.
    pub(super) fn add(&mut self, link: Link, lasts: Duration, timing: &Timing) {
        let renew_at = link.since + lasts;
        self.held.push(Held { link, renew_at, close_at: None });
        self.settle(timing);
    }

    pub(super) fn remove(&mut self, id: usize, timing: &Timing) -> Option<Link> {
        let index = self.held.iter().position(|held| held.link.id() == id)?;
        let held = self.held.remove(index);
        self.settle(timing);
        Some(held.link)
    }

    /// The connection to use.
    ///
    /// A direct one before a detoured one. Of several the newest, because whoever dials while there
    /// is one means to replace it, or does not know of it any more; except where both ends have
    /// dialled at the same time: then both keep that of the smaller node id.
    pub(super) fn preferred(&self) -> Option<&Link> {
        self.used().map(|held| &held.link)
    }

    /// The connection to use first, then the others.
    pub(super) fn by_preference(&self) -> Vec<Link> {
        let Some(first) = self.preferred() else { return Vec::new() };
        let others = self.iter().filter(|link| link.id() != first.id());
        [first].into_iter().chain(others).cloned().collect()
    }

    /// When this side is to replace the connection in use.
    pub(super) fn renew_at(&self) -> Option<Instant> {
        self.used().filter(|held| held.link.dialled).map(|held| held.renew_at)
    }

    pub(super) fn next_close(&self) -> Option<Instant> {
        self.held.iter().filter_map(|held| held.close_at).min()
    }

    /// Closes those that are of no more use.
    pub(super) fn close_surplus(&mut self, now: Instant) {
        for held in self.held.iter_mut().filter(|held| held.close_at.is_some_and(|at| at <= now)) {
            held.link.close("closed: another connection is used");
            // Its end is noticed long before.
            held.close_at = Some(now + DIALLER_FIRST);
        }
    }

    fn used(&self) -> Option<&Held> {
        let facts = |held: &Held| Facts::of(&held.link, self.own);
        self.held.iter().reduce(|kept, newer| match facts(kept).yields_to(facts(newer)) {
            true => newer,
            false => kept,
        })
    }

    /// Gives those that are not used the time in which what is under way on them arrives.
    fn settle(&mut self, timing: &Timing) {
        let now = Instant::now();
        let used = self.preferred().map(Link::id);
        for held in &mut self.held {
            if Some(held.link.id()) == used {
                held.close_at = None;
                continue;
            }
            // Nothing can have been sealed under the keys of one that is so young.
            let young = now.duration_since(held.link.since) < CROSSING;
            let wait = if young { timing.linger } else { timing.overlap };
            // The dialler closes: it knows by then that both ends have the other.
            let patience = if held.link.dialled { Duration::ZERO } else { DIALLER_FIRST };
            held.close_at.get_or_insert(now + wait + patience);
        }
    }
}

/// What decides which of two connections with one peer is used.
#[derive(Clone, Copy, Debug)]
struct Facts {
    dialler: NodeId,
    acceptor: NodeId,
    since: Instant,
    detoured: bool,
}

impl Facts {
    fn of(link: &Link, own: NodeId) -> Self {
        let (dialler, acceptor) = match link.dialled {
            true => (own, link.peer.node),
            false => (link.peer.node, own),
        };
        Self { dialler, acceptor, since: link.since, detoured: link.detoured }
    }

    /// Whether to use `newer` rather than this one.
    fn yields_to(self, newer: Self) -> bool {
        if self.detoured != newer.detoured {
            return self.detoured;
        }
        let crossed =
            self.dialler != newer.dialler && newer.since.duration_since(self.since) < CROSSING;
        !crossed || newer.dialler < newer.acceptor
    }
}

/// Connections that were made within this time of one another were dialled at the same time.
const CROSSING: Duration = Duration::from_secs(2);
/// How much longer the accepting end of a surplus connection waits before it closes it.
const DIALLER_FIRST: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_keep_the_smaller_nodes_of_two_that_crossed_in_whatever_order() {
        let now = Instant::now();
        let (mine, theirs) = (dialled(1, 2, now), dialled(2, 1, now + CROSSING / 2));
        assert!(!mine.yields_to(theirs));
        let (theirs, mine) = (dialled(2, 1, now), dialled(1, 2, now + CROSSING / 2));
        assert!(theirs.yields_to(mine));
    }

    #[test]
    fn a_later_connection_replaces_an_older_one_whoever_dials() {
        let now = Instant::now();
        for (first, second) in [(1, 2), (2, 1)] {
            let old = dialled(1, 2, now);
            assert!(old.yields_to(dialled(first, second, now + CROSSING)));
        }
        assert!(dialled(2, 1, now).yields_to(dialled(2, 1, now)), "made anew by the same");
    }

    #[test]
    fn a_direct_connection_is_used_before_a_detoured_one_of_any_age() {
        let now = Instant::now();
        let direct = dialled(1, 2, now);
        let detoured = Facts { detoured: true, ..dialled(2, 1, now + 2 * CROSSING) };
        assert!(!direct.yields_to(detoured));
        assert!(Facts { since: now, ..detoured }.yields_to(direct));
    }

    fn dialled(dialler: u8, acceptor: u8, since: Instant) -> Facts {
        let [dialler, acceptor] = [dialler, acceptor].map(|n| NodeId::from([n; 16]));
        Facts { dialler, acceptor, since, detoured: false }
    }
}
