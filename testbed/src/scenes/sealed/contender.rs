use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::ValueEnum;
use weft_testbed::{Container, Daemon, Host, Lab, Place, Wire, baseline::Baseline, eventually};

use super::{nebula, wireguard};

/// A way to carry packets between two hosts: a row of the table.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
pub(crate) enum Contender {
    /// The hosts themselves, without an overlay: what the wire gives
    Raw,
    /// Kernel VXLAN in the clear, made by hand
    Vxlan,
    /// A weft network
    Plain,
    /// An encrypted weft network
    Sealed,
    WireguardGo,
    Nebula,
    Boringtun,
}

impl Contender {
    /// Whether it stays up between its turns, for it costs nothing, or next to nothing, when idle.
    pub(crate) fn stands(self) -> bool {
        matches!(self, Self::Raw | Self::Vxlan | Self::Plain | Self::Sealed)
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Raw => "raw veth",
            Self::Vxlan => "kernel VXLAN",
            Self::Plain => "weft plain",
            Self::Sealed => "weft sealed",
            Self::WireguardGo => "wireguard-go",
            Self::Nebula => "nebula",
            Self::Boringtun => "boringtun",
        })
    }
}

/// The two ends of a contender that is up, and what has to live for it.
pub(crate) struct Ends {
    pub(crate) from: Place,
    pub(crate) to: Place,
    pub(crate) address: IpAddr,
    pub(crate) mtu_bytes: u16,
    _daemons: Vec<Daemon>,
}

impl Ends {
    pub(super) fn of_containers(
        one: Container,
        other: Container,
        address: IpAddr,
        mtu_bytes: u16,
        daemons: Vec<Daemon>,
    ) -> Self {
        let [from, to] = [one, other].map(Place::Container);
        Self { from, to, address, mtu_bytes, _daemons: daemons }
    }

    /// Waits until a ping is answered.
    fn reached(self) -> anyhow::Result<Self> {
        let target = self.address.to_string();
        eventually(Duration::from_secs(10), &format!("{target} is reached"), || {
            self.from.exec(&["ping", "-n", "-c", "1", "-W", "1", &target])?.ok()
        })?;
        Ok(self)
    }
}

/// What the contenders stand on: two pairs of hosts of the same make, of which one has agents.
pub(crate) struct Ground {
    bare: Lab,
    weft: Option<Lab>,
}

impl Ground {
    pub(crate) fn build(wire: Wire, contenders: &[Contender]) -> anyhow::Result<Self> {
        let build = || Lab::builder().hosts(2).wire(wire).direct().build();
        let agents = [Contender::Plain, Contender::Sealed];
        let weft = match contenders.iter().any(|contender| agents.contains(contender)) {
            false => None,
            true => {
                let lab = build()?;
                lab.form_cluster()?;
                Some(lab)
            }
        };
        Ok(Self { bare: build()?, weft })
    }

    /// Brings up a contender that was not up yet, or no longer.
    pub(crate) fn start(&self, contender: Contender) -> anyhow::Result<Ends> {
        let lab = &self.bare;
        let ends = match contender {
            Contender::Raw => {
                let [from, to] = [1, 2].map(|index| Place::Host(Arc::clone(lab.host(index))));
                let address = lab.host(2).address();
                Ok(Ends { from, to, address, mtu_bytes: 1500, _daemons: Vec::new() })
            }
            Contender::Vxlan => {
                let Baseline { one, other, address_of_other } =
                    Baseline::build(lab, VXLAN_MTU_BYTES)?;
                Ok(Ends::of_containers(one, other, address_of_other, VXLAN_MTU_BYTES, Vec::new()))
            }
            Contender::Plain => self.weft("plain", ""),
            Contender::Sealed => self.weft("sealed", "--encrypted"),
            Contender::WireguardGo => {
                let run = ["env", "WG_PROCESS_FOREGROUND=1", "wireguard-go", "--foreground"];
                wireguard::start(lab, "wireguard-go", &run)
            }
            Contender::Nebula => nebula::start(lab),
            Contender::Boringtun => {
                let program = boringtun()?;
                let program = program.to_str().context("its path is text")?;
                let run = [program, "--foreground", "--disable-drop-privileges"];
                wireguard::start(lab, "boringtun", &run)
            }
        };
        ends.and_then(Ends::reached).with_context(|| format!("{contender} does not come up"))
    }

    fn weft(&self, network: &str, option: &str) -> anyhow::Result<Ends> {
        let lab = self.weft.as_ref().context("no host has an agent")?;
        lab.create_network(&format!("{network} {option}"))?;
        let one = lab.host(1).container(&format!("{network}1"))?;
        let other = lab.host(2).container(&format!("{network}2"))?;
        one.attach(network, "")?;
        let attached = other.attach(network, "")?;
        let address = attached.ip4.context("no IPv4 address")?.into();
        Ok(Ends::of_containers(one, other, address, attached.mtu_bytes, Vec::new()))
    }

    /// The hosts between which `contender` carries.
    pub(crate) fn lab(&self, contender: Contender) -> &Lab {
        match (contender, &self.weft) {
            (Contender::Plain | Contender::Sealed, Some(lab)) => lab,
            _ => &self.bare,
        }
    }

    pub(crate) fn finish(self) {
        self.bare.finish();
        if let Some(lab) = self.weft {
            lab.finish();
        }
    }
}

/// A container of a host that forwards for it, for peers that carry IP and not Ethernet.
pub(super) fn routed(host: &Arc<Host>, index: u8, mtu_bytes: u16) -> anyhow::Result<Container> {
    let container = host.container("routed")?;
    let pid = container.pid();
    host.sh(&format!(
        "echo 1 >/proc/sys/net/ipv4/ip_forward
         ip link del v0 2>/dev/null || true
         ip link add v0 mtu {mtu_bytes} type veth peer name eth0 mtu {mtu_bytes} netns {pid}
         ip address add 10.78.{index}.1/24 dev v0
         ip link set v0 up"
    ))?;
    container.sh(&format!(
        "ip link set eth0 up
         ip address add 10.78.{index}.2/24 dev eth0
         ip route add default via 10.78.{index}.1"
    ))?;
    Ok(container)
}

/// Where `make bench-deps` puts it: beside the directories of the builds.
fn boringtun() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(2).unwrap_or_else(|| Path::new("."));
    let path = target.join("peers/bin/boringtun-cli");
    anyhow::ensure!(path.is_file(), "no {}: run `make bench-deps`", path.display());
    Ok(path)
}

/// What the underlay leaves to kernel VXLAN over IPv4.
const VXLAN_MTU_BYTES: u16 = 1450;
