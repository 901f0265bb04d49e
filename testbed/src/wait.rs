use std::{
    fmt::Display,
    thread,
    time::{Duration, Instant},
};

/// Polls `probe` until it succeeds, and returns what it found.
///
/// # Errors
///
/// It still fails when `deadline` has passed; the error holds `what` and the last state seen.
pub fn eventually<T, E: Display>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<T, E>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        let state = match probe() {
            Ok(found) => return Ok(found),
            Err(state) => state,
        };
        if start.elapsed() > deadline {
            anyhow::bail!("{what}: not within {deadline:?}; last seen: {state:#}");
        }
        pace(Duration::from_millis(5));
    }
}

/// Polls `probe` for the whole of `span`: for what must not happen.
///
/// # Errors
///
/// The first failure of `probe`, with `what` and when it was.
pub fn holds_for<E: Display>(
    span: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<(), E>,
) -> anyhow::Result<()> {
    let start = Instant::now();
    while start.elapsed() < span {
        if let Err(state) = probe() {
            anyhow::bail!("{what}: broken after {:?}: {state:#}", start.elapsed());
        }
        pace(Duration::from_millis(20));
    }
    Ok(())
}

/// Lets `span` pass: the rhythm of a poll or of a sender, never a guess at when something is done.
#[expect(clippy::disallowed_methods, reason = "the one place that keeps a rhythm")]
pub fn pace(span: Duration) {
    thread::sleep(span);
}

/// The rhythm of a sender. What a busy machine made it miss by much it does not catch up with: a
/// burst fills buffers that one packet at a time does not.
#[derive(Debug)]
pub(crate) struct Rhythm {
    every: Duration,
    due: Instant,
}

impl Rhythm {
    pub(crate) fn new(every: Duration) -> Self {
        Self { every, due: Instant::now() }
    }

    /// Waits until the next is due.
    pub(crate) fn wait(&mut self) {
        let now = Instant::now();
        self.due = (self.due + self.every).max(now.checked_sub(CAUGHT_UP).unwrap_or(now));
        pace(self.due.saturating_duration_since(now));
    }
}

/// By how much a sender may be late and still send all that it has not.
const CAUGHT_UP: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_deadline_tells_the_last_state() {
        let error = eventually(Duration::ZERO, "the door opens", || Err::<(), _>("it is shut"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("the door opens") && error.contains("it is shut"), "{error}");
    }

    #[test]
    fn what_becomes_true_in_time_is_returned() {
        let mut left = 3;
        let found = eventually(Duration::from_secs(5), "it counts down", || {
            left -= 1;
            if left == 0 { Ok("done") } else { Err(left) }
        });
        assert_eq!(found.unwrap(), "done");
    }
}
