//! Encrypted networks against their peers: one topology, one run, in turns.

mod contender;
mod nebula;
mod picture;
mod summary;
mod wireguard;

use std::{collections::BTreeMap, fmt, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};
use weft_testbed::{Capture, Carried, CpuTime, Lab, Load, Wire, pace};

use contender::{Contender, Ends, Ground};
use summary::{Series, Summary};

/// Measures TCP and UDP through encrypted networks and their peers, between two hosts, in turns
#[derive(Args, Debug)]
#[command(after_help = NOTES)]
pub(crate) struct Options {
    /// How often each is measured; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// How long each is measured, in seconds; TCP runs for one more, which does not count
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
    seconds: u32,
    /// Measure these rows only; ratios need both of their rows
    #[arg(long, value_delimiter = ',', value_enum)]
    only: Vec<Contender>,
    /// Measure over these wires only
    #[arg(long, value_delimiter = ',', value_enum)]
    wire: Vec<Cable>,
    /// Measure these workloads only
    #[arg(long, value_delimiter = ',', value_enum)]
    load: Vec<Workload>,
    /// One round of one second each, over the segmenting wire only
    #[arg(long, conflicts_with_all = ["rounds", "seconds", "wire"])]
    quick: bool,
    /// Write the picture to this file as well, as SVG
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
}

const NOTES: &str = "\
Two hosts, linked by one cable with no switch between; each contender carries packets between a
container on one and a container on the other, at the MTU that it sets by itself over 1500 bytes.
The segmenting wire cuts super-packets before they cross, as most network cards do with packets
they do not understand; that none crosses is checked for every contender.

CPU seconds per GB: the busy time of the machine while a load runs (/proc/stat: user, system and
interrupts), less that of other sessions' processes and less what the rest takes when idle, by
10^9 bytes of payload that arrived. So it is both hosts, iperf3 and the kernel.

To work on one data path: --only sealed,vxlan --wire segmenting --load tcp1 --rounds 3";

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
pub(crate) enum Cable {
    Segmenting,
    Veth,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
pub(crate) enum Workload {
    Tcp1,
    Tcp4,
    Udp64,
    Udp1300,
}

impl fmt::Display for Cable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Segmenting => "segmenting wire",
            Self::Veth => "plain veth",
        })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp1 => "1 TCP flow",
            Self::Tcp4 => "4 TCP flows",
            Self::Udp64 => "UDP, 64 bytes of payload",
            Self::Udp1300 => "UDP, packets of 1300 bytes",
        })
    }
}

impl Workload {
    fn load(self) -> Load {
        match self {
            Self::Tcp1 => Load::Tcp { flows: 1 },
            Self::Tcp4 => Load::Tcp { flows: 4 },
            Self::Udp64 => Load::Udp { payload_bytes: 64 },
            // 1300 with the headers of UDP and IPv4: what the smallest MTU among them takes whole.
            Self::Udp1300 => Load::Udp { payload_bytes: 1272 },
        }
    }

    fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp1 | Self::Tcp4)
    }
}

#[expect(clippy::print_stdout, reason = "a benchmark reports")]
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let _priority = Priority::raise();
    let (rounds, seconds) = if options.quick { (1, 1) } else { (options.rounds, options.seconds) };
    let rows = chosen(&options.only);
    let loads = chosen(&options.load);
    let wires = if options.quick { vec![Cable::Segmenting] } else { chosen(&options.wire) };

    let mut summary = Summary::default();
    for &wire in &wires {
        println!("\n{wire}: {rounds} rounds of {seconds} s");
        let field = Field { wire, seconds, loads: &loads };
        summary.add(wire, field.measure(rounds, &rows)?);
        print!("{}", summary.table(wire));
    }
    print!("{}", summary.bars());
    if let Some(file) = &options.picture {
        let drawn = summary.svg();
        fs::write(file, drawn).with_context(|| format!("cannot write {}", file.display()))?;
        println!("the picture is in {}", file.display());
    }
    for figure in summary.figures() {
        println!("{figure}");
    }
    Ok(())
}

/// All values that were asked for, each once and in order; all there are when none was.
fn chosen<T: ValueEnum + Copy + Ord>(asked: &[T]) -> Vec<T> {
    let mut chosen = if asked.is_empty() { T::value_variants().to_vec() } else { asked.to_vec() };
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}

/// What is measured on one wire.
struct Field<'a> {
    wire: Cable,
    seconds: u32,
    loads: &'a [Workload],
}

