use std::{
    fs::{self, OpenOptions},
    io::ErrorKind,
    os::unix::{net::UnixDatagram, process::CommandExt as _},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{Host, eventually};

/// How an agent is ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stop {
    /// SIGTERM: it says good-bye.
    Gracefully,
    /// SIGKILL: it can do nothing any more.
    Killed,
}

/// A running `weft agent`.
#[derive(Debug)]
pub(crate) struct Agent {
    /// The process that entered the host's namespaces and waits for the agent.
    entered: Child,
    /// Inside the host's pid namespace.
    pid: String,
    kept: bool,
}

impl Agent {
    pub(crate) fn start(host: &Host) -> anyhow::Result<Self> {
        let (notify, pid) = (host.dir().join("notify"), host.dir().join("agent.pid"));
        let _ = fs::remove_file(&notify);
        let _ = fs::remove_file(&pid);
        let ready = UnixDatagram::bind(&notify)?;
        ready.set_read_timeout(Some(Duration::from_millis(50)))?;
        let log = OpenOptions::new().create(true).append(true).open(host.log_path())?;

        let mut entered = host
            .enter()?
            .args(["sh", "-ec", r#"echo $$ >"$1"; shift; exec weft agent "$@""#, "agent"])
            .arg(&pid)
            .args(
                host.configuration()
                    .iter()
                    .flat_map(|path| ["--config".as_ref(), path.as_os_str()]),
            )
            .env("NOTIFY_SOCKET", &notify)
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start an agent")?;

        let deadline = Instant::now() + Duration::from_secs(60);
        while !said_ready(&ready)? {
            let ended = entered.try_wait()?;
            anyhow::ensure!(
                ended.is_none() && Instant::now() < deadline,
                "the agent of {} does not get ready ({}); its log ends with:\n{}",
                host.name(),
                ended.map_or_else(|| "it still runs".to_owned(), |status| status.to_string()),
                host.log_tail(30),
            );
        }
        let pid = fs::read_to_string(pid)?.trim().to_owned();
        Ok(Self { entered, pid, kept: false })
    }

    pub(crate) fn stop(mut self, host: &Host, how: Stop) -> anyhow::Result<()> {
        let signal = match how {
            Stop::Gracefully => "-TERM",
            Stop::Killed => "-KILL",
        };
        host.exec(&["kill", signal, &self.pid])?.ok()?;
        eventually(Duration::from_secs(60), &format!("the agent of {} ends", host.name()), || {
            match self.entered.try_wait() {
                Ok(Some(_)) => Ok(()),
                Ok(None) => Err(host.log_tail(10)),
                Err(error) => Err(error.to_string()),
            }
        })
    }

    pub(crate) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !self.kept {
            let _ = self.entered.kill();
            let _ = self.entered.wait();
        }
    }
}

/// Whether the service manager's end of the socket has heard `READY=1` (sd_notify(3)).
fn said_ready(socket: &UnixDatagram) -> anyhow::Result<bool> {
    let mut message = [0; 4096];
    match socket.recv(&mut message) {
        Ok(length) => Ok(message[..length].split(|b| *b == b'\n').any(|line| line == b"READY=1")),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Ok(false)
        }
        Err(error) => Err(error).context("cannot read the notification socket"),
    }
}
