use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use weft_model::NodeId;

/// How long a relay that failed for a peer is passed over at first; doubled each time.
const PENALTY: Duration = Duration::from_secs(2);

const LONGEST_PENALTY: Duration = Duration::from_secs(60);

/// How long a node counts as the one that the peer itself uses, since it was heard through it.
const HINT: Duration = Duration::from_secs(60);

/// A member that offers to relay and is reached directly.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Offer {
    /// The largest sealed packet on the way to it.
    pub(super) packet: u16,
    pub(super) rtt: Option<Duration>,
}

/// Which relays were no good for one peer, and which one it uses itself.
#[derive(Debug, Default)]
pub(super) struct Choice {
    penalties: BTreeMap<NodeId, Penalty>,
    hint: Option<(NodeId, Instant)>,
}

#[derive(Clone, Copy, Debug)]
struct Penalty {
    until: Instant,
    length: Duration,
}

impl Choice {
    /// Notes that `relay` does not reach the peer.
    pub(super) fn penalise(&mut self, now: Instant, relay: NodeId) {
        let before = self.penalties.get(&relay);
        let length = before.map_or(PENALTY, |before| (before.length * 2).min(LONGEST_PENALTY));
        self.penalties.insert(relay, Penalty { until: now + length, length });
        self.hint = self.hint.filter(|&(hint, _)| hint != relay);
    }

    /// Notes that `relay` passes packets on, in the direction to the peer.
    pub(super) fn works(&mut self, relay: NodeId) {
        self.penalties.remove(&relay);
    }

    /// Lets all relays be tried again at once.
    pub(super) fn forgive(&mut self) {
        self.penalties.clear();
    }

    /// Notes that packets of the peer come through `relay`: they will in the other direction, too.
    pub(super) fn heard(&mut self, now: Instant, relay: NodeId) {
        self.hint = Some((relay, now));
    }

    /// The relay to try.
    pub(super) fn best(&self, now: Instant, offers: &BTreeMap<NodeId, Offer>) -> Option<NodeId> {
        self.order(now, offers).into_iter().find(|relay| !self.is_penalised(now, *relay))
    }

    /// All relays, the likeliest to work first: the one that the peer uses, then the nearest. Those
    /// that failed lately come last.
    pub(super) fn order(&self, now: Instant, offers: &BTreeMap<NodeId, Offer>) -> Vec<NodeId> {
        let hint = self
            .hint
            .filter(|&(_, at)| now.saturating_duration_since(at) < HINT)
            .map(|(relay, _)| relay);
        let mut relays: Vec<_> = offers
            .iter()
            .map(|(&relay, offer)| {
                let failed = self.is_penalised(now, relay);
                (failed, Some(relay) != hint, offer.rtt.is_none(), offer.rtt, relay)
            })
            .collect();
        relays.sort_unstable();
        relays.into_iter().map(|(.., relay)| relay).collect()
    }

    fn is_penalised(&self, now: Instant, relay: NodeId) -> bool {
        self.penalties.get(&relay).is_some_and(|penalty| now < penalty.until)
    }
}

/// Why a packet is not passed on. Only [`Off`](Self::Off), [`Stranger`](Self::Stranger) and
/// [`NoDirectPath`](Self::NoDirectPath) are worth an [`unrelayable`](super::unrelayable) answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Unrelayed {
    #[error("this node does not relay")]
    Off,
    #[error("the packet was relayed already: it may be once only")]
    Again,
    #[error("the packet is for its own sender, or for this node")]
    Loop,
    #[error("node {0} is not known here")]
    Stranger(NodeId),
    #[error("this node has no direct path to node {0}")]
    NoDirectPath(NodeId),
    #[error("{len} bytes are more than the {packet} that get through to node {node}")]
    TooBig { node: NodeId, len: usize, packet: u16 },
}

impl Unrelayed {
    /// Whether the asker should be told, so that it tries another relay.
    pub fn is_answered(self) -> bool {
        match self {
            Self::Off | Self::Stranger(_) | Self::NoDirectPath(_) => true,
            Self::Again | Self::Loop | Self::TooBig { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_own_relay_comes_first_then_the_nearest_and_failed_ones_wait() {
        let now = Instant::now();
        let node = |byte| NodeId::from([byte; 16]);
        let offer = |ms: Option<u64>| Offer { packet: 1472, rtt: ms.map(Duration::from_millis) };
        let offers = BTreeMap::from([
            (node(1), offer(None)),
            (node(2), offer(Some(30))),
            (node(3), offer(Some(10))),
            (node(4), offer(Some(90))),
        ]);
        let mut choice = Choice::default();
        assert_eq!(choice.order(now, &offers), [3, 2, 4, 1].map(node));
        choice.heard(now, node(4));
        assert_eq!(choice.order(now, &offers), [4, 3, 2, 1].map(node));
        choice.penalise(now, node(3));
        choice.penalise(now, node(4));
        assert_eq!(choice.order(now, &offers), [2, 1, 3, 4].map(node));
        assert_eq!(choice.order(now + PENALTY, &offers), [3, 2, 4, 1].map(node));
        choice.penalise(now, node(3));
        assert_eq!(choice.order(now + PENALTY, &offers), [2, 4, 1, 3].map(node));
        choice.works(node(3));
        assert_eq!(choice.best(now, &offers), Some(node(3)));
    }

    #[test]
    fn a_relay_that_failed_is_not_tried_before_its_time_is_over_unless_it_is_forgiven() {
        let now = Instant::now();
        let relay = NodeId::from([1; 16]);
        let offers = BTreeMap::from([(relay, Offer { packet: 1472, rtt: None })]);
        let mut choice = Choice::default();
        for length in [2, 4, 8, 16, 32, 60, 60].map(Duration::from_secs) {
            choice.penalise(now, relay);
            assert_eq!(choice.best(now + length - Duration::from_millis(1), &offers), None);
            assert_eq!(choice.best(now + length, &offers), Some(relay));
        }
        choice.forgive();
        assert_eq!(choice.best(now, &offers), Some(relay));
    }
}
