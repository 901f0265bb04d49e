use std::{
    fs,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Context as _;
use serde_json::Value;

use crate::{
    agent::{Agent, Stop},
    command::Ran,
    container::Container,
    holder::{HOLD, Holder, in_network_namespace, network_namespace_of},
    metrics::Metrics,
};

/// A machine: network, mount, uts and pid namespaces with a private `/run` and `/var/lib`.
///
/// What is under `/var/lib` survives a power-off, as on a disk.
#[derive(Debug)]
pub struct Host {
    name: String,
    address: IpAddr,
    dir: PathBuf,
    holder: Mutex<Option<Holder>>,
    agent: Mutex<Option<Agent>>,
}

impl Host {
    /// Makes the host's files below `dir`; `weft` becomes a command of the host.
    pub(crate) fn new(
        dir: PathBuf,
        name: &str,
        address: IpAddr,
        weft: &Path,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(dir.join("lib/weft"))?;
        fs::create_dir_all(dir.join("bin"))?;
        fs::write(dir.join("resolv.conf"), "# a host of the lab has no resolver\n")?;
        std::os::unix::fs::symlink(weft, dir.join("bin/weft"))?;
        let (holder, agent) = (Mutex::new(None), Mutex::new(None));
        Ok(Self { name: name.to_owned(), address, dir, holder, agent })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The underlay address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Where the host's files and logs are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The network namespace of the host.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn namespace(&self) -> anyhow::Result<PathBuf> {
        Ok(network_namespace_of(self.pid()?))
    }

    /// Runs a command in the host, at most a minute.
    ///
    /// # Errors
    ///
    /// The host is off. A command that fails is a value: see [`Ran::ok`].
    pub fn exec(&self, argv: &[&str]) -> anyhow::Result<Ran> {
        Ran::run(self.command(argv)?, format!("{}# {}", self.name, argv.join(" ")))
    }

    /// Runs a shell script in the host and returns what it printed.
    ///
    /// # Errors
    ///
    /// The host is off, or the script failed.
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        self.exec(&["sh", "-ec", script])?.ok()
    }

    /// Opens something, a socket mostly, inside the host's network namespace.
    ///
    /// # Errors
    ///
    /// The host is off, or `open` fails.
    pub fn inside<T: Send>(
        &self,
        open: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        in_network_namespace(&self.namespace()?, open)
    }

    /// Runs `weft` with `args`, split at white space.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn weft(&self, args: &str) -> anyhow::Result<Ran> {
        self.weft_args(&args.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs `weft` with arguments that may be empty or hold spaces.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn weft_args(&self, args: &[&str]) -> anyhow::Result<Ran> {
        self.exec(&[&["weft"], args].concat())
    }

    /// Runs `weft ARGS --format json` and returns what it printed.
    ///
    /// # Errors
    ///
    /// The host is off, the command failed, or its output is not JSON.
    pub fn weft_json(&self, args: &str) -> anyhow::Result<Value> {
        let text = self.weft(&format!("{args} --format json"))?.ok()?;
        serde_json::from_str(&text).with_context(|| format!("`weft {args}` printed {text:?}"))
    }

    /// Gives the agent a configuration file, which it reads when it starts next.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn configure(&self, toml: &str) -> anyhow::Result<()> {
        Ok(fs::write(self.dir.join(CONFIGURATION), toml)?)
    }

    /// What the agent answers to `GET /metrics`.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn metrics(&self) -> anyhow::Result<Metrics> {
        let ask = "exec 3<>/dev/tcp/127.0.0.1/9480
                   printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3";
        Ok(Metrics(self.exec(&["bash", "-ec", ask])?.ok()?))
    }

    /// Starts the agent and waits until it says that it is ready.
    ///
    /// # Errors
    ///
    /// It ends instead, or is not ready within 15 s.
    pub fn start_agent(&self) -> anyhow::Result<()> {
        let agent = Agent::start(self)?;
        *locked(&self.agent) = Some(agent);
        Ok(())
    }

    /// Stops the agent, and waits until it is gone.
    ///
    /// # Errors
    ///
    /// None runs, or it is not gone within 15 s.
    pub fn stop_agent(&self, how: Stop) -> anyhow::Result<()> {
        let agent = locked(&self.agent).take();
        agent.with_context(|| format!("no agent runs on {}", self.name))?.stop(self, how)
    }

    /// The last lines of the agent's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let all: Vec<_> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Starts a container: namespaces of its own with a process that waits.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn container(self: &Arc<Self>, name: &str) -> anyhow::Result<Container> {
        Container::start(Arc::clone(self), name)
    }

    /// Ends every process of the host at once, as when its power fails.
    pub fn power_off(&self) {
        if let Some(mut holder) = locked(&self.holder).take() {
            holder.kill();
        }
        // Its process died with the host; this only reaps the one that entered it.
        *locked(&self.agent) = None;
    }

    /// Makes the host's namespaces, still without a network.
    pub(crate) fn boot(&self) -> anyhow::Result<u32> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL"]);
        command.args(["--propagation", "private", "bash", "-c", &format!("{SCRIPT}{HOLD}")]);
        command.arg("host").arg(&self.name).arg(&self.dir);
        let holder = Holder::start(command, &self.dir.join("holder.log"))?;
        let pid = holder.pid();
        *locked(&self.holder) = Some(holder);
        self.write_enter_script(pid)?;
        Ok(pid)
    }

    fn write_enter_script(&self, pid: u32) -> anyhow::Result<()> {
        let (path, bin) = (self.enter_script(), self.dir.join("bin"));
        let script = format!(
            "#!/bin/sh\n[ $# -gt 0 ] || set -- bash --norc\n\
             PATH={}:$PATH PS1='{}# ' exec nsenter --target {pid} --net --mount --uts --pid -- \"$@\"\n",
            bin.display(),
            self.name
        );
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// A script by which a person enters the host: a shell, or the command that is given to it.
    pub fn enter_script(&self) -> PathBuf {
        self.dir.join("enter")
    }

    pub(crate) fn keep(&self) -> anyhow::Result<()> {
        if let Some(agent) = locked(&self.agent).as_mut() {
            agent.keep();
        }
        match locked(&self.holder).as_mut() {
            Some(holder) => holder.keep(),
            None => Ok(()),
        }
    }

    /// The host's pid 1, as seen from outside.
    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        let holder = locked(&self.holder);
        let holder = holder.as_ref().with_context(|| format!("{} is off", self.name))?;
        Ok(holder.pid())
    }

    /// The agent's configuration file, if it has one.
    pub(crate) fn configuration(&self) -> Option<PathBuf> {
        Some(self.dir.join(CONFIGURATION)).filter(|path| path.is_file())
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    /// A command that enters the host first, and ends within a minute.
    pub(crate) fn command(&self, argv: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.enter()?;
        command.args(["timeout", "--kill-after=2", "60"]).args(argv);
        Ok(command)
    }

    /// The beginning of a command that runs in the host.
    pub(crate) fn enter(&self) -> anyhow::Result<Command> {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid()?.to_string()]);
        command.args(["--net", "--mount", "--uts", "--pid", "--"]);
        command.env("PATH", format!("{}:{path}", self.dir.join("bin").display()));
        Ok(command)
    }
}

const CONFIGURATION: &str = "weft.toml";

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The outer pid has to be read before `/proc` is replaced. A fresh sysfs shows this host's links
/// and not those of the machine; the cgroup mounts below the old one are taken along.
const SCRIPT: &str = r#"
set -eu
name=$1 dir=$2
read -r outer rest </proc/self/stat
hostname "$name"
mount -t proc proc /proc
mkdir -p "$dir/cgroup"
if mount --rbind /sys/fs/cgroup "$dir/cgroup" 2>/dev/null; then
  mount -t sysfs sysfs /sys
  mount --rbind "$dir/cgroup" /sys/fs/cgroup
  umount -l "$dir/cgroup"
else
  mount -t sysfs sysfs /sys
fi
resolv=$(readlink -f /etc/resolv.conf)
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock
if [ ! -e "$resolv" ]; then mkdir -p "$(dirname "$resolv")"; : >"$resolv"; fi
mount --bind "$dir/resolv.conf" "$resolv"
mount --bind "$dir/lib" /var/lib
echo "ready $outer"
"#;
