//! Containerd on a host of the lab, with its own client and CNI.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;

use super::image;
use crate::{Container, Daemon, Host, Lab, eventually};

/// A containerd with a network of CNI. Dropping it powers its host off.
#[derive(Debug)]
pub struct Containerd {
    host: Arc<Host>,
    /// The file system that all its containers have.
    root: PathBuf,
    _daemon: Daemon,
}

impl Containerd {
    /// Starts containerd on host `index` of `lab`, and gives it a network of CNI where it looks for
    /// one.
    ///
    /// # Errors
    ///
    /// Containerd is not installed, or does not answer within 15 s.
    pub fn start(lab: &Lab, index: u8, conflist: &str) -> anyhow::Result<Self> {
        let host = Arc::clone(lab.host(index));
        let dir = host.dir().display().to_string();
        let config = host.dir().join("containerd.toml");
        fs::write(&config, CONFIG)?;
        fs::write(host.dir().join("weft.conflist"), conflist)?;
        host.exec(&["sh", "-ec", PLACES, "places", &dir])?.ok()?;
        let tar = image::make(lab.dir())?.display().to_string();
        let root = host.dir().join("rootfs");
        let path = root.display().to_string();
        fs::create_dir(&root)?;
        host.exec(&["tar", "-C", &path, "-xf", &tar])?.ok()?;
        let config = config.display().to_string();
        let daemon = Daemon::start(&host, "containerd", &["containerd", "--config", &config])?;
        let containerd = Self { host, root, _daemon: daemon };
        eventually(Duration::from_secs(15), "containerd answers", || containerd.ctr(&["version"]))?;
        Ok(containerd)
    }

    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Runs `ctr ARGS` on the host and returns what it printed.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn ctr(&self, args: &[&str]) -> anyhow::Result<String> {
        self.host.exec(&[&["ctr"], args].concat())?.ok()
    }

    /// Starts a container that waits, on the network of CNI, with the name server `resolver`.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn container(&self, id: &str, resolver: &str) -> anyhow::Result<Container> {
        let root = self.root.display().to_string();
        let resolv_conf = self.host.dir().join(format!("{id}.resolv"));
        fs::write(&resolv_conf, format!("nameserver {resolver}\noptions timeout:1 attempts:1\n"))?;
        let mount = format!(
            "type=bind,src={},dst=/etc/resolv.conf,options=rbind:ro",
            resolv_conf.display()
        );
        let options = ["--cni", "--cgroup", "", "--mount", &mount, "--rootfs", &root];
        let waits = [id, "/bin/sleep", "1000000"];
        self.ctr(&[&["run", "-d"], &options[..], &waits].concat())?;
        let tasks = self.ctr(&["task", "ls"])?;
        let pid = tasks.lines().find_map(|line| {
            let mut fields = line.split_whitespace();
            (fields.next()? == id).then(|| fields.next()?.parse().ok())?
        });
        let pid = pid.with_context(|| format!("{id} has no process: {tasks}"))?;
        Ok(Container::running(&self.host, id, pid))
    }

    /// Ends a container and removes it.
    ///
    /// # Errors
    ///
    /// A command fails.
    pub fn remove(&self, id: &str) -> anyhow::Result<()> {
        self.ctr(&["task", "rm", "-f", id])?;
        self.ctr(&["container", "rm", id]).map(drop)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Containers are no children of the daemon; they end with the host's first process.
        self.host.power_off();
    }
}

/// The part for Kubernetes has networks of its own.
const CONFIG: &str = "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";

/// Where containerd's client looks for networks and plugins: these are the host's own.
const PLACES: &str = r#"
mount -t tmpfs tmpfs /etc/cni
mount -t tmpfs tmpfs /opt
mkdir -p /etc/cni/net.d /opt/cni/bin
cp "$1/weft.conflist" /etc/cni/net.d/10-weft.conflist
ln -s "$(readlink -f "$1/bin/weft")" /opt/cni/bin/weft-cni
"#;
