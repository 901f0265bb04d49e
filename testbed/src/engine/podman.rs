//! Podman on a host of the lab, with CNI or netavark as its network back end.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;

use super::{Engine, IMAGE, cgroups, image, tree};
use crate::{Host, Lab, command::Ran, eventually};

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
        tree::plant(tree, &podman.host, lab.dir())?;
        let drivers = drivers.display();
        podman.furnish(lab, &format!("netavark_plugin_dirs = [\"{drivers}\"]"))?;
        Ok(podman)
    }

    fn new(lab: &Lab, index: u8, backend: Backend) -> anyhow::Result<Self> {
        cgroups::sweep();
        let host = Arc::clone(lab.host(index));
        let name = lab.dir().file_name().and_then(|name| name.to_str()).context("no name")?;
        let podman = Self { cgroup: format!("{name}-{}-podman", host.name()), host, backend };
        fs::create_dir_all(podman.dir())?;
        Ok(podman)
    }

    /// Writes the configuration and imports the image.
    fn furnish(&self, lab: &Lab, network: &str) -> anyhow::Result<()> {
        // Locks in files: those in shared memory would be of all hosts, and outlive them. Ports are
        // kept from others by weft, where it publishes them.
        let conf = format!(
            "[containers]\nlog_driver = \"k8s-file\"\n\
             [engine]\nlock_type = \"file\"\nenable_port_reservation = false\n\
             [network]\n{network}\n"
        );
        let dir = self.dir();
        fs::write(dir.join("containers.conf"), conf)?;
        fs::write(dir.join("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
        let tar = image::make(lab.dir())?.display().to_string();
        let policy = dir.join("policy.json").display().to_string();
        let import =
            ["import", "--signature-policy", &policy, "-c", "CMD [\"/bin/sh\"]", &tar, IMAGE];
        self.run_args(&import).map(drop)
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
        self.try_run(&format!("run -d --name {name} {all} {IMAGE} {command}"))
    }

    /// Starts a container that waits.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn container(&self, name: &str, options: &str) -> anyhow::Result<()> {
        self.try_container(name, options, "sleep 1000000")?.ok().map(drop)
    }

    /// Lets the programs of the host run this podman by its name alone, as where it is installed with
    /// its configuration in its usual places.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn install(&self) -> anyhow::Result<()> {
        let quoted: Vec<String> = self.words().iter().map(|word| format!("'{word}'")).collect();
        // Its own place comes last, so that it finds the podman that it stands for.
        let path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin";
        let script = format!("#!/bin/sh\n{path} exec {} \"$@\"\n", quoted.join(" "));
        let file = self.dir().join("podman");
        fs::write(&file, script)?;
        let place = format!(
            "mount -t tmpfs tmpfs /usr/local/sbin
             install -m 755 {} /usr/local/sbin/podman",
            file.display()
        );
        self.host.sh(&place).map(drop)
    }

    /// What stands before the arguments of each of its commands.
    fn words(&self) -> Vec<String> {
        let dir = self.dir().display().to_string();
        let (backend, within) = match self.backend {
            Backend::Cni => ("cni", &[][..]),
            Backend::Netavark => ("netavark", &tree::WITHIN[..]),
        };
        let conf = format!("CONTAINERS_CONF={dir}/containers.conf");
        let client = ["env", &conf, "podman"];
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
        [within, &client, options.as_flattened()].concat().into_iter().map(str::to_owned).collect()
    }

    fn dir(&self) -> PathBuf {
        self.host.dir().join("podman")
    }
}

impl Engine for Podman {
    fn host(&self) -> &Arc<Host> {
        &self.host
    }

    fn try_run_args(&self, args: &[&str]) -> anyhow::Result<Ran> {
        let words = self.words();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.host.exec(&[&words, args].concat())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.host.power_off();
        // The last processes are still being reaped.
        let _ = eventually(Duration::from_secs(5), "the control groups go", || {
            cgroups::remove(|name| name == self.cgroup)
        });
    }
}
