use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    time::Duration,
};

use tokio::time::Instant;
use weft_model::NodeId;

/// Decides who is alive, from when each peer was last heard (by a message of its own, or by a
/// heartbeat of its that others passed on).
///
/// chitchat's own detector is not asked: it divides the silence by the mean interval between
/// heartbeats, which shrinks to tens of milliseconds in a small cluster and grows with a large one,
/// so no threshold serves both; and when its own task stalls, all peers look dead.
///
/// Two things withhold verdicts for a while: a stall of this agent, and many peers that fall silent
/// at the same time, which is more likely a fault of our own. A silence that outlasts the pause is
/// believed.
#[derive(Debug)]
pub(crate) struct Detector {
    timing: DetectorTiming,
    heard: BTreeMap<NodeId, Instant>,
    suspects: BTreeSet<NodeId>,
    last_tick: Instant,
    frozen_until: Option<Instant>,
    /// The mass silence that caused the last pause, still going on.
    mass_silence: bool,
}

/// The detector's durations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DetectorTiming {
    /// Between two calls of [`Detector::tick`].
    pub(crate) tick: Duration,
    /// How late a tick may be before this agent distrusts itself; also half of the pause.
    pub(crate) interval: Duration,
    /// The silence after which a peer is suspect.
    pub(crate) suspect_after: Duration,
}

/// What one tick found.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) suspects: Vec<NodeId>,
    /// A pause has begun.
    pub(crate) froze: bool,
}

impl Detector {
    pub(crate) fn new(timing: DetectorTiming, now: Instant) -> Self {
        Self {
            timing,
            heard: BTreeMap::new(),
            suspects: BTreeSet::new(),
            last_tick: now,
            frozen_until: None,
            mass_silence: false,
        }
    }

    /// Notes a sign of life. Returns whether the peer was not alive before.
    pub(crate) fn heard(&mut self, node: NodeId, now: Instant) -> bool {
        let known = self.heard.insert(node, now).is_some();
        let suspect = self.suspects.remove(&node);
        !known || suspect
    }

    /// Notes a peer of which others have spoken. Returns whether it was not known.
    pub(crate) fn mentioned(&mut self, node: NodeId, now: Instant) -> bool {
        let Entry::Vacant(vacant) = self.heard.entry(node) else { return false };
        vacant.insert(now);
        self.suspects.insert(node)
    }

    pub(crate) fn is_alive(&self, node: NodeId) -> bool {
        self.heard.contains_key(&node) && !self.suspects.contains(&node)
    }

    pub(crate) fn alive(&self) -> impl Iterator<Item = NodeId> {
        self.heard.keys().copied().filter(|node| !self.suspects.contains(node))
    }

    /// How many peers there are, alive or not.
    pub(crate) fn known(&self) -> usize {
        self.heard.len()
    }

    pub(crate) fn suspects(&self) -> impl Iterator<Item = NodeId> {
        self.suspects.iter().copied()
    }

    /// How long ago the peer was heard or first mentioned.
    pub(crate) fn silence(&self, node: NodeId, now: Instant) -> Option<Duration> {
        self.heard.get(&node).map(|&heard| now.duration_since(heard))
    }

    pub(crate) fn forget(&mut self, node: NodeId) {
        self.heard.remove(&node);
        self.suspects.remove(&node);
    }

    /// Finds who has become suspect. To be called every [`DetectorTiming::tick`].
    pub(crate) fn tick(&mut self, now: Instant) -> Verdict {
        let DetectorTiming { tick, interval, suspect_after } = self.timing;
        let late = now.duration_since(self.last_tick).saturating_sub(tick);
        self.last_tick = now;
        if late > 2 * interval {
            // Nobody was listened to in that time.
            for heard in self.heard.values_mut() {
                *heard = now.min(*heard + late);
            }
            return self.freeze(now);
        }
        if self.frozen_until.is_some_and(|until| now < until) {
            return Verdict::default();
        }

        // Looked for one interval early, so that the pause costs only one interval.
        let quiet = self.silent_for(suspect_after.saturating_sub(interval), now).len();
        let alive = self.alive().count();
        if quiet == 0 {
            self.mass_silence = false;
        } else if alive >= MASS_FROM_PEERS && 3 * quiet > alive && !self.mass_silence {
            self.mass_silence = true;
            return self.freeze(now);
        }
        let suspects = self.silent_for(suspect_after, now);
        self.suspects.extend(&suspects);
        Verdict { suspects, froze: false }
    }

