use std::time::Duration;

/// The periods of a carrier. The defaults suit hosts of one site.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long one attempt to reach a peer may take.
    pub dial: Duration,
    /// The longest wait between two attempts, while there is something to send.
    pub retry: Duration,
    /// The same where the other side refuses: what it objects to takes a person to change.
    pub retry_refused: Duration,
    /// How often an idle connection shows that it lives.
    pub keep_alive: Duration,
    /// Without any packet for so long a connection is lost.
    pub silence: Duration,
    /// The round trip to assume before one has been measured; retransmissions begin at about
    /// three times that.
    pub initial_rtt: Duration,
    /// Without a message for so long a connection is closed, and without success a peer that
    /// nothing more is sent to is given up.
    pub idle: Duration,
    /// How long one of two connections that were made at the same moment stays open for what is
    /// under way.
    pub linger: Duration,
    /// The age at which whoever has dialled a connection replaces it by a new one, so that the keys
    /// derived from it are replaced; up to a quarter sooner, so that many do not come at once.
    pub session_age: Duration,
    /// How long a connection that was replaced stays open: what was sealed under its keys arrives.
    pub overlap: Duration,
    /// The longest wait between two attempts to reach a peer directly to which there is a detour,
    /// and between two attempts to replace a connection that works.
    pub retry_direct: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            dial: Duration::from_secs(1),
            retry: Duration::from_millis(500),
            retry_refused: Duration::from_secs(2),
            keep_alive: Duration::from_secs(1),
            silence: Duration::from_secs(4),
            initial_rtt: Duration::from_millis(30),
            // Gossip speaks to each of 500 peers every 40 s on average: connections stay.
            idle: Duration::from_secs(300),
            linger: Duration::from_secs(1),
            session_age: Duration::from_secs(3600),
            overlap: Duration::from_secs(30),
            retry_direct: Duration::from_secs(15),
        }
    }
}

impl Timing {
    /// The age at which to replace a connection whose certificates last for `remaining`; `chance`
    /// is drawn evenly from 0 to 1. Before the first of them expires there is time for another
    /// attempt, by when the owner may have a newer one.
    pub(super) fn lasts(&self, remaining: time::Duration, chance: f64) -> Duration {
        let remaining = Duration::try_from(remaining).unwrap_or_default();
        let longest = self.session_age.min(remaining * 2 / 3).max(SHORTEST_AGE);
        longest.mul_f64(0.75 + 0.25 * chance.clamp(0.0, 1.0))
    }
}

/// The wait before the next attempt: doubles from [`FIRST`] up to a limit, and is shortened by up
/// to half so that many peers of one that returns do not come at the same moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackOff {
    attempts: u32,
}

impl BackOff {
    /// The next wait; `chance` is drawn evenly from 0 to 1.
    pub(super) fn next(&mut self, limit: Duration, chance: f64) -> Duration {
        let full = FIRST.saturating_mul(1 << self.attempts.min(16)).min(limit);
        self.attempts = self.attempts.saturating_add(1);
        full.mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
    }

    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }
}

const FIRST: Duration = Duration::from_millis(50);
const SHORTEST_AGE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_replaced_within_the_last_quarter_of_an_hour() {
        let timing = Timing::default();
        let minutes = |chance| timing.lasts(time::Duration::days(9), chance).as_secs() / 60;
        assert_eq!([0.0, 0.5, 1.0].map(minutes), [45, 52, 60]);
    }

    #[test]
    fn there_is_time_to_try_again_before_a_certificate_expires() {
        let timing = Timing::default();
        let mut remaining = time::Duration::minutes(30);
        let mut attempts = 0;
        while remaining > time::Duration::SECOND {
            let lasts = timing.lasts(remaining, 1.0);
            assert!(lasts < remaining);
            remaining -= lasts;
            attempts += 1;
        }
        assert_eq!(attempts, 7);
        assert_eq!(timing.lasts(time::Duration::MINUTE * -1, 1.0), SHORTEST_AGE);
    }

    #[test]
    fn waits_double_up_to_the_limit_and_begin_anew_after_success() {
        let mut back_off = BackOff::default();
        let limit = Duration::from_millis(500);
        let waits: Vec<_> = (0..6).map(|_| back_off.next(limit, 1.0).as_millis()).collect();
        assert_eq!(waits, [50, 100, 200, 400, 500, 500]);
        back_off.reset();
        assert_eq!(back_off.next(limit, 0.0), Duration::from_millis(25));
    }
}
