use std::time::{Duration, Instant};

/// How long a reply to a large probe is waited for at least; the small one beside it has answered
/// by then.
const TIMEOUT: Duration = Duration::from_millis(500);

/// A size counts as too large when this many probes of it were lost in a row.
const TRIES: u32 = 3;

/// The settled size counts as too large when this many were: a flood loses some by chance.
const HOLE: u32 = 5;

/// A search ends when it knows the size to so many bytes.
const GRAIN: u16 = 8;

/// When larger sizes are tried again.
const UPWARDS: Duration = Duration::from_secs(600);

/// MTUs that links and tunnels have: likely answers come first.
const COMMON: [u16; 10] = [9000, 1500, 1492, 1480, 1460, 1450, 1420, 1400, 1380, 1280];

/// The largest packet that a path carries: a search, and a watch over what was found.
///
/// Sizes are those of sealed packets; `overhead` more is what a link's MTU counts. While a search
/// goes on, the size in use stays: a size given out too low would be remembered by every
/// container's kernel for minutes.
#[derive(Debug)]
pub(super) struct Mtu {
    floor: u16,
    /// What could get through at best, as far as is known.
    ceiling: u16,
    /// The ceiling before this host itself refused anything.
    widest: u16,
    overhead: u16,
    packet: u16,
    search: Option<Search>,
    probe: Option<Flight>,
    lost: u32,
    next: Instant,
    upwards: Instant,
}

/// What is known in a search: `low` goes through, what is beyond `high` does not.
#[derive(Debug)]
struct Search {
    low: u16,
    high: u16,
    /// Whether `high` itself is to be tried, before all others.
    top: bool,
}

/// A probe that was not answered yet.
#[derive(Debug)]
struct Flight {
    id: u32,
    size: u16,
    sent: Instant,
    until: Instant,
}

impl Mtu {
    /// Searches from `ceiling` down; `floor` is taken to go through. `ceiling` is in use until
    /// more is known.
    pub(super) fn new(now: Instant, floor: u16, ceiling: u16, overhead: u16) -> Self {
        let floor = floor.min(ceiling);
        Self {
            floor,
            ceiling,
            widest: ceiling,
            overhead,
            packet: ceiling,
            search: Some(Search { low: floor, high: ceiling, top: true }),
            probe: None,
            lost: 0,
            next: now,
            upwards: now + UPWARDS,
        }
    }

    /// The size in use.
    pub(super) fn packet(&self) -> u16 {
        self.packet
    }

    /// When something is to be decided or sent.
    pub(super) fn deadline(&self) -> Instant {
        self.probe.as_ref().map_or(self.next, |probe| probe.until)
    }

    /// Judges a probe that was not answered in time. It counts only if the path `answered` another
    /// one meanwhile: otherwise it is the path that fails, not the size.
    pub(super) fn expire(&mut self, now: Instant, answered: Option<Instant>) {
        let Some(probe) = self.probe.take_if(|probe| now >= probe.until) else { return };
        if answered.is_none_or(|at| at < probe.sent) {
            self.next = now + TIMEOUT;
            return;
        }
        self.lost += 1;
        self.next = now;
        match &self.search {
            Some(_) if self.lost >= TRIES => self.refuse(now, probe.size),
            None if self.lost >= HOLE => {
                self.begin(now, self.floor, self.ceiling.min(self.packet));
            }
            Some(_) | None => {}
        }
    }

    /// The size of the probe that is due now, if one is. `cadence` is the pace of the watch.
    pub(super) fn due(&mut self, now: Instant, cadence: Duration) -> Option<u16> {
        if self.probe.is_some() || now < self.next {
            return None;
        }
        if self.search.is_none() && now >= self.upwards {
            self.upwards = now + UPWARDS;
            // What this host's own link did not take it may take by now; if not, it says so at once.
            self.ceiling = self.widest;
            if self.packet < self.ceiling {
                self.begin(now, self.packet, self.ceiling);
            }
        }
        self.next = now + cadence;
        Some(self.wanted())
    }

