use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::route::Via;

/// How long the first probe of a silent track is waited for; doubled with each one more.
pub(super) const FAST: Duration = Duration::from_millis(20);

/// Between the probes of a track that answers, while the pair shares traffic.
pub(super) const BUSY: Duration = Duration::from_secs(2);

/// Between the probes of a track that does not answer, at most, while the pair shares traffic.
pub(super) const SILENT: Duration = Duration::from_secs(5);

/// Between the probes of a track that answers, otherwise: NATs keep UDP mappings for 30 seconds
/// and more (RFC 4787 section 4.3 asks for two minutes, not all do).
pub(super) const IDLE: Duration = Duration::from_secs(20);

/// How long a reply is waited for on a track that used to answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(1);

/// This many probes in a row are lost, and nothing came, before a track counts as down.
const LOST: u32 = 3;

/// As many, if the peer is still heard: on a flooded path, probes are lost with everything else.
const LOST_THOUGH_HEARD: u32 = 10;

/// Longer than the peer's own probes are apart on a busy track.
const SILENCE: Duration = Duration::from_secs(3);

/// Whatever makes a track be probed sooner does so no more often than this.
const HURRY: Duration = Duration::from_secs(1);

/// Replies are taken to this many of the latest probes.
const REMEMBERED: usize = 8;

/// What is known of one way to a peer: whether it answers, and how fast.
#[derive(Debug)]
pub(super) struct Track {
    pub(super) via: Via,
    pub(super) source: Source,
    /// Whether it answered and has not failed since: it is validated.
    live: bool,
    since: Instant,
    heard: Option<Instant>,
    answered: Option<Instant>,
    probes: VecDeque<Sent>,
    /// The latest probe is not answered yet.
    waiting: bool,
    lost: u32,
    /// How many probes it had before it answered for the first time, or since it failed.
    tries: u32,
    next: Instant,
    hurried: Option<Instant>,
    rtt: Option<Rtt>,
}

/// How a track came to be known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Source {
    /// The peer's record says it.
    Record,
    /// An authentic packet came from there.
    Observed,
    /// Another node offers to relay.
    Relay,
}

#[derive(Debug)]
struct Sent {
    id: u32,
    at: Instant,
}

impl Track {
    pub(super) fn new(now: Instant, via: Via, source: Source) -> Self {
        Self {
            via,
            source,
            live: false,
            since: now,
            heard: None,
            answered: None,
            probes: VecDeque::new(),
            waiting: false,
            lost: 0,
            tries: 0,
            next: now,
            hurried: None,
            rtt: None,
        }
    }

    /// Whether it answers: only then may frames take it, while there is a choice.
    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    /// When it last became live or stopped being so.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// How many probes it did not answer, of a track that is not live.
    pub(super) fn tries(&self) -> u32 {
        self.tries
    }

    /// How many of its latest probes in a row were not answered in time.
    pub(super) fn lost(&self) -> u32 {
        self.lost
    }

    /// When an authentic packet last came over it.
    pub(super) fn heard(&self) -> Option<Instant> {
        self.heard
    }

    /// When it last answered a probe.
    pub(super) fn answered(&self) -> Option<Instant> {
        self.answered
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt.as_ref().map(|rtt| rtt.smooth)
    }

    /// When the next probe is due.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Whether a probe must be sent now. Judges the one before: a track may turn dead by it.
    ///
    /// Then send a probe and say so by [`sent`](Self::sent).
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        if now < self.next {
            return false;
        }
        if self.waiting {
            self.lost += 1;
            let silent = self.heard.is_none_or(|heard| now.duration_since(heard) >= SILENCE);
            if self.live && (self.lost >= LOST && silent || self.lost >= LOST_THOUGH_HEARD) {
                self.fail(now);
            }
        }
        true
    }

    /// Notes that the probe with `id` was sent. A silent track is probed again after a delay that
    /// doubles up to `slowest`.
    pub(super) fn sent(&mut self, now: Instant, id: u32, slowest: Duration) {
        self.remember(now, id);
        self.waiting = true;
        self.next = now
            + match self.live {
                true => self.rtt.as_ref().map_or(TIMEOUT, Rtt::timeout),
                false => {
                    let doubled = FAST.saturating_mul(1 << self.tries.min(20));
                    self.tries += 1;
                    doubled.min(slowest)
                }
            };
    }

    /// Lets a reply to the probe with `id` count that was sent over this track for another reason.
    pub(super) fn remember(&mut self, now: Instant, id: u32) {
        if self.probes.len() == REMEMBERED {
            self.probes.pop_front();
        }
        self.probes.push_back(Sent { id, at: now });
    }

    /// Takes a reply if it is to one of this track's latest probes.
    pub(super) fn reply(&mut self, now: Instant, id: u32, cadence: Duration) -> bool {
        let Some(at) = self.probes.iter().position(|sent| sent.id == id) else { return false };
        let sent = self.probes.remove(at).expect("the position is that of a probe").at;
        let sample = now.saturating_duration_since(sent);
        match &mut self.rtt {
            Some(rtt) => rtt.add(sample),
            None => self.rtt = Some(Rtt { smooth: sample, deviation: sample / 2 }),
        }
        if !self.live {
            (self.live, self.since) = (true, now);
        }
        (self.waiting, self.lost, self.tries) = (false, 0, 0);
        (self.heard, self.answered) = (Some(now), Some(now));
        self.next = now + cadence;
        true
    }

    /// Notes that an authentic packet came over it.
    pub(super) fn hear(&mut self, now: Instant) {
        self.heard = Some(now);
        if !self.live {
            self.hurry(now);
        }
    }

    /// Has it probed at once, and fast if it is silent.
    pub(super) fn hurry(&mut self, now: Instant) {
        let lately = |at: Instant| now.saturating_duration_since(at) < HURRY;
        if self.hurried.is_some_and(lately) || self.waiting && self.live {
            return;
        }
        self.hurried = Some(now);
        self.next = now;
        self.tries = 0;
    }

    /// Brings the next probe forward if there are to be more of them from now on.
    pub(super) fn keep_pace(&mut self, now: Instant, slowest: Duration) {
        self.next = self.next.min(now + slowest);
    }

    /// Notes that the socket could not send over it: the probe is lost, and need not be waited
    /// for.
    pub(super) fn unreachable(&mut self, now: Instant) {
        if self.waiting {
            self.next = self.next.min(now + FAST);
        }
    }

    fn fail(&mut self, now: Instant) {
        (self.live, self.since, self.tries) = (false, now, 0);
    }
}

/// Round-trip time (RFC 6298 section 2).
#[derive(Debug)]
struct Rtt {
    smooth: Duration,
    deviation: Duration,
}

impl Rtt {
    fn add(&mut self, sample: Duration) {
        self.deviation = (self.deviation * 3 + self.smooth.abs_diff(sample)) / 4;
        self.smooth = (self.smooth * 7 + sample) / 8;
    }

    fn timeout(&self) -> Duration {
        (self.smooth + self.deviation * 4).clamp(TIMEOUT, 3 * TIMEOUT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_are_smoothed() {
        let mut rtt = Rtt { smooth: Duration::from_millis(80), deviation: Duration::ZERO };
        rtt.add(Duration::from_millis(160));
        assert_eq!(rtt.smooth, Duration::from_millis(90));
        assert_eq!(rtt.deviation, Duration::from_millis(20));
        assert_eq!(rtt.timeout(), TIMEOUT);
    }
}
