use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
};

use anyhow::Context as _;
use nix::sched::{CloneFlags, setns};

/// A process that keeps namespaces alive for as long as this value, or this process, lives.
///
/// It reads its standard input and ends at the end of file. In a process group of its own, so that
/// Ctrl-C in a terminal reaches only the lab's process.
#[derive(Debug)]
pub(crate) struct Holder {
    process: Child,
    input: Option<ChildStdin>,
    pid: u32,
}

impl Holder {
    /// Starts `command`, whose script must print `ready PID` once its namespaces are furnished and
    /// then run [`HOLD`]. What the script complains of goes to the file `log`.
    pub(crate) fn start(mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(log).with_context(|| format!("cannot make {}", log.display()))?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start a holder, {command:?}"))?;
        let input = process.stdin.take();
        let mut line = String::new();
        if let Some(output) = process.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        let ready = line.trim().strip_prefix("ready ").and_then(|pid| pid.parse().ok());
        match ready {
            Some(pid) => Ok(Self { process, input, pid }),
            None => {
                let status = process.wait()?;
                let said = std::fs::read_to_string(log).unwrap_or_default();
                anyhow::bail!("a holder ended at once, {status}: {said}({command:?})")
            }
        }
    }

    /// The process id that the script printed.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Takes the namespaces down, and every process in its pid namespace with them.
    pub(crate) fn kill(&mut self) {
        let _ = nix::sys::signal::kill(pid_of(self.pid), nix::sys::signal::SIGKILL);
        self.end();
    }

    /// Lets the script end by itself.
    pub(crate) fn end(&mut self) {
        self.input = None;
        let _ = self.process.wait();
    }

    /// Lets it outlive this process.
    pub(crate) fn keep(&mut self) -> anyhow::Result<()> {
        self.input.take().context("it was let go already")?.write_all(b"keep\n")?;
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // One that was kept has no input any more and is left alone.
        if self.input.take().is_some() {
            let _ = self.process.wait();
        }
    }
}

/// The end of every holder's script. `wait` reaps what was orphaned inside a pid namespace.
pub(crate) const HOLD: &str = r#"
if read -r word && [ "$word" = keep ]; then while :; do sleep 3600 & wait; done; fi
"#;

/// Runs `work` on a thread of its own inside the network namespace at `path`.
///
/// A socket stays in the namespace where it was made, so `work` need do no more than open one.
///
/// # Errors
///
/// The namespace is gone, or `work` fails.
pub fn in_network_namespace<T: Send>(
    path: &Path,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let enter = || {
        let namespace = File::open(path).with_context(|| format!("no {}", path.display()))?;
        setns(namespace, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter {}", path.display()))?;
        work()
    };
    thread::scope(|scope| match scope.spawn(enter).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

pub(crate) fn network_namespace_of(pid: u32) -> PathBuf {
    format!("/proc/{pid}/ns/net").into()
}

pub(crate) fn pid_of(pid: u32) -> nix::unistd::Pid {
    nix::unistd::Pid::from_raw(pid.cast_signed())
}
