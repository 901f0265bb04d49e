use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use serde_json::Value;

use crate::{
    Family, Host, NetworkView, Wire, eventually, holder::pid_of, nat::Nat, underlay::Underlay,
};

/// Hosts on one underlay. Dropping it takes everything down; logs are printed unless
/// [`finish`](Self::finish) was called first.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: the underlay removes the directory when all else is gone.
    hosts: Vec<Arc<Host>>,
    mtus: BTreeMap<u8, u16>,
    nats: BTreeMap<u8, Nat>,
    underlay: Mutex<Underlay>,
    dir: PathBuf,
    finished: bool,
}

/// What a lab is made of.
#[derive(Debug, Default)]
pub struct Builder {
    hosts: u8,
    family: Family,
    wire: Wire,
    direct: bool,
    mtus: BTreeMap<u8, u16>,
    nats: BTreeMap<u8, Duration>,
    below: Option<PathBuf>,
}

impl Builder {
    pub fn hosts(self, hosts: u8) -> Self {
        Self { hosts, ..self }
    }

    pub fn underlay_v6(self) -> Self {
        Self { family: Family::V6, ..self }
    }

    /// Gives host `index`, counted from 1, an underlay MTU other than 1500 bytes.
    pub fn mtu(mut self, index: u8, bytes: u16) -> Self {
        self.mtus.insert(index, bytes);
        self
    }

    pub fn wire(self, wire: Wire) -> Self {
        Self { wire, ..self }
    }

    /// Links the two hosts of the lab by one cable, with no switch between that costs CPU.
    pub fn direct(self) -> Self {
        Self { direct: true, ..self }
    }

    /// Puts host `index` behind a router that translates addresses and ports, lets in nothing but
    /// answers, and forgets a UDP flow that pauses for `patience`. IPv4 only.
    pub fn behind_nat(mut self, index: u8, patience: Duration) -> Self {
        self.nats.insert(index, patience);
        self
    }

    /// Makes the lab's directory below `dir`, where [`sweep`] looks only when told to.
    pub fn below(self, dir: PathBuf) -> Self {
        Self { below: Some(dir), ..self }
    }

    /// # Errors
    ///
    /// The caller is not root, or the `weft` binary was not built.
    pub fn build(self) -> anyhow::Result<Lab> {
        anyhow::ensure!(nix::unistd::geteuid().is_root(), "a lab makes namespaces: run it as root");
        let weft = weft_binary()?;
        let dir = fresh_dir(&self.below.unwrap_or_else(std::env::temp_dir))?;
        let underlay = Mutex::new(Underlay::build(&dir, self.family, self.wire)?);
        let build = |(&index, &patience)| Ok((index, Nat::build(&dir, index, patience)?));
        let nats = self.nats.iter().map(build).collect::<anyhow::Result<_>>()?;
        let mut lab =
            Lab { hosts: Vec::new(), mtus: self.mtus, nats, underlay, dir, finished: false };
        for index in 1..=self.hosts {
            let name = format!("h{index}");
            let address = match lab.nats.contains_key(&index) {
                true => Nat::inner_address(index),
                false => self.family.address(index),
            };
            lab.hosts.push(Arc::new(Host::new(lab.dir.join(&name), &name, address, &weft)?));
            lab.power_on(index)?;
        }
        if self.direct {
            let [one, other] = &lab.hosts[..] else { anyhow::bail!("one cable links two hosts") };
            let (one, other) = ((1, one.pid()?), (2, other.pid()?));
            lab.underlay().link_directly(one, other, lab.mtu(1))?;
        }
        lab.write_holders()?;
        Ok(lab)
    }
}

impl Lab {
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// A cluster of `hosts` hosts on an IPv4 underlay of 1500 bytes.
    ///
    /// # Errors
    ///
    /// As [`Builder::build`] and [`form_cluster`](Self::form_cluster).
    pub fn cluster(hosts: u8) -> anyhow::Result<Self> {
        let lab = Self::builder().hosts(hosts).build()?;
        lab.form_cluster()?;
        Ok(lab)
    }

    /// Host `index`, counted from 1.
    ///
    /// # Panics
    ///
    /// There is no such host.
    pub fn host(&self, index: u8) -> &Arc<Host> {
        &self.hosts[usize::from(index) - 1]
    }

