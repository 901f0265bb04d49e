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
        self.held.iter().reduce(|kept, newer| match prefers_newer(self.own, kept, newer) {
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

fn prefers_newer(own: NodeId, kept: &Held, newer: &Held) -> bool {
    let (kept, newer) = (&kept.link, &newer.link);
    if kept.detoured != newer.detoured {
        return kept.detoured;
    }
    let crossed =
        kept.dialled != newer.dialled && newer.since.duration_since(kept.since) < CROSSING;
    let smaller = own.min(newer.peer.node);
    !crossed || newer.dialler(own) == smaller
}

/// Connections that were made within this time of one another were dialled at the same time.
const CROSSING: Duration = Duration::from_secs(2);
/// How much longer the accepting end of a surplus connection waits before it closes it.
const DIALLER_FIRST: Duration = Duration::from_secs(5);
