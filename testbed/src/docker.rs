//! Docker's daemon on a host of the lab.

use std::{
    fs,
    fs::OpenOptions,
    net::IpAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, Once, PoisonError},
    time::Duration,
};

use anyhow::Context as _;

use crate::{Host, Lab, command::Ran, eventually};

/// The image that every daemon is given.
pub const IMAGE: &str = "weft-test";

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
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep_cgroups);
        let host = Arc::clone(lab.host(index));
        let name = lab.dir().file_name().and_then(|name| name.to_str()).context("no name")?;
        let cgroup = format!("{name}-{}", host.name());
        let tree = std::env::var_os("WEFT_ENGINES_TREE").map(PathBuf::from);
        let docker = Self { host, cgroup, tree, entered: Mutex::default() };
        docker.start_daemon(&[])?;
        let tar = image(lab.dir())?;
        docker.run(&["import", "-c", "CMD [\"/bin/sh\"]", &tar.display().to_string(), IMAGE])?;
        Ok(docker)
    }

    /// Starts the daemon (again) and waits until it answers.
    ///
    /// # Errors
    ///
    /// It ends instead, or does not answer within 30 s.
    pub fn start_daemon(&self, options: &[&str]) -> anyhow::Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        if let Some(tree) = &self.tree {
            let tree = tree.display().to_string();
            let dir = self.host.dir().display().to_string();
            let lab = self.host.dir().parent().context("a host is in a lab")?.display().to_string();
            self.host.exec(&["sh", "-ec", TREE_SCRIPT, "tree", &tree, &dir, &lab])?.ok()?;
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
        eventually(Duration::from_secs(30), &what, || self.try_run(&["version"])?.ok())
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
        eventually(Duration::from_secs(30), "Docker's daemon ends", || match entered.try_wait() {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err("it still runs".to_owned()),
            Err(error) => Err(error.to_string()),
        })
    }

    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Runs `docker ARGS` on the host and returns what it printed.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn run(&self, args: &[&str]) -> anyhow::Result<String> {
        self.try_run(args)?.ok()
    }

    /// The same with arguments split at white space.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn docker(&self, args: &str) -> anyhow::Result<String> {
        self.run(&args.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs `docker ARGS`, split at white space, and returns what became of it.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn try_docker(&self, args: &str) -> anyhow::Result<Ran> {
        self.try_run(&args.split_whitespace().collect::<Vec<_>>())
    }

    fn try_run(&self, args: &[&str]) -> anyhow::Result<Ran> {
        // The daemon's own client, where there are several.
        let own = "/usr/bin/docker";
        let client = if Path::new(own).exists() { own } else { "docker" };
        let line = [self.within(&[client]), args.iter().map(|arg| (*arg).to_owned()).collect()];
        self.host.exec(&line.concat().iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts a container that waits, with `options` of `docker run`.
    ///
    /// # Errors
    ///
    /// The command fails.
    pub fn container(&self, name: &str, options: &str) -> anyhow::Result<()> {
        self.docker(&format!("run -d --init --name {name} {options} {IMAGE} sleep 1000000"))
            .map(drop)
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

    /// Runs a shell script in a container and returns what it printed.
    ///
    /// # Errors
    ///
    /// The script fails.
    pub fn sh(&self, container: &str, script: &str) -> anyhow::Result<String> {
        self.run(&["exec", container, "sh", "-ec", script])
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

    /// The address of a container in a network, as Docker shows it.
    ///
    /// # Errors
    ///
    /// It has none.
    pub fn address(&self, container: &str, network: &str) -> anyhow::Result<IpAddr> {
        let template = format!("{{{{(index .NetworkSettings.Networks \"{network}\").IPAddress}}}}");
        let text = self.run(&["inspect", "-f", &template, container])?;
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
        let enter = r#"exec nsenter --mount=/proc/$(cat /run/tree.pid)/ns/mnt "$@""#;
        let prefix = self.tree.iter().flat_map(|_| ["sh", "-c", enter, "tree"]);
        prefix.chain(command.iter().copied()).map(str::to_owned).collect()
    }

    fn log_path(&self) -> PathBuf {
        self.host.dir().join("dockerd.log")
    }

    fn entered(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.entered.lock().unwrap_or_else(PoisonError::into_inner)
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
            remove_cgroups(|name| name == self.cgroup)
        });
    }
}

/// Makes the image's file system, once for a lab: a static shell, and the tools that use the system's
/// resolver library with the libraries that they need.
pub(crate) fn image(dir: &Path) -> anyhow::Result<PathBuf> {
    let tar = dir.join("image.tar");
    if !tar.exists() {
        let mut command = Command::new("bash");
        command.args(["-ec", IMAGE_SCRIPT, "image"]).arg(dir.join("image")).arg(&tar);
        Ran::run(command, "make the image".into())?.ok()?;
    }
    Ok(tar)
}

const IMAGE_SCRIPT: &str = r#"
root=$1 out=$2
mkdir -p "$root"/{bin,etc,tmp,proc,sys,dev,root,run}
cp "$(command -v busybox)" "$root/bin/busybox"
for name in $("$root/bin/busybox" --list); do
  [ "$name" = busybox ] || ln -sf busybox "$root/bin/$name"
done
for tool in ping getent iperf3 ss timeout; do
  path=$(command -v "$tool")
  rm -f "$root/bin/$tool"
  cp -L "$path" "$root/bin/$tool"
  libraries="$libraries $(ldd "$path" | grep -oE '/[^ ]+')"
done
for library in $libraries $(ls /lib/*/libnss_dns.so.2 /lib/*/libnss_files.so.2 /lib/*/libresolv.so.2); do
  mkdir -p "$root$(dirname "$library")"
  cp -Lu "$library" "$root$library"
done
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
tar -C "$root" --numeric-owner --owner=0 --group=0 -cf "$out.new" .
mv "$out.new" "$out"
rm -rf "$root"
"#;

/// Makes another system's tree the root of a mount namespace of its own, which outlives daemons, with
/// the host's own /run and /var/lib in it. What is mounted below /run on one side shows on the other:
/// namespaces of sandboxes, above all.
pub(crate) const TREE_SCRIPT: &str = r#"
[ ! -e /run/tree.pid ] || exit 0
tree=$1 dir=$2 lab=$3 root=$2/root
mkdir -p "$root" "$dir/upper" "$dir/work"
mount -t overlay overlay -o "lowerdir=$tree,upperdir=$dir/upper,workdir=$dir/work" "$root"
mount --make-shared /run
for name in /run /var/lib /proc /dev /sys; do mount --rbind "$name" "$root$name"; done
mkdir -p "$root$lab" "$root/.old"
mount --bind "$lab" "$root$lab"
: >"$root/etc/resolv.conf"
setsid unshare --mount --propagation unchanged sh -ec '
  cd "$1"
  pivot_root . .old
  mount --make-rprivate /.old
  umount -l /.old
  echo $$ >/run/tree.new
  mv /run/tree.new /run/tree.pid
  exec sleep infinity' sh "$root" >/dev/null 2>&1 </dev/null &
until [ -e /run/tree.pid ]; do kill -0 $! && sleep 0.05; done
"#;

/// Removes what the daemons of labs whose process has died left of control groups.
pub(crate) fn sweep_cgroups() {
    let _ = remove_cgroups(|name| {
        let pid = name.strip_prefix("weft-lab-").and_then(|rest| rest.split('-').next());
        pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    });
}

/// Removes the top control groups that `chosen` names, in every hierarchy.
pub(crate) fn remove_cgroups(chosen: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root)?.flatten().map(|entry| entry.path());
    for hierarchy in [root.to_owned()].into_iter().chain(hierarchies) {
        for entry in fs::read_dir(&hierarchy).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(&chosen) {
                remove_cgroup(&entry.path())?;
            }
        }
    }
    Ok(())
}

/// Only directories can be removed in it, the inner ones first.
fn remove_cgroup(path: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(path).with_context(|| format!("cannot remove {}", path.display()))
}