impl Field<'_> {
    fn measure(&self, rounds: u32, rows: &[Contender]) -> anyhow::Result<Series> {
        let wire = match self.wire {
            Cable::Segmenting => Wire::Segmenting,
            Cable::Veth => Wire::Plain,
        };
        let ground = Ground::build(wire, rows)?;
        let mut standing = BTreeMap::new();
        for &row in rows.iter().filter(|row| row.stands()) {
            standing.insert(row, ground.start(row)?);
        }
        let mut series = Series::default();
        for round in 0..rounds {
            let before = CpuTime::now()?;
            pace(Duration::from_secs(1));
            let spent = CpuTime::now()?.since(before);
            let idle = spent.ours / spent.wall;
            series.idle.push(idle);
            series.others.push(spent.others / spent.wall);
            // Who goes first changes, so that a drift of the machine favours nobody.
            let first = round as usize % rows.len();
            for &row in rows[first..].iter().chain(&rows[..first]) {
                let started = match standing.get(&row) {
                    Some(_) => None,
                    None => Some(ground.start(row)?),
                };
                let ends = started.as_ref().or_else(|| standing.get(&row));
                let ends = ends.with_context(|| format!("{row} is not up"))?;
                if round == 0 && self.wire == Cable::Segmenting {
                    prove_segments(ground.lab(row), row, ends)?;
                }
                for &load in self.loads {
                    let carried = self.turn(row, ends, load, idle)?;
                    series.add(row, load, ends.mtu_bytes, carried);
                }
            }
        }
        ground.finish();
        Ok(series)
    }

    #[expect(clippy::print_stdout, reason = "a benchmark reports")]
    fn turn(
        &self,
        row: Contender,
        ends: &Ends,
        load: Workload,
        idle: f64,
    ) -> anyhow::Result<Carried> {
        let carried = load
            .load()
            .run(&ends.from, &ends.to, ends.address, self.seconds, idle)
            .with_context(|| format!("{row}, {load}, over {}", self.wire))?;
        let figures = match load.is_tcp() {
            true => format!(
                "{:>8.2} Gbit/s {:>7} retransmits",
                carried.gigabits_per_second, carried.retransmits
            ),
            false => format!(
                "{:>8.1} kpps   {:>7.1} % lost",
                carried.packets_per_second / 1e3,
                carried.loss * 1e2
            ),
        };
        let cost = carried.cpu_seconds_per_gigabyte();
        println!("  {row:<13} {load:<27} {figures}   {cost:>7.3} CPU s/GB");
        Ok(carried)
    }
}

/// Shows that nothing larger than the wire's MTU crosses it while `row` carries TCP.
///
/// A capture on the sender's interface sees packets as its kernel hands them to the wire.
fn prove_segments(lab: &Lab, row: Contender, ends: &Ends) -> anyhow::Result<()> {
    let host = lab.host(1);
    let link = host.sh("cat /sys/class/net/eth0/address")?;
    let filter = format!("ether src {link} and greater {}", ETHERNET_HEADER_BYTES + MTU_BYTES + 1);
    let file = lab.dir().join("super-packets.pcap");
    let capture = Capture::start(&host.namespace()?, "eth0", &filter, file)?;
    Workload::Tcp1.load().run(&ends.from, &ends.to, ends.address, 1, 0.0)?;
    let large = capture.stop("")?;
    ensure!(
        large.is_empty(),
        "{row}: {} packets larger than the wire's MTU crossed it, such as {:?}",
        large.len(),
        large.first(),
    );
    Ok(())
}

/// The session's share of the CPUs while a benchmark runs.
///
/// Where the kernel schedules by session, nice(1) does nothing between two of them: builds in
/// another terminal would take half of the machine.
struct Priority {
    before: Option<String>,
}

impl Priority {
    fn raise() -> Self {
        let group = fs::read_to_string(AUTOGROUP).unwrap_or_default();
        let before = group.rsplit_once("nice ").map(|(_, nice)| nice.trim().to_owned());
        // Without the feature there is no such file, and nothing to raise.
        let raised = before.filter(|_| fs::write(AUTOGROUP, "-18").is_ok());
        Self { before: raised }
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(AUTOGROUP, before);
        }
    }
}

const AUTOGROUP: &str = "/proc/self/autogroup";
const ETHERNET_HEADER_BYTES: u16 = 14;
const MTU_BYTES: u16 = 1500;
