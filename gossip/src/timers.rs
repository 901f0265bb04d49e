use std::time::Duration;

use tokio::time::Instant;

/// When the replicator has to do what no event brings.
#[derive(Debug)]
pub(crate) struct Timers {
    /// The next reading of chitchat's state.
    pub(crate) scan: Option<Instant>,
    pub(crate) last_scan: Instant,
    pub(crate) round: Instant,
    /// When chitchat starts (again).
    pub(crate) start: Option<Instant>,
    started: Instant,
    back_off: Duration,
}

impl Timers {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            scan: None,
            last_scan: now,
            round: now,
            start: Some(now),
            started: now,
            back_off: FIRST_BACK_OFF,
        }
    }

    pub(crate) fn want_scan(&mut self, now: Instant) {
        let earliest = (self.last_scan + SCAN_PAUSE).max(now);
        self.scan.get_or_insert(earliest);
    }

    /// Chitchat runs.
    pub(crate) fn has_started(&mut self, now: Instant) {
        self.started = now;
    }

    /// Starts chitchat again later, and the later the more often it has ended soon.
    pub(crate) fn restart(&mut self, now: Instant) {
        if now.duration_since(self.started) > LONG_RUN {
            self.back_off = FIRST_BACK_OFF;
        }
        self.start = Some(now + self.back_off);
        self.back_off = (2 * self.back_off).min(LAST_BACK_OFF);
    }
}

/// Between two readings of chitchat's state: it is not the fast path.
const SCAN_PAUSE: Duration = Duration::from_millis(20);
const FIRST_BACK_OFF: Duration = Duration::from_millis(250);
const LAST_BACK_OFF: Duration = Duration::from_secs(30);
const LONG_RUN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_keeps_dying_is_started_ever_more_rarely() {
        let mut now = Instant::now();
        let mut timers = Timers::new(now);
        let mut pauses = Vec::new();
        for _ in 0..10 {
            timers.has_started(now);
            timers.restart(now);
            let start = timers.start.unwrap();
            pauses.push((start - now).as_millis());
            now = start;
        }
        assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        timers.has_started(now);
        timers.restart(now + 2 * LONG_RUN);
        assert_eq!(timers.start, Some(now + 2 * LONG_RUN + FIRST_BACK_OFF));
    }
}