    /// Notes the probe that [`due`](Self::due) asked for, on a path with this round-trip time.
    pub(super) fn sent(&mut self, now: Instant, id: u32, size: u16, rtt: Option<Duration>) {
        let patience = rtt.map_or(TIMEOUT, |rtt| TIMEOUT.max(rtt * 2));
        self.probe = Some(Flight { id, size, sent: now, until: now + patience });
    }

    /// Takes a reply if it is to the probe of a size.
    pub(super) fn reply(&mut self, now: Instant, id: u32) -> bool {
        let Some(probe) = self.probe.take_if(|probe| probe.id == id) else { return false };
        self.lost = 0;
        if let Some(search) = &mut self.search {
            search.low = search.low.max(probe.size);
            search.top = false;
            self.next = now;
            self.settle(now);
        }
        true
    }

    /// Notes that this host itself cannot send `size` bytes (EMSGSIZE).
    pub(super) fn too_big(&mut self, now: Instant, size: u16) {
        if size > self.ceiling {
            return;
        }
        self.ceiling = size.saturating_sub(1).max(self.floor);
        self.probe = None;
        match &self.search {
            Some(_) => self.refuse(now, size),
            None if size <= self.packet => self.begin(now, self.floor, self.ceiling),
            None => {}
        }
        if self.packet >= size {
            self.packet = self.wanted().min(self.ceiling);
        }
        self.next = now;
    }

    fn begin(&mut self, now: Instant, low: u16, high: u16) {
        self.search = Some(Search { low, high, top: true });
        (self.probe, self.lost, self.next) = (None, 0, now);
    }

    fn refuse(&mut self, now: Instant, size: u16) {
        self.lost = 0;
        if let Some(search) = &mut self.search {
            search.high = search.high.min(size.saturating_sub(1)).max(search.low);
            search.top = false;
        }
        self.settle(now);
    }

    /// Ends the search if there is nothing more to know.
    fn settle(&mut self, now: Instant) {
        if let Some(Search { low, high, top: false }) = self.search
            && high - low < GRAIN
        {
            self.packet = low;
            self.search = None;
            self.upwards = now + UPWARDS;
        }
    }

