//! `weft-testbed`: the demonstration, the benchmarks and the broom.

mod scenes;

use std::process::ExitCode;

use weft_testbed::sweep;

const USAGE: &str = "Usage: weft-testbed COMMAND

  demo [--keep]    three hosts, two networks, names and pings; --keep leaves the lab up
  bench-converge   from attach on one host to resolved and reached on another
  bench-plain      throughput against the same topology made by hand
  sweep            take down labs whose process has ended
";

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["demo"] => scenes::demo::run(false),
        ["demo", "--keep"] => scenes::demo::run(true),
        ["bench-converge"] => scenes::converge::run(),
        ["bench-plain"] => scenes::plain::run(),
        ["sweep"] => sweep(&std::env::temp_dir()).map(|swept| {
            for dir in swept {
                println!("took down {}", dir.display());
            }
        }),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
