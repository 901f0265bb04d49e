//! Podman on a host of the lab, with CNI or netavark as its network back end.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    Host, IMAGE, Lab,
    command::Ran,
    docker::{TREE_SCRIPT, image, remove_cgroups, sweep_cgroups},
    eventually,
};

/// A podman with an image and networks of its own. Dropping it powers its host off.
#[derive(Debug)]
pub struct Podman {
    host: Arc<Host>,
    /// The parent of all control groups of its containers.
    cgroup: String,
    backend: Backend,
}

/// What makes podman's networks.
#[derive(Clone, Copy, Debug)]
enum Backend {
    Cni,
    /// In the tree of another system, because this one's netavark has no drivers from outside.
    Netavark,
}

impl Podman {
    /// Furnishes podman on host `index` of `lab` with the image, and with networks of CNI: each the
    /// name of a file and a list of plugins for it.
    ///
    /// # Errors
    ///
    /// Podman is not installed, or cannot import the image.
    pub fn start(lab: &Lab, index: u8, conflists: &[(&str, &str)]) -> anyhow::Result<Self> {
        let podman = Self::new(lab, index, Backend::Cni)?;
        let bin = podman.host.dir().join("bin");
        fs::create_dir_all(podman.dir().join("net.d"))?;
        let plugin = bin.join("weft-cni");
        if !plugin.exists() {
            std::os::unix::fs::symlink("weft", plugin)?;
        }
        for (file, conflist) in conflists {
            fs::write(podman.dir().join("net.d").join(file), conflist)?;
        }
        let bin = bin.display();
        podman.furnish(lab, &format!("cni_plugin_dirs = [\"{bin}\", \"/usr/lib/cni\"]"))?;
        Ok(podman)
    }

    /// Furnishes the podman of another system's tree with the image and the network driver `weft`.
    ///
    /// # Errors
    ///
    /// There is no such tree, or its podman cannot import the image.
    pub fn start_in(tree: &Path, lab: &Lab, index: u8) -> anyhow::Result<Self> {
        let podman = Self::new(lab, index, Backend::Netavark)?;
        let host = podman.host.dir();
        let drivers = host.join("bin/netavark");
        fs::create_dir_all(&drivers)?;
        // The link that the host has leads out of the tree.
        fs::copy(host.join("bin/weft"), drivers.join("weft"))?;
        let paths = [tree, host, lab.dir()].map(|path| path.display().to_string());
        let [tree, dir, lab_dir] = paths.each_ref().map(String::as_str);
        podman.host.exec(&["sh", "-ec", TREE_SCRIPT, "tree", tree, dir, lab_dir])?.ok()?;
        let drivers = drivers.display();
        podman.furnish(lab, &format!("netavark_plugin_dirs = [\"{drivers}\"]"))?;
        Ok(podman)
    }

    fn new(lab: &Lab, index: u8, backend: Backend) -> anyhow::Result<Self> {
        sweep_cgroups();
        let host = Arc::clone(lab.host(index));
        let name = lab.dir().file_name().and_then(|name| name.to_str()).context("no name")?;
        let podman = Self { cgroup: format!("{name}-{}-podman", host.name()), host, backend };
        fs::create_dir_all(podman.dir())?;
        Ok(podman)
    }