    /// The size to try next.
    fn wanted(&self) -> u16 {
        match self.search {
            None => self.packet,
            Some(Search { high, top: true, .. }) => high,
            Some(Search { low, high, top: false }) => {
                let middle = low + (high - low).div_ceil(2);
                let common = || COMMON.into_iter().map(|mtu| mtu.saturating_sub(self.overhead));
                let likely = common()
                    .filter(|size| (low + 1..=high).contains(size))
                    .min_by_key(|size| size.abs_diff(middle));
                // Between two common sizes, the truth is most likely the lower one.
                let beyond = common().any(|size| size == low).then_some(low + GRAIN);
                likely.or(beyond).map_or(middle, |size| size.min(high))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Answers all probes that fit `carried`, until the search is over; counts the sizes tried.
    fn search(mtu: &mut Mtu, now: &mut Instant, carried: u16) -> usize {
        let mut sizes = Vec::new();
        for id in 0..200 {
            *now = (*now).max(mtu.deadline());
            mtu.expire(*now, Some(*now));
            if mtu.search.is_none() {
                break;
            }
            let Some(size) = mtu.due(*now, Duration::from_secs(5)) else { continue };
            sizes.push(size);
            mtu.sent(*now, id, size, None);
            if size <= carried {
                assert!(mtu.reply(*now, id));
            }
        }
        sizes.dedup();
        sizes.len()
    }

    #[test]
    fn a_path_that_carries_everything_is_known_by_one_probe() {
        let mut now = Instant::now();
        let mut mtu = Mtu::new(now, 1252, 1472, 28);
        assert_eq!(mtu.packet(), 1472);
        assert_eq!(search(&mut mtu, &mut now, 1472), 1);
        assert_eq!(mtu.packet(), 1472);
    }

    #[test]
    fn common_mtus_are_found_exactly_and_in_few_probes() {
        for (carried, most) in [(9000, 1), (1500, 3), (1492, 7), (1450, 7), (1420, 7), (1280, 5)] {
            let mut now = Instant::now();
            let start = now;
            let mut mtu = Mtu::new(now, 1252, 8972, 28);
            let sizes = search(&mut mtu, &mut now, carried - 28);
            assert_eq!(mtu.packet() + 28, carried);
            assert!(sizes <= most, "{carried}: {sizes}");
            assert!(now - start < Duration::from_secs(8), "{carried}: {:?}", now - start);
        }
    }

    #[test]
    fn the_size_in_use_stays_while_a_search_goes_on() {
        let now = Instant::now();
        let mut mtu = Mtu::new(now, 1252, 8972, 28);
        let size = mtu.due(now, TIMEOUT).unwrap();
        mtu.sent(now, 1, size, None);
        mtu.expire(now + TIMEOUT, Some(now + TIMEOUT));
        assert_eq!(mtu.packet(), 8972);
    }

    #[test]
    fn what_the_host_itself_cannot_send_is_lowered_at_once() {
        let mut now = Instant::now();
        let mut mtu = Mtu::new(now, 1252, 8972, 28);
        search(&mut mtu, &mut now, 8972);
        mtu.too_big(now, 8972);
        assert!(mtu.packet() < 8972);
        search(&mut mtu, &mut now, 1472);
        assert_eq!(mtu.packet(), 1472);
        mtu.too_big(now, 1473);
        assert_eq!(mtu.packet(), 1472);
    }

    #[test]
    fn what_the_host_could_not_send_for_a_while_is_found_again() {
        let mut now = Instant::now();
        let mut mtu = Mtu::new(now, 1252, 1472, 28);
        search(&mut mtu, &mut now, 1472);
        mtu.too_big(now, 1472);
        search(&mut mtu, &mut now, 1372);
        assert_eq!(mtu.packet(), 1372);

        now += UPWARDS;
        mtu.due(now, TIMEOUT);
        search(&mut mtu, &mut now, 1472);
        assert_eq!(mtu.packet(), 1472);
    }

    #[test]
    fn losses_of_a_dead_path_say_nothing_of_sizes() {
        let mut now = Instant::now();
        let mut mtu = Mtu::new(now, 1252, 1472, 28);
        search(&mut mtu, &mut now, 1472);
        for id in 0..50 {
            now = now.max(mtu.deadline());
            mtu.expire(now, None);
            if let Some(size) = mtu.due(now, TIMEOUT) {
                mtu.sent(now, id, size, None);
            }
        }
        assert_eq!(mtu.packet(), 1472);
        assert!(mtu.search.is_none());
    }

    #[test]
    fn a_black_hole_is_noticed_and_a_wider_path_is_found_again() {
        let mut now = Instant::now();
        let mut mtu = Mtu::new(now, 1252, 1472, 28);
        search(&mut mtu, &mut now, 1472);
        let hole = now;
        for id in 1000..1100 {
            now = now.max(mtu.deadline());
            mtu.expire(now, Some(now));
            if let Some(size) = mtu.due(now, Duration::from_secs(5)) {
                mtu.sent(now, id, size, None);
                if size <= 1392 {
                    mtu.reply(now, id);
                }
            }
            if mtu.packet() < 1472 {
                break;
            }
        }
        assert!((1385..=1392).contains(&mtu.packet()), "{}", mtu.packet());
        assert!(now - hole < Duration::from_secs(16), "{:?}", now - hole);

        now += UPWARDS;
        assert!(mtu.due(now, Duration::from_secs(5)).is_some());
        mtu.probe = None;
        mtu.next = now;
        search(&mut mtu, &mut now, 1472);
        assert_eq!(mtu.packet(), 1472);
    }

    proptest! {
        #[test]
        fn a_search_ends_within_a_grain_below_what_is_carried(
            carried in 1252u16..=8972, ceiling in 1252u16..=8972, overhead in 28u16..100,
        ) {
            let mut now = Instant::now();
            let mut mtu = Mtu::new(now, 1252, ceiling, overhead);
            let sizes = search(&mut mtu, &mut now, carried);
            let right = carried.min(ceiling);
            prop_assert!(mtu.search.is_none());
            prop_assert!(mtu.packet() <= right && right - mtu.packet() < GRAIN, "{}", mtu.packet());
            prop_assert!(sizes <= 16, "{sizes}");
        }
    }
}
