/// Numbers the writes of one node: grows with each write, and over restarts.
///
/// The upper half of a number is the node's generation (how often its agent started, kept on disk
/// by the caller), the lower half counts the writes since then. Gossip incarnations take their
/// numbers from the same clock, so every record is younger than the incarnation that carries it.
#[derive(Debug)]
pub(crate) struct WriteClock {
    last: u64,
}

impl WriteClock {
    pub(crate) fn new(generation: u32) -> Self {
        Self { last: u64::from(generation) << 32 }
    }

    /// The next number. Carries into the generation after 2^32 writes, and so still grows.
    pub(crate) fn tick(&mut self) -> u64 {
        self.last = self.last.saturating_add(1);
        self.last
    }

    /// Goes on after `seen`, a number that this node is known to have used in an earlier life.
    pub(crate) fn observe(&mut self, seen: u64) {
        self.last = self.last.max(seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_generation_outnumbers_every_write_of_an_earlier_one() {
        let mut before = WriteClock::new(6);
        let mut after = WriteClock::new(7);
        let last = (0..1000).map(|_| before.tick()).last().unwrap();
        assert!(after.tick() > last);
    }

    #[test]
    fn a_clock_that_was_set_back_goes_on_after_what_it_is_shown() {
        let mut clock = WriteClock::new(1);
        clock.observe(9 << 32 | 5);
        assert_eq!(clock.tick(), 9 << 32 | 6);
    }
}
