//! Docker's daemon on a host of the lab.

use std::{
    fs,
    fs::OpenOptions,
    net::IpAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;

use super::{Engine, IMAGE, cgroups, image, tree};
use crate::{Container, Host, Lab, command::Ran, eventually};

/// A daemon with an image, and everything that it starts. Dropping it powers its host off.
#[derive(Debug)]
pub struct Docker {
    host: Arc<Host>,
    /// The parent of all control groups of its containers.
    cgroup: String,
    /// Another system's tree, from which daemon and client are taken.
    tree: Option<PathBuf>,
    entered: Mutex<Option<Child>>,
}

impl Docker {
    /// Starts a daemon on host `index` of `lab`, and gives it the image. Where `WEFT_ENGINES_TREE`
    /// names the tree of another system, it is that one's Docker.
    ///
    /// # Errors
    ///
    /// Docker is not installed, or does not start within 30 s.
    pub fn start(lab: &Lab, index: u8) -> anyhow::Result<Self> {
        cgroups::sweep();
        let host = Arc::clone(lab.host(index));
        let name = lab.dir().file_name().and_then(|name| name.to_str()).context("no name")?;
        let cgroup = format!("{name}-{}", host.name());
        let tree = std::env::var_os("WEFT_ENGINES_TREE").map(PathBuf::from);
        let docker = Self { host, cgroup, tree, entered: Mutex::default() };
        docker.start_daemon(&[])?;
        let tar = image::make(lab.dir())?.display().to_string();
        docker.run_args(&["import", "-c", "CMD [\"/bin/sh\"]", &tar, IMAGE])?;
        Ok(docker)
    }

    /// Makes a cluster of `hosts` hosts, each with a daemon; the agents were there before them.
    ///
    /// # Errors
    ///
    /// As [`Lab::cluster`] and [`start`](Self::start).
    pub fn on_cluster(hosts: u8) -> anyhow::Result<(Lab, Vec<Self>)> {
        let lab = Lab::cluster(hosts)?;
        let dockers = (1..=hosts).map(|index| Self::start(&lab, index));
        let dockers = dockers.collect::<Result<_, _>>()?;
        Ok((lab, dockers))
    }

    /// Starts the daemon (again) and waits until it answers.
    ///
    /// # Errors
    ///
    /// It ends instead, or does not answer within 30 s.
    pub fn start_daemon(&self, options: &[&str]) -> anyhow::Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        if let Some(tree) = &self.tree {
            let lab = self.host.dir().parent().context("a host is in a lab")?;
            tree::plant(tree, &self.host, lab)?;
        }
        let mut entered = self.host.enter()?;
        let entered = entered
            .args(["sh", "-ec", r#"echo $$ >/run/dockerd.pid; exec "$@""#, "dockerd"])
            .args(self.within(&["dockerd"]))
            .args(["--cgroup-parent", &format!("/{}", self.cgroup), "--pidfile", "/run/docker.pid"])
            // A lab has no resolver beyond its hosts: nobody shall wait long for one.
            .args(["--dns-opt", "timeout:1", "--dns-opt", "attempts:1"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start Docker's daemon")?;
        *self.entered() = Some(entered);
        let what = format!("Docker answers on {}", self.host.name());
        eventually(Duration::from_secs(60), &what, || self.run("version"))
            .map(drop)
            .with_context(|| self.log_tail(20))
    }

    /// Sends the daemon a signal and waits until it has ended; containers may go on.
    ///
    /// # Errors
    ///
    /// It does not end within 30 s.
    pub fn stop_daemon(&self, signal: &str) -> anyhow::Result<()> {
        self.host.sh(&format!("kill -{signal} $(cat /run/dockerd.pid); rm -f /run/docker.pid"))?;
        let mut entered = self.entered().take().context("no daemon runs")?;
        eventually(Duration::from_secs(60), "Docker's daemon ends", || match entered.try_wait() {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err("it still runs".to_owned()),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Makes one of weft's networks, as users of Docker do.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn create_network(&self, args: &str) -> anyhow::Result<()> {
        self.run(&format!("network create -d weft --ipam-driver weft {args}")).map(drop)
    }

    /// Starts a container that waits, with `options` of `docker run`.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn container(&self, name: &str, options: &str) -> anyhow::Result<()> {
        self.run(&format!("run -d --init --name {name} {options} {IMAGE} sleep 1000000")).map(drop)
    }

    /// Runs `docker-compose ARGS`, split at white space, for a project of the files in `dir`, and
    /// returns what it printed.
    ///
    /// # Errors
    ///
    /// It is not installed, or fails.
    pub fn compose(&self, project: &str, dir: &Path, args: &str) -> anyhow::Result<String> {
        let files = fs::read_dir(dir)?.map(|entry| Ok(entry?.path().display().to_string()));
        let mut files = files.collect::<anyhow::Result<Vec<_>>>()?;
        // What overrides comes after what it overrides.
        files.sort();
        let files = files.iter().flat_map(|file| ["-f", file]);
        let command = ["docker-compose", "-p", project].into_iter().chain(files);
        self.try_within(&command.chain(args.split_whitespace()).collect::<Vec<_>>())?.ok()
    }

    /// Makes the files of the plugin for swarms, and returns where they are.
    ///
    /// # Errors
    ///
    /// The binary's libraries are not found.
    pub fn build_plugin(&self) -> anyhow::Result<String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/docker-plugin.sh");
        let (host, binary) = (self.host.dir(), self.host.dir().join("bin/weft"));
        let dir = host.parent().context("a host is in a lab")?.join("docker-plugin");
        let mut command = Command::new(script);
        command.arg(binary).arg(&dir);
        Ran::run(command, "make the plugin".into())?.ok()?;
        Ok(dir.display().to_string())
    }

    /// Runs a shell script of the host's in the network namespace of a container.
    ///
    /// # Errors
    ///
    /// The script fails.
    pub fn sandbox_sh(&self, container: &str, script: &str) -> anyhow::Result<String> {
        let namespace = format!("--net=/proc/{}/ns/net", self.pid(container)?);
        self.host.exec(&["nsenter", &namespace, "sh", "-ec", script])?.ok()
    }

    /// A container that runs, for what takes those of the lab.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn process(&self, container: &str) -> anyhow::Result<Container> {
        Ok(Container::running(&self.host, container, self.pid(container)?))
    }

    /// Of its first process, as its host sees it.
    fn pid(&self, container: &str) -> anyhow::Result<u32> {
        let text = self.run_args(&["inspect", "-f", "{{.State.Pid}}", container])?;
        text.parse().with_context(|| format!("{container} has the pid {text:?}"))
    }

    /// The address of a container in a network, as Docker shows it.
    ///
    /// # Errors
    ///
    /// It has none.
    pub fn address(&self, container: &str, network: &str) -> anyhow::Result<IpAddr> {
        let template = format!("{{{{(index .NetworkSettings.Networks \"{network}\").IPAddress}}}}");
        let text = self.run_args(&["inspect", "-f", &template, container])?;
        text.parse().with_context(|| format!("{container} has the address {text:?} in {network}"))
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let all: Vec<_> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// A command, run in the other system's tree if there is one.
    fn within(&self, command: &[&str]) -> Vec<String> {
        let prefix = self.tree.iter().flat_map(|_| tree::WITHIN);
        prefix.chain(command.iter().copied()).map(str::to_owned).collect()
    }

    fn try_within(&self, command: &[&str]) -> anyhow::Result<Ran> {
        let command = self.within(command);
        self.host.exec(&command.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn log_path(&self) -> PathBuf {
        self.host.dir().join("dockerd.log")
    }

    fn entered(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.entered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for Docker {
    fn host(&self) -> &Arc<Host> {
        &self.host
    }

    fn try_run_args(&self, args: &[&str]) -> anyhow::Result<Ran> {
        // The daemon's own client, where there are several.
        let own = "/usr/bin/docker";
        let client = if Path::new(own).exists() { own } else { "docker" };
        self.try_within(&[&[client], args].concat())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // Containers are no children of the daemon; they end with the host's first process.
        self.host.power_off();
        if let Some(mut entered) = self.entered().take() {
            let _ = entered.kill();
            let _ = entered.wait();
        }
        // The last processes are still being reaped.
        let _ = eventually(Duration::from_secs(5), "the control groups go", || {
            cgroups::remove(|name| name == self.cgroup)
        });
    }
}
