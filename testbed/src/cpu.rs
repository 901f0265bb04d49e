use std::{fs, time::Instant};

use anyhow::Context as _;

/// What the machine's CPUs have done until one moment.
#[derive(Clone, Copy, Debug)]
pub struct CpuTime {
    at: Instant,
    /// All but idling, and what a hypervisor took away.
    busy: u64,
    /// Of that, the processes of other sessions.
    others: u64,
}

/// What they did between two moments, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct CpuSpent {
    /// By this session, which has all hosts of a lab in it, and by the kernel, interrupts included.
    pub ours: f64,
    /// By other sessions.
    pub others: f64,
    pub wall: f64,
}

impl CpuTime {
    /// # Errors
    ///
    /// `/proc` cannot be read.
    pub fn now() -> anyhow::Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let busy = busy(&stat).with_context(|| format!("no CPU times in {stat:?}"))?;
        let own = fs::read_to_string("/proc/self/stat").context("cannot read /proc/self/stat")?;
        let own = process(&own).context("no session in /proc/self/stat")?.0;
        let mut others = 0;
        for entry in fs::read_dir("/proc").context("cannot read /proc")? {
            let name = entry?.file_name();
            if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            // It may have ended in between.
            let stat = fs::read_to_string(format!("/proc/{}/stat", name.display()));
            if let Some((session, ticks)) = stat.ok().as_deref().and_then(process)
                && ![own, KERNEL].contains(&session)
            {
                others += ticks;
            }
        }
        Ok(Self { at: Instant::now(), busy, others })
    }

    pub fn since(self, before: Self) -> CpuSpent {
        let [busy, others] = [self.busy - before.busy, self.others.saturating_sub(before.others)];
        let seconds = |ticks: u64| ticks as f64 / TICKS_PER_SECOND;
        CpuSpent {
            ours: seconds(busy.saturating_sub(others)),
            others: seconds(others),
            wall: (self.at - before.at).as_secs_f64(),
        }
    }
}

/// The first line of `/proc/stat` (proc(5)), in clock ticks.
fn busy(stat: &str) -> Option<u64> {
    let times = stat.lines().next()?.strip_prefix("cpu ")?;
    let times: Vec<u64> = times.split_whitespace().map_while(|t| t.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = times[..] else { return None };
    Some(user + nice + system + irq + softirq)
}

/// The session of a process and its clock ticks, with those of its children that have ended
/// (proc(5), fields 6 and 14 to 17 of `stat`).
fn process(stat: &str) -> Option<(i32, u64)> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    Some((fields.get(3)?.parse().ok()?, ticks))
}

/// The session of the kernel's threads.
const KERNEL: i32 = 0;

/// The same on every architecture that Linux shows to user space (USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_is_all_but_idle_waiting_and_stolen_time() {
        let stat = "cpu  100 20 30 9000 500 4 6 77 8 9\ncpu0 1 2 3\n";
        assert_eq!(busy(stat), Some(160));
        assert_eq!(busy("intr 1 2"), None);
    }

    #[test]
    fn the_time_of_a_process_has_that_of_its_ended_children_in_it() {
        let stat = "7 (a ) b) S 1 7 5 0 -1 4194560 1 2 3 4 100 20 3000 400 20 0 1 0 55";
        assert_eq!(process(stat), Some((5, 3520)));
    }

    #[test]
    fn work_of_this_session_is_ours() {
        let before = CpuTime::now().unwrap();
        let mut spent = before.since(before);
        while spent.wall < 10.0 && spent.ours < 0.05 {
            spent = CpuTime::now().unwrap().since(before);
        }
        assert!(spent.ours >= 0.05, "{spent:?}");
    }
}