    /// The peers, alive so far, that were not heard for `span`.
    fn silent_for(&self, span: Duration, now: Instant) -> Vec<NodeId> {
        let silent =
            |node: &NodeId| self.silence(*node, now).is_some_and(|silence| silence >= span);
        self.alive().filter(silent).collect()
    }

    fn freeze(&mut self, now: Instant) -> Verdict {
        self.frozen_until = Some(now + 2 * self.timing.interval);
        Verdict { suspects: Vec::new(), froze: true }
    }
}

/// Fewer peers than this fall silent together by chance.
const MASS_FROM_PEERS: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: DetectorTiming = DetectorTiming {
        tick: Duration::from_millis(100),
        interval: Duration::from_millis(500),
        suspect_after: Duration::from_secs(3),
    };

    #[test]
    fn a_silent_peer_is_suspect_after_the_set_time_and_alive_at_the_first_sign() {
        let mut clock = Clock::new();
        clock.hear([1, 2, 3, 4]);
        let suspects = clock.run(Duration::from_secs(3), &[2, 3, 4]);
        assert_eq!(suspects, [(Duration::from_secs(3), vec![node(1)])]);
        assert!(!clock.detector.is_alive(node(1)));
        assert!(clock.detector.heard(node(1), clock.now));
        assert!(clock.detector.is_alive(node(1)));
    }

    #[test]
    fn a_stall_of_our_own_accuses_nobody() {
        let mut clock = Clock::new();
        clock.hear([1, 2]);
        clock.now += Duration::from_secs(60);
        assert!(clock.detector.tick(clock.now).froze);
        assert_eq!(clock.run(Duration::from_secs(2), &[]), []);
        clock.hear([1, 2]);
        assert_eq!(clock.run(Duration::from_secs(10), &[1, 2]), []);
    }

    #[test]
    fn many_silent_at_once_are_believed_only_when_it_lasts() {
        let mut clock = Clock::new();
        clock.hear([1, 2, 3, 4]);
        let verdicts = clock.run(Duration::from_millis(4500), &[3, 4]);
        assert_eq!(verdicts, [(Duration::from_millis(3500), vec![node(1), node(2)])]);
        assert_eq!(clock.frozen, 1);
    }

    #[test]
    fn a_peer_that_was_only_mentioned_is_suspect_until_it_is_heard() {
        let mut clock = Clock::new();
        clock.detector.mentioned(node(1), clock.now);
        assert!(!clock.detector.is_alive(node(1)));
        assert!(clock.detector.heard(node(1), clock.now));
        clock.detector.mentioned(node(1), clock.now);
        assert!(clock.detector.is_alive(node(1)));
    }

    struct Clock {
        detector: Detector,
        start: Instant,
        now: Instant,
        frozen: usize,
    }

    impl Clock {
        fn new() -> Self {
            let now = Instant::now();
            Self { detector: Detector::new(TIMING, now), start: now, now, frozen: 0 }
        }

        fn hear<const N: usize>(&mut self, nodes: [u8; N]) {
            for n in nodes {
                self.detector.heard(node(n), self.now);
            }
        }

        /// Ticks for `span`, while `talking` are heard at each tick. Returns who became suspect
        /// and how long after the start.
        fn run(&mut self, span: Duration, talking: &[u8]) -> Vec<(Duration, Vec<NodeId>)> {
            let end = self.now + span;
            let mut found = Vec::new();
            while self.now < end {
                self.now += TIMING.tick;
                for &n in talking {
                    self.detector.heard(node(n), self.now);
                }
                let verdict = self.detector.tick(self.now);
                self.frozen += usize::from(verdict.froze);
                if !verdict.suspects.is_empty() {
                    found.push((self.now - self.start, verdict.suspects));
                }
            }
            found
        }
    }

    fn node(n: u8) -> NodeId {
        NodeId::from([n; 16])
    }
}