    pub fn hosts(&self) -> &[Arc<Host>] {
        &self.hosts
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes one cluster of all hosts, as a person would, and waits until each sees all.
    ///
    /// # Errors
    ///
    /// A command fails, or the nodes do not find each other within 15 s.
    pub fn form_cluster(&self) -> anyhow::Result<()> {
        self.form_cluster_of(u8::try_from(self.hosts.len())?)
    }

    /// Makes a cluster of the first `hosts` hosts; others can [`join`](Self::join) later.
    ///
    /// # Errors
    ///
    /// As [`form_cluster`](Self::form_cluster).
    pub fn form_cluster_of(&self, hosts: u8) -> anyhow::Result<()> {
        let first = self.host(1);
        first.weft(&format!("init --name h1 --advertise {}", first.address()))?.ok()?;
        first.start_agent()?;
        (2..=hosts).try_for_each(|index| self.join(index))?;
        Self::wait_alive(&self.hosts[..usize::from(hosts)], Duration::from_secs(60))
    }

    /// Lets host `index` join the cluster of the first host, and starts its agent.
    ///
    /// # Errors
    ///
    /// A command fails.
    pub fn join(&self, index: u8) -> anyhow::Result<()> {
        let token = self.host(1).weft("token create")?.ok()?;
        let host = self.host(index);
        let (name, address) = (host.name(), host.address());
        host.weft(&format!("join {token} --name {name} --advertise {address}"))?.ok()?;
        host.start_agent()
    }

    /// Runs `weft network create ARGS` on the first host, and waits until all know the network.
    ///
    /// # Errors
    ///
    /// The command fails, or a host does not hear of it within 5 s.
    pub fn create_network(&self, args: &str) -> anyhow::Result<NetworkView> {
        self.host(1).weft(&format!("network create {args}"))?.ok()?;
        let name = args.split_whitespace().next().context("a network has a name")?;
        for host in &self.hosts {
            eventually(Duration::from_secs(20), &format!("{} knows {name}", host.name()), || {
                host.weft(&format!("network inspect {name}"))?.ok()
            })?;
        }
        NetworkView::read(self.host(1), name)
    }

    /// Waits until every host's agent sees every node alive.
    ///
    /// # Errors
    ///
    /// One does not within `deadline`.
    pub fn wait_all_alive(&self, deadline: Duration) -> anyhow::Result<()> {
        Self::wait_alive(&self.hosts, deadline)
    }

    fn wait_alive(hosts: &[Arc<Host>], deadline: Duration) -> anyhow::Result<()> {
        for host in hosts {
            eventually(deadline, &format!("{} sees all nodes alive", host.name()), || {
                let nodes = host.weft_json("nodes")?;
                let alive = states(&nodes).iter().filter(|(_, state)| *state == "alive").count();
                anyhow::ensure!(alive == hosts.len(), "{:?}", states(&nodes));
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The states of all nodes by name, as host `index` sees them.
    ///
    /// # Errors
    ///
    /// Its agent does not answer.
    pub fn node_states(&self, index: u8) -> anyhow::Result<BTreeMap<String, String>> {
        Ok(states(&self.host(index).weft_json("nodes")?))
    }

    /// Pulls the cable of host `index`.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn cut(&self, index: u8) -> anyhow::Result<()> {
        self.underlay().set_link(index, false)
    }

    /// Plugs the cable of host `index` in again.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn mend(&self, index: u8) -> anyhow::Result<()> {
        self.underlay().set_link(index, true)
    }

    /// Keeps the hosts of `one` from those of `other`, both ways; all links stay up.
    ///
    /// # Errors
    ///
    /// nft refuses the rules.
    pub fn partition(&self, one: &[u8], other: &[u8]) -> anyhow::Result<()> {
        self.underlay().separate(one, other)
    }

    /// Loses `percent` of what host `index` sends.
    ///
    /// # Errors
    ///
    /// nft refuses the rules.
    pub fn lose(&self, index: u8, percent: u8) -> anyhow::Result<()> {
        self.underlay().set_loss(index, percent)
    }

    /// Ends all partitions, losses and narrow places.
    ///
    /// # Errors
    ///
    /// nft refuses the rules.
    pub fn heal(&self) -> anyhow::Result<()> {
        self.underlay().heal()
    }

    /// Boots host `index`, with the disk it had before.
    ///
    /// # Errors
    ///
    /// Its namespaces cannot be made.
    pub fn power_on(&self, index: u8) -> anyhow::Result<()> {
        let (pid, mtu) = (self.host(index).boot()?, self.mtu(index));
        let Some(nat) = self.nats.get(&index) else {
            return self.underlay().plug(index, pid, mtu);
        };
        // The router stays when its host is off, and is plugged in once.
        if nat.sh("ip link show eth0").is_err() {
            self.underlay().plug(index, nat.pid(), mtu)?;
        }
        nat.plug(pid, mtu)
    }

    fn mtu(&self, index: u8) -> u16 {
        self.mtus.get(&index).copied().unwrap_or(1500)
    }

    /// Changes the MTU of the underlay interface of host `index`.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn set_mtu(&self, index: u8, bytes: u16) -> anyhow::Result<()> {
        self.host(index).sh(&format!("ip link set eth0 mtu {bytes}")).map(drop)
    }

    /// Drops IP packets of more than `bytes` to and from host `index` without a word to anybody:
    /// a path with a smaller MTU in its middle. `None` ends that.
    ///
    /// # Errors
    ///
    /// nft refuses the rules.
    pub fn narrow(&self, index: u8, bytes: Option<u16>) -> anyhow::Result<()> {
        self.underlay().narrow(index, bytes)
    }

    /// The network namespace of the underlay; host N is on its interface `pN`.
    pub fn underlay_namespace(&self) -> PathBuf {
        self.underlay().namespace()
    }

    /// Runs a shell script in the underlay's namespace and returns what it printed.
    ///
    /// # Errors
    ///
    /// The script failed.
    pub fn underlay_sh(&self, script: &str) -> anyhow::Result<String> {
        self.underlay().sh(script)
    }

    /// Where hosts send what is not on the underlay.
    pub fn router(&self) -> IpAddr {
        let family = if self.host(1).address().is_ipv4() { Family::V4 } else { Family::V6 };
        family.address(0)
    }

    /// Says that all went well: no logs are printed.
    pub fn finish(mut self) {
        self.finished = true;
    }

    /// Leaves the lab as it is when this process ends; [`sweep`] takes it down.
    ///
    /// # Errors
    ///
    /// A holder has ended.
    pub fn keep(mut self) -> anyhow::Result<()> {
        self.write_holders()?;
        self.hosts.iter().try_for_each(|host| host.keep())?;
        self.nats.values_mut().try_for_each(Nat::keep)?;
        self.underlay().keep()?;
        self.finished = true;
        std::mem::forget(self);
        Ok(())
    }

    /// Notes the holders with their start times, by which [`sweep`] knows them.
    fn write_holders(&self) -> anyhow::Result<()> {
        let mut pids = vec![self.underlay().pid()];
        pids.extend(self.nats.values().map(Nat::pid));
        pids.extend(self.hosts.iter().filter_map(|host| host.pid().ok()));
        let lines: Vec<_> = pids
            .into_iter()
            .filter_map(|pid| start_time(pid).map(|start| format!("{pid} {start}")))
            .collect();
        fs::write(self.dir.join("holders"), lines.join("\n"))?;
        Ok(())
    }

    fn underlay(&self) -> std::sync::MutexGuard<'_, Underlay> {
        self.underlay.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.finished {
            print_logs(&self.hosts);
        }
        self.hosts.iter().for_each(|host| host.power_off());
    }
}

/// Takes down what labs below `dir` left whose process has ended, and returns their directories.
///
/// That includes labs that were kept on purpose.
///
/// # Errors
///
/// A directory cannot be removed.
pub fn sweep(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut swept = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let owner = path.file_name().and_then(|name| name.to_str()).and_then(owner);
        if owner.is_none_or(|pid| Path::new("/proc").join(pid.to_string()).exists()) {
            continue;
        }
        let holders = fs::read_to_string(path.join("holders")).unwrap_or_default();
        for (pid, start) in holders.lines().filter_map(|line| line.split_once(' ')) {
            let pid: u32 = pid.parse().with_context(|| format!("{pid:?} is no pid"))?;
            if start_time(pid).as_deref() == Some(start) {
                let _ = nix::sys::signal::kill(pid_of(pid), nix::sys::signal::SIGKILL);
            }
        }
        eventually(Duration::from_secs(20), "the lab's directory goes", || {
            fs::remove_dir_all(&path)
        })?;
        swept.push(path);
    }
    Ok(swept)
}

