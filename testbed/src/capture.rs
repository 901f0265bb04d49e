use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;

use nix::sys::signal::{Signal, kill};

use crate::{Recording, command::Ran, eventually, holder::pid_of};

/// A running tcpdump that writes to a file.
#[derive(Debug)]
pub struct Capture {
    process: Child,
    said: BufReader<ChildStderr>,
    file: PathBuf,
    /// Packets that came before the kernel had the filter: counted as received, never captured.
    early: u64,
}

/// What tcpdump prints upon SIGUSR1: `N packets captured, M packets received by filter, ...`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Counts {
    captured: u64,
    /// Those that the kernel dropped included.
    received: u64,
}

impl Capture {
    /// Captures what passes `interface` of the network namespace at `namespace` and matches
    /// `filter` (pcap-filter(7)); returns when tcpdump listens.
    ///
    /// # Errors
    ///
    /// tcpdump is not installed, or refuses.
    pub fn start(
        namespace: &Path,
        interface: &str,
        filter: &str,
        file: PathBuf,
    ) -> anyhow::Result<Self> {
        // Of a tunnel it gets all that a stream sends while tcpdump waits for a processor.
        let kibibytes = if matches!(filter, "" | "udp") { "262144" } else { "32768" };
        let mut process = Command::new("nsenter")
            .arg(format!("--net={}", namespace.display()))
            .args(["--", "tcpdump", "-Z", "root", "-U", "--immediate-mode"])
            // In this mode each packet takes a slot for the largest there may be, which is a
            // super-packet: some 500 of them in 32 MiB.
            .args(["--snapshot-length", "66000", "--buffer-size", kibibytes])
            .args(["-i", interface])
            .arg("-w")
            .arg(&file)
            .args(filter.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start tcpdump")?;
        let stderr = process.stderr.take().context("tcpdump has no error output")?;
        let mut said = BufReader::new(stderr);
        let mut complaints = String::new();
        let mut line = String::new();
        while said.read_line(&mut line)? > 0 {
            if line.contains("listening on") {
                let mut capture = Self { process, said, file, early: 0 };
                let Counts { captured, received } = capture.settled()?;
                capture.early = received.saturating_sub(captured);
                return Ok(capture);
            }
            complaints.push_str(&line);
            line.clear();
        }
        anyhow::bail!("tcpdump does not listen on {interface}: {complaints}")
    }

    /// Stops it, and returns what it captured, printed by `tcpdump -r`, a line a packet.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn stop(mut self, filter: &str) -> anyhow::Result<Vec<String>> {
        self.end()?;
        let mut command = Command::new("tcpdump");
        command.args(["-n", "-e", "-r"]).arg(&self.file).args(filter.split_whitespace());
        let text =
            Ran::run(command, format!("tcpdump -r {} {filter}", self.file.display()))?.ok()?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Stops it, and returns the packets that it captured.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn record(mut self) -> anyhow::Result<Recording> {
        self.end()?;
        Recording::read(&self.file)
    }

    /// Waits until tcpdump has written all that the kernel has for it, and ends it.
    fn end(&mut self) -> anyhow::Result<()> {
        eventually(Duration::from_secs(20), "tcpdump has written what passed", || {
            let counts = self.settled()?;
            // A capture with holes proves nothing.
            anyhow::ensure!(counts.captured + self.early >= counts.received, "{counts:?}");
            anyhow::Ok(())
        })?;
        let pid = pid_of(self.process.id());
        kill(pid, Signal::SIGINT)?;
        self.process.wait()?;
        Ok(())
    }

    /// Its counts, when they are the same twice.
    fn settled(&mut self) -> anyhow::Result<Counts> {
        let mut last = None;
        eventually(Duration::from_secs(20), "tcpdump's counts settle", || {
            let counts = self.counts()?;
            anyhow::ensure!(last.replace(counts) == Some(counts), "{counts:?}");
            Ok(counts)
        })
    }

    fn counts(&mut self) -> anyhow::Result<Counts> {
        kill(pid_of(self.process.id()), Signal::SIGUSR1)?;
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        let [captured, received, ..] = numbers[..] else { anyhow::bail!("no counts in {line:?}") };
        Ok(Counts { captured, received })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
