use std::{
    fmt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;

/// A command that has ended, whatever its exit code.
#[derive(Clone, Debug)]
pub struct Ran {
    /// As a person would type it.
    pub line: String,
    /// The exit code; 128 and the signal's number when a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Ran {
    /// Runs `command` to its end; `line` is what errors call it.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(crate) fn run(mut command: Command, line: String) -> anyhow::Result<Self> {
        let start = Instant::now();
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start `{line}`"))?;
        Ok(Self {
            line,
            code: exit_code(output.status),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            took: start.elapsed(),
        })
    }

    /// What it wrote to standard output, without the final line break.
    ///
    /// # Errors
    ///
    /// Its exit code was not 0; the error holds the command and what it wrote.
    pub fn ok(self) -> anyhow::Result<String> {
        anyhow::ensure!(self.code == 0, "{self}");
        Ok(self.stdout.trim_end().to_owned())
    }

    /// What it wrote to standard error, when it refused with exit code `code`.
    ///
    /// # Errors
    ///
    /// It ended with another code, or its error text lacks one of `words`.
    pub fn refused(self, code: i32, words: &[&str]) -> anyhow::Result<String> {
        anyhow::ensure!(self.code == code, "expected exit code {code}: {self}");
        for word in words {
            anyhow::ensure!(self.stderr.contains(word), "the error lacks {word:?}: {self}");
        }
        Ok(self.stderr)
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, code, stdout, stderr, took } = self;
        write!(f, "`{line}` ended with {code} after {took:.1?}")?;
        for (stream, text) in [("stdout", stdout), ("stderr", stderr)] {
            if !text.trim().is_empty() {
                write!(f, "\n  {stream}: {}", text.trim_end().replace('\n', "\n          "))?;
            }
        }
        Ok(())
    }
}

fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;

    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}
