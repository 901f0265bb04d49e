use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    process::{Child, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;

use crate::{Host, eventually};

/// A program that runs on a host until it is dropped.
#[derive(Debug)]
pub struct Daemon {
    host: Arc<Host>,
    name: String,
    /// The process that entered the host's namespaces and waits for the program.
    entered: Child,
    /// Inside the host's pid namespace.
    pid: String,
}

impl Daemon {
    /// Starts `argv` on `host`; what it says goes to the file `NAME.log` of the host.
    ///
    /// # Errors
    ///
    /// The host is off, or there is no such program.
    pub fn start(host: &Arc<Host>, name: &str, argv: &[&str]) -> anyhow::Result<Self> {
        let (pid, log) = (host.dir().join(format!("{name}.pid")), Self::log_of(host, name));
        let _ = fs::remove_file(&pid);
        let log = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut entered = host
            .enter()?
            .args(["sh", "-ec", r#"echo $$ >"$0.new"; mv "$0.new" "$0"; exec "$@""#])
            .arg(&pid)
            .args(argv)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let what = format!("{name} starts on {}", host.name());
        let pid = eventually(Duration::from_secs(20), &what, || {
            if let Ok(Some(status)) = entered.try_wait() {
                return Err(format!("{status}"));
            }
            fs::read_to_string(&pid).map_err(|error| error.to_string())
        })?;
        let (host, name, pid) = (Arc::clone(host), name.to_owned(), pid.trim().to_owned());
        Ok(Self { host, name, entered, pid })
    }

    /// What it has said.
    pub fn log(&self) -> String {
        fs::read_to_string(Self::log_of(&self.host, &self.name)).unwrap_or_default()
    }

    fn log_of(host: &Host, name: &str) -> std::path::PathBuf {
        host.dir().join(format!("{name}.log"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself, and its host may be off.
        let _ = self.host.exec(&["kill", "-KILL", &self.pid]);
        let _ = self.entered.kill();
        let _ = self.entered.wait();
    }
}
