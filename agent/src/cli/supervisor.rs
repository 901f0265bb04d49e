//! Stands by a command of `weft run`, so that it is drained before it is told to end.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    os::unix::process::{CommandExt as _, ExitStatusExt as _, parent_id},
    process::{Command, ExitStatus},
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tokio::signal::unix::{SignalKind, signal};
use weft_model::{EndpointId, Label};

use super::{Client, drain};

/// Runs a command until it ends, and returns the exit code for it: its own, or 128 and the signal's
/// number.
///
/// SIGTERM and SIGINT are passed on to it when its endpoints are drained, but at the latest after
/// `limit`, and at once if they come again; other signals at once. If this process is killed, so is
/// the command.
///
/// # Errors
///
/// The command cannot be started.
pub(super) fn supervise(
    agent: &Client,
    endpoints: &BTreeSet<EndpointId>,
    limit: Duration,
    command: &Supervised<'_>,
) -> anyhow::Result<i32> {
    super::wait(async {
        // Before there is a command that they could miss.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut others = Others::new()?;
        let mut child = tokio::process::Command::from(command.start()?)
            .spawn()
            .context("cannot start the command")?;
        let pid = child.id().context("the command has ended before it began")?;
        let pid = Pid::from_raw(pid.cast_signed());
        loop {
            let ending = tokio::select! {
                status = child.wait() => return Ok(code(status?)),
                other = others.next() => {
                    pass_on(pid, other);
                    continue;
                }
                _ = terminate.recv() => Signal::SIGTERM,
                _ = interrupt.recv() => Signal::SIGINT,
            };
            tokio::select! {
                status = child.wait() => return Ok(code(status?)),
                () = drained(agent, endpoints, limit) => pass_on(pid, ending),
                _ = terminate.recv() => pass_on(pid, Signal::SIGTERM),
                _ = interrupt.recv() => pass_on(pid, Signal::SIGINT),
            }
            // It may have its own way of ending; what comes now is between it and who sends it.
            loop {
                tokio::select! {
                    status = child.wait() => return Ok(code(status?)),
                    other = others.next() => pass_on(pid, other),
                    _ = terminate.recv() => pass_on(pid, Signal::SIGTERM),
                    _ = interrupt.recv() => pass_on(pid, Signal::SIGINT),
                }
            }
        }
    })
}

/// What is run.
pub(super) struct Supervised<'a> {
    pub(super) name: &'a Label,
    pub(super) command: &'a [OsString],
}

impl Supervised<'_> {
    /// This program again, which then becomes the command: only a process itself can ask to end with
    /// its parent.
    fn start(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["run", "--network", "none", "--name", self.name.as_str()]);
        command.args(["--supervised-by", &std::process::id().to_string(), "--"]);
        command.args(self.command);
        Ok(command)
    }
}

/// Becomes the command, which ends when `parent` does. Returns only upon failure.
pub(super) fn become_supervised(parent: u32, command: &[OsString]) -> anyhow::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("cannot ask to end with the supervisor")?;
    // It may have ended before it could be said.
    anyhow::ensure!(parent_id() == parent, "the supervisor has ended");
    let (program, arguments) = command.split_first().expect("clap requires a command");
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

/// Waits until nothing is left of the endpoints' work, or `limit` is over. An endpoint that somebody
/// else is draining already is not waited for: who does that waits.
async fn drained(agent: &Client, endpoints: &BTreeSet<EndpointId>, limit: Duration) {
    let waited = async {
        match drain::begin(agent, endpoints).await? {
            true => Ok(()),
            false => drain::wait(agent, endpoints, limit, |_| Ok(())).await.map(drop),
        }
    };
    let outcome: anyhow::Result<()> = match tokio::time::timeout(limit, waited).await {
        Ok(outcome) => outcome,
        Err(_) => return,
    };
    if let Err(error) = outcome {
        #[expect(clippy::print_stderr, reason = "errors of commands belong there")]
        {
            eprintln!("weft: ends without being drained: {error:#}");
        }
    }
}

/// Signals that commands give a meaning of their own.
struct Others {
    hangup: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
    first: tokio::signal::unix::Signal,
    second: tokio::signal::unix::Signal,
    window: tokio::signal::unix::Signal,
}

impl Others {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            first: signal(SignalKind::user_defined1())?,
            second: signal(SignalKind::user_defined2())?,
            window: signal(SignalKind::window_change())?,
        })
    }

    /// Waits for the next one. Cancel-safe.
    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.hangup.recv() => Signal::SIGHUP,
            _ = self.quit.recv() => Signal::SIGQUIT,
            _ = self.first.recv() => Signal::SIGUSR1,
            _ = self.second.recv() => Signal::SIGUSR2,
            _ = self.window.recv() => Signal::SIGWINCH,
        }
    }
}

fn pass_on(pid: Pid, signal: Signal) {
    // It may just have ended; then it is waited for next.
    let _ = kill(pid, signal);
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(1)
}
