//! `weft-testbed`: the demonstration, the benchmarks and the broom.

mod scenes;

use std::process::ExitCode;

use clap::Parser;
use weft_testbed::sweep;

/// Several hosts on one machine, with real kernels' namespaces and real agents
#[derive(Debug, Parser)]
enum Scene {
    /// Three hosts, networks, names and pings
    Demo {
        /// Leave the lab up
        #[arg(long)]
        keep: bool,
    },
    /// From attach on one host to resolved and reached on another
    BenchConverge,
    /// Docker's containers on weft against its own overlay in swarm mode
    BenchDocker,
    BenchIngress(scenes::ingress::Options),
    /// Throughput against the same topology made by hand
    BenchPlain,
    BenchSealed(scenes::sealed::Options),
    /// Take down labs whose process has ended
    Sweep,
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]
fn main() -> ExitCode {
    let done = match Scene::parse() {
        Scene::Demo { keep } => scenes::demo::run(keep),
        Scene::BenchConverge => scenes::converge::run(),
        Scene::BenchDocker => scenes::docker::run(),
        Scene::BenchIngress(options) => scenes::ingress::run(&options),
        Scene::BenchPlain => scenes::plain::run(),
        Scene::BenchSealed(options) => scenes::sealed::run(&options),
        Scene::Sweep => sweep(&std::env::temp_dir()).map(|swept| {
            for dir in swept {
                println!("took down {}", dir.display());
            }
        }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
