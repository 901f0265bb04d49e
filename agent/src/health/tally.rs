use weft_model::{Check, Verdict};

use super::failure::Failure;

/// Turns the outcomes of one check's probes into a verdict.
///
/// There is none before the first outcome. A first failure is a verdict at once; to be healthy takes
/// `rise` successes in a row, to lose that `fall` failures in a row.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    rise: u16,
    fall: u16,
    verdict: Option<Verdict>,
    /// What made it unhealthy, as far as this tally saw it.
    cause: Option<Failure>,
    /// Outcomes in a row that speak against the verdict.
    against: u16,
}

impl Tally {
    /// Begins with the verdict of a predecessor, which stands until there is a new one: one who
    /// changes a check does not take its service down, nor does an agent that starts again.
    pub(super) fn new(check: &Check, inherited: Option<Verdict>) -> Self {
        let (rise, fall) = (check.rise.max(1), check.fall.max(1));
        Self { rise, fall, verdict: inherited, cause: None, against: 0 }
    }

    pub(super) fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }

    /// Takes in one outcome; tells whether the verdict has changed.
    pub(super) fn count(&mut self, outcome: Result<(), Failure>) -> bool {
        match (&self.verdict, outcome) {
            (Some(Verdict::Healthy), Ok(())) => {
                self.against = 0;
                false
            }
            (None | Some(Verdict::Unhealthy(_)), Ok(())) => {
                self.against += 1;
                let risen = self.against >= self.rise;
                if risen {
                    self.set(Verdict::Healthy, None);
                }
                risen
            }
            (Some(Verdict::Healthy), Err(failure)) => {
                self.against += 1;
                let fallen = self.against >= self.fall;
                if fallen {
                    self.set(Verdict::Unhealthy(failure.to_string()), Some(failure));
                }
                fallen
            }
            (None | Some(Verdict::Unhealthy(_)), Err(failure)) => {
                self.against = 0;
                // Everybody is told of another reason, but not of other words for the same.
                let news = !self.cause.as_ref().is_some_and(|cause| cause.is_like(&failure));
                if news {
                    self.set(Verdict::Unhealthy(failure.to_string()), Some(failure));
                }
                news
            }
        }
    }

    fn set(&mut self, verdict: Verdict, cause: Option<Failure>) {
        self.verdict = Some(verdict);
        self.cause = cause;
        self.against = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use weft_model::Probe;

    use super::*;

    proptest! {
        #[test]
        fn only_rise_successes_make_healthy_and_only_fall_failures_end_it(
            (rise, fall) in (1u16..5, 1u16..5),
            start in prop_oneof![
                Just(None),
                Just(Some(Verdict::Healthy)),
                Just(Some(Verdict::Unhealthy("before".into()))),
            ],
            outcomes in prop::collection::vec(any::<bool>(), 0..60),
        ) {
            let mut tally = Tally::new(&check(rise, fall), start.clone());
            let mut healthy = start == Some(Verdict::Healthy);
            let mut row = 0;
            let mut last = None;
            for success in outcomes {
                row = if last == Some(success) { row + 1 } else { 1 };
                last = Some(success);
                let before = tally.verdict().cloned();
                let changed = tally.count(outcome(success));
                prop_assert_eq!(changed, tally.verdict() != before.as_ref());
                match success {
                    true if row >= rise => healthy = true,
                    false if row >= fall => healthy = false,
                    _ => {}
                }
                prop_assert_eq!(tally.verdict() == Some(&Verdict::Healthy), healthy);
                prop_assert!(tally.verdict().is_some() || success);
            }
        }
    }

    #[test]
    fn a_new_backend_is_not_healthy_before_rise_successes() {
        let mut tally = Tally::new(&check(2, 3), None);
        assert!(!tally.count(Ok(())));
        assert_eq!(tally.verdict(), None);
        assert!(tally.count(Ok(())));
        assert_eq!(tally.verdict(), Some(&Verdict::Healthy));
    }

    #[test]
    fn the_first_failure_of_a_new_backend_says_why_it_gets_nothing() {
        let mut tally = Tally::new(&check(2, 3), None);
        assert!(tally.count(outcome(false)));
        let verdict = tally.verdict().unwrap();
        assert!(
            matches!(verdict, Verdict::Unhealthy(why) if why.contains("200 ms")),
            "{verdict:?}"
        );
    }

    #[test]
    fn a_reason_that_differs_in_words_alone_is_no_news() {
        let mut tally = Tally::new(&check(1, 1), None);
        let exit =
            |output: &str| Failure::Exit { status: "exit status: 1".into(), output: output.into() };
        assert!(tally.count(Err(exit("at 10:00"))));
        assert!(!tally.count(Err(exit("at 10:01"))));
        assert!(tally.count(outcome(false)));
    }

    fn outcome(success: bool) -> Result<(), Failure> {
        if success { Ok(()) } else { Err(Failure::Late { milliseconds: 200 }) }
    }

    fn check(rise: u16, fall: u16) -> Check {
        Check { probe: Probe::Engine, interval: 1000, timeout: 200, rise, fall }
    }
}