    /// Writes the configuration and imports the image.
    fn furnish(&self, lab: &Lab, network: &str) -> anyhow::Result<()> {
        // Locks in files: those in shared memory would be of all hosts, and outlive them.
        let conf = format!(
            "[containers]\nlog_driver = \"k8s-file\"\n[engine]\nlock_type = \"file\"\n\
             [network]\n{network}\n"
        );
        let dir = self.dir();
        fs::write(dir.join("containers.conf"), conf)?;
        fs::write(dir.join("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
        let tar = image(lab.dir())?.display().to_string();
        let policy = dir.join("policy.json").display().to_string();
        let import =
            ["import", "--signature-policy", &policy, "-c", "CMD [\"/bin/sh\"]", &tar, IMAGE];
        self.run(&import).map(drop)
    }

    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Runs `podman ARGS`, split at white space, and returns what became of it.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn try_podman(&self, args: &str) -> anyhow::Result<Ran> {
        self.try_run(&args.split_whitespace().collect::<Vec<_>>())
    }

    /// The same for what must succeed; returns what it printed.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn podman(&self, args: &str) -> anyhow::Result<String> {
        self.try_podman(args)?.ok()
    }

    /// Starts a container that runs `command`, with `options` of `podman run`.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn try_container(&self, name: &str, options: &str, command: &str) -> anyhow::Result<Ran> {
        let parent = &self.cgroup;
        // A lab has no resolver beyond its hosts: nobody shall wait long for one.
        let dns = "--dns-option timeout:1 --dns-option attempts:1";
        let all = format!("--cgroup-parent /{parent} --cap-add NET_RAW {dns} {options}");
        self.try_podman(&format!("run -d --name {name} {all} {IMAGE} {command}"))
    }

    /// Starts a container that waits.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn container(&self, name: &str, options: &str) -> anyhow::Result<()> {
        self.try_container(name, options, "sleep 1000000")?.ok().map(drop)
    }

    /// What the container's own resolver library answers for `name`, sorted.
    ///
    /// # Errors
    ///
    /// It finds no address.
    pub fn resolve(&self, container: &str, name: &str) -> anyhow::Result<Vec<IpAddr>> {
        let text = self.run(&["exec", container, "getent", "ahosts", name])?;
        let mut found = Vec::new();
        for line in text.lines() {
            found.push(line.split_whitespace().next().context("an empty line")?.parse()?);
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// Pings a name or an address once from a container.
    ///
    /// # Errors
    ///
    /// There is no answer within a second.
    pub fn ping(&self, container: &str, target: &str) -> anyhow::Result<()> {
        self.run(&["exec", container, "ping", "-n", "-c", "1", "-W", "1", target]).map(drop)
    }

    /// Runs a shell script in a container and returns what it printed.
    ///
    /// # Errors
    ///
    /// The script fails.
    pub fn sh(&self, container: &str, script: &str) -> anyhow::Result<String> {
        self.run(&["exec", container, "sh", "-ec", script])
    }

    fn run(&self, args: &[&str]) -> anyhow::Result<String> {
        self.try_run(args)?.ok()
    }

    fn try_run(&self, args: &[&str]) -> anyhow::Result<Ran> {
        let dir = self.dir().display().to_string();
        let backend = match self.backend {
            Backend::Cni => "cni",
            Backend::Netavark => "netavark",
        };
        let script = r#"dir=$1 backend=$2; shift 2; export CONTAINERS_CONF=$dir/containers.conf
            if [ "$backend" = netavark ]; then
              set -- nsenter "--mount=/proc/$(cat /run/tree.pid)/ns/mnt" podman "$@"
            else
              set -- podman "$@"
            fi
            exec "$@""#;
        let options = [
            ["--root", &format!("{dir}/root")],
            ["--runroot", "/run/podman"],
            ["--tmpdir", "/run/libpod"],
            ["--storage-driver", "overlay"],
            ["--cgroup-manager", "cgroupfs"],
            ["--network-backend", backend],
            ["--network-config-dir", &format!("{dir}/net.d")],
            ["--events-backend", "file"],
            ["--runtime", "runc"],
        ];
        let shell = ["sh", "-c", script, "podman", &dir, backend];
        self.host.exec(&[&shell[..], options.as_flattened(), args].concat())
    }

    fn dir(&self) -> PathBuf {
        self.host.dir().join("podman")
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.host.power_off();
        // The last processes are still being reaped.
        let _ = eventually(Duration::from_secs(5), "the control groups go", || {
            remove_cgroups(|name| name == self.cgroup)
        });
    }
}
