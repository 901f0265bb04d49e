use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;

use crate::{command::Ran, holder::pid_of};

/// A running tcpdump that writes to a file.
#[derive(Debug)]
pub struct Capture {
    process: Child,
    file: PathBuf,
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
        let mut process = Command::new("nsenter")
            .arg(format!("--net={}", namespace.display()))
            .args(["--", "tcpdump", "-Z", "root", "-U", "-s", "0", "-B", "8192", "-i", interface])
            .arg("-w")
            .arg(&file)
            .args(filter.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start tcpdump")?;
        let stderr = process.stderr.take().context("tcpdump has no error output")?;
        let mut said = Vec::new();
        for line in BufReader::new(stderr).lines() {
            let line = line?;
            if line.contains("listening on") {
                return Ok(Self { process, file });
            }
            said.push(line);
        }
        anyhow::bail!("tcpdump does not listen on {interface}: {}", said.join("; "))
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

    /// Stops it, and returns the file.
    ///
    /// # Errors
    ///
    /// tcpdump cannot be ended.
    pub fn into_file(mut self) -> anyhow::Result<PathBuf> {
        self.end()?;
        Ok(self.file.clone())
    }

    fn end(&mut self) -> anyhow::Result<()> {
        // SIGINT makes it write out what it holds.
        let _ = nix::sys::signal::kill(pid_of(self.process.id()), nix::sys::signal::SIGINT);
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