fn states(nodes: &Value) -> BTreeMap<String, String> {
    let text =
        |node: &Value, field| node.get(field).and_then(Value::as_str).unwrap_or("?").to_owned();
    let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
    nodes.iter().map(|node| (text(node, "name"), text(node, "state"))).collect()
}

#[expect(clippy::print_stderr, reason = "a failed test shows what the agents said")]
fn print_logs(hosts: &[Arc<Host>]) {
    for host in hosts {
        eprintln!("---- the agent's log on {}, its end\n{}", host.name(), host.log_tail(60));
    }
}

/// A directory below `below` of which the name holds this process's id, and a count.
fn fresh_dir(below: &Path) -> anyhow::Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = below.join(format!("{PREFIX}{}-{count}", std::process::id()));
    // A dead process with the same id may have left one.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

/// When a process started, in clock ticks since boot (proc(5), field 22 of `stat`).
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(19).map(str::to_owned)
}

/// The binary under test: `WEFT_BIN`, or the one beside the program that runs.
fn weft_binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("WEFT_BIN") {
        return Ok(path.into());
    }
    let program = std::env::current_exe()?;
    let beside = program.ancestors().skip(1).take(2).map(|dir| dir.join("weft"));
    beside.into_iter().find(|path| path.is_file()).with_context(|| {
        format!("no weft beside {}: run `cargo build -p weft-agent` first", program.display())
    })
}

const PREFIX: &str = "weft-lab-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_names_the_process_that_owns_it() {
        assert_eq!(owner("weft-lab-4711-2"), Some(4711));
        assert_eq!(owner("weft-lab-x-2"), None);
        assert_eq!(owner("other-4711-2"), None);
    }

    #[test]
    fn a_start_time_is_read_though_the_process_has_spaces_in_its_name() {
        assert!(start_time(std::process::id()).is_some_and(|time| time.parse::<u64>().is_ok()));
    }
}
