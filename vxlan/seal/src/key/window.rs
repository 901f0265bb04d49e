/// How far a packet may lag behind the newest one of its lane and still be taken.
pub const WINDOW: u64 = 8192;

/// One more than the window needs: the word that the newest counter is in is partly ahead of it.
const WORDS: usize = (WINDOW / 64) as usize + 1;

/// The counters that one lane has delivered: a bitmap that slides (RFC 6479).
///
/// Ask [`is_fresh`](Self::is_fresh) before a packet is opened, which is cheap, and
/// [`commit`](Self::commit) afterwards, so that a forged packet changes nothing.
pub struct Window {
    /// One more than the highest counter that was committed.
    next: u64,
    words: [u64; WORDS],
}

impl Window {
    pub fn new() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }

    /// Whether `counter` is new: neither committed nor so old that it may have been.
    #[inline]
    pub fn is_fresh(&self, counter: u64) -> bool {
        let (word, bit) = place(counter);
        match self.next.checked_sub(counter) {
            None | Some(0) => counter != u64::MAX,
            Some(lag) => lag <= WINDOW && self.words[word] & bit == 0,
        }
    }

    /// Notes that the packet with `counter` was authentic.
    ///
    /// # Panics
    ///
    /// In debug builds, if `counter` is not fresh.
    #[inline]
    pub fn commit(&mut self, counter: u64) {
        debug_assert!(self.is_fresh(counter), "counter {counter} is not fresh");
        if counter >= self.next {
            self.slide(counter);
        }
        let (word, bit) = place(counter);
        self.words[word] |= bit;
    }

    /// Makes `counter` the newest one.
    #[inline]
    fn slide(&mut self, counter: u64) {
        // The first word of which no bit has been in the window yet.
        let first = self.next.div_ceil(64);
        let last = counter / 64;
        if first <= last {
            let count = (last - first).saturating_add(1).min(WORDS as u64);
            for word in (last - (count - 1))..=last {
                self.words[(word % WORDS as u64) as usize] = 0;
            }
        }
        self.next = counter + 1;
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

#[inline]
fn place(counter: u64) -> (usize, u64) {
    ((counter / 64 % WORDS as u64) as usize, 1 << (counter % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Remembers every counter.
    #[derive(Default)]
    struct Model {
        seen: BTreeSet<u64>,
    }

    impl Model {
        fn is_fresh(&self, counter: u64) -> bool {
            let old = self.seen.last().is_some_and(|&top| counter + WINDOW <= top);
            !old && !self.seen.contains(&counter)
        }
    }

    #[test]
    fn the_oldest_counter_within_reach_is_taken_and_the_one_before_is_not() {
        for top in WINDOW..WINDOW + 200 {
            let mut window = Window::new();
            window.commit(top);
            assert!(!window.is_fresh(top - WINDOW), "{top}");
            assert!(window.is_fresh(top - WINDOW + 1), "{top}");
            window.commit(top - WINDOW + 1);
            assert!(!window.is_fresh(top - WINDOW + 1), "{top}");
        }
    }

    #[test]
    fn the_last_counter_of_all_is_never_fresh() {
        let mut window = Window::new();
        assert!(!window.is_fresh(u64::MAX));
        window.commit(u64::MAX - 1);
        assert!(!window.is_fresh(u64::MAX));
        assert!(!window.is_fresh(u64::MAX - 1));
        assert!(window.is_fresh(u64::MAX - 2));
        assert!(!window.is_fresh(0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn a_window_agrees_with_one_that_remembers_everything(
            steps in prop::collection::vec(
                prop_oneof![
                    8 => -70i64..70,
                    4 => -9000i64..300,
                    2 => 0i64..9000,
                    1 => 0i64..100_000,
                ],
                1..400,
            )
        ) {
            let (mut window, mut model, mut at) = (Window::new(), Model::default(), 0i64);
            for step in steps {
                let counter = at.saturating_add(step).max(0) as u64;
                prop_assert_eq!(window.is_fresh(counter), model.is_fresh(counter), "{}", counter);
                if model.is_fresh(counter) {
                    window.commit(counter);
                    model.seen.insert(counter);
                }
                at = at.max(counter as i64);
            }
        }
    }
}
