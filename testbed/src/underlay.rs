use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::Context as _;

use crate::{
    command::Ran,
    holder::{HOLD, Holder, network_namespace_of},
};

/// The address family of the underlay; one in a lab, so that nothing can quietly use the other.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Family {
    #[default]
    V4,
    V6,
}

impl Family {
    /// The underlay address of host `index`, counted from 1; 0 is the router's.
    pub(crate) fn address(self, index: u8) -> IpAddr {
        match (self, index) {
            (Self::V4, 0) => Ipv4Addr::new(10, 99, 0, 1).into(),
            (Self::V4, _) => Ipv4Addr::new(10, 99, 0, 10 + index).into(),
            (Self::V6, 0) => Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 1, 0).into(),
            (Self::V6, _) => {
                Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 0x10 + u16::from(index)).into()
            }
        }
    }

    pub(crate) fn prefix_len(self) -> u8 {
        match self {
            Self::V4 => 24,
            Self::V6 => 64,
        }
    }

    /// What `ip address add` needs so that the address is usable at once.
    fn nodad(self) -> &'static str {
        match self {
            Self::V4 => "",
            Self::V6 => " nodad",
        }
    }
}

/// What the cables of the underlay do with super-packets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Wire {
    /// They pass whole, as a veth passes them: like a network card that offloads everything.
    #[default]
    Plain,
    /// The sender's kernel cuts each into packets of the MTU, and the receiver's may gather them
    /// again: like a network card without segmentation offloads.
    Segmenting,
}

/// One Ethernet segment: a bridge in a namespace of its own, a port for each host.
#[derive(Debug)]
pub(crate) struct Underlay {
    holder: Holder,
    family: Family,
    wire: Wire,
    ports: BTreeMap<u8, Port>,
}

/// What happens to packets that a host sends.
#[derive(Debug, Default)]
struct Port {
    drop_to: BTreeSet<IpAddr>,
    loss_percent: u8,
    /// Larger IP packets are dropped, by their destination; `None` is every destination.
    largest: BTreeMap<Option<IpAddr>, u16>,
}

impl Underlay {
    /// When the lab's process ends, the holder removes `dir` too.
    pub(crate) fn build(dir: &Path, family: Family, wire: Wire) -> anyhow::Result<Self> {
        let mut command = Command::new("unshare");
        let address = family.address(0);
        let length = family.prefix_len();
        command.args(["--net", "bash", "-c", &format!("{SCRIPT}{HOLD}{FAREWELL}"), "underlay"]);
        command.arg(format!("{address}/{length}")).arg(dir).arg(family.nodad());
        let holder = Holder::start(command, &dir.join("underlay.log"))?;
        Ok(Self { holder, family, wire, ports: BTreeMap::new() })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.holder.pid()
    }

    pub(crate) fn namespace(&self) -> PathBuf {
        network_namespace_of(self.pid())
    }

    /// Runs a shell script in the underlay's namespace.
    pub(crate) fn sh(&self, script: &str) -> anyhow::Result<String> {
        Ran::run(self.enter("sh", &["-ec", script]), script.to_owned())?.ok()
    }

    /// Gives the namespaces of process `pid` an `eth0` on the segment, with the same MAC each time.
    pub(crate) fn plug(&mut self, index: u8, pid: u32, mtu_bytes: u16) -> anyhow::Result<()> {
        let router = self.family.address(0);
        let mac = mac(index);
        self.sh(&format!(
            "ip link add p{index} mtu {mtu_bytes} type veth \
                peer name eth0 address {mac} mtu {mtu_bytes} netns {pid}
             ip link set p{index} master br0 up
             {wire}",
            wire = self.switch_offloads(&format!("p{index}"), "off"),
        ))?;
        self.furnish(index, pid, &format!("route add default via {router} dev eth0"))?;
        self.ports.insert(index, Port::default());
        self.apply()
    }

    /// Takes two hosts, given by index and process id, off the segment and links them directly: a
    /// switch would spend CPU that the hosts are meant to have.
    pub(crate) fn link_directly(
        &mut self,
        one: (u8, u32),
        other: (u8, u32),
        mtu_bytes: u16,
    ) -> anyhow::Result<()> {
        for (index, _) in [one, other] {
            self.sh(&format!("ip link del p{index}"))?;
            self.ports.remove(&index);
        }
        let (near, far) = (one.1, other.1);
        let (near_mac, far_mac) = (mac(one.0), mac(other.0));
        self.sh(&format!(
            "ip link add eth0 address {near_mac} mtu {mtu_bytes} netns {near} type veth \
                peer name eth0 address {far_mac} mtu {mtu_bytes} netns {far}"
        ))?;
        self.furnish(one.0, one.1, "")?;
        self.furnish(other.0, other.1, "")
    }

    /// Gives the `eth0` of the namespaces of process `pid` its address and its wire.
    fn furnish(&self, index: u8, pid: u32, routes: &str) -> anyhow::Result<()> {
        let address = self.family.address(index);
        let length = self.family.prefix_len();
        let nodad = self.family.nodad();
        self.sh(&format!(
            "nsenter --target {pid} --net sh -ec '
{wire}
ip -batch - <<END
link set lo up
link set eth0 up
address add {address}/{length} dev eth0{nodad}
{routes}
END'",
            wire = self.switch_offloads("eth0", "on"),
        ))
        .map(drop)
    }

    /// The command that makes an interface an end of the wire. Only a host gathers what it receives:
    /// a switch that did would send super-packets on.
    fn switch_offloads(&self, interface: &str, gro: &str) -> String {
        match self.wire {
            Wire::Plain => String::new(),
            Wire::Segmenting => format!(
                "ethtool -K {interface} tso off gso off tx-udp-segmentation off gro {gro} >/dev/null"
            ),
        }
    }

    /// Pulls or plugs the cable of a host: its interface loses its carrier and keeps its addresses.
    pub(crate) fn set_link(&self, index: u8, up: bool) -> anyhow::Result<()> {
        let state = if up { "up" } else { "down" };
        self.sh(&format!("ip link set p{index} {state}")).map(drop)
    }

    /// Loses `percent` of the packets that a host sends.
    pub(crate) fn set_loss(&mut self, index: u8, percent: u8) -> anyhow::Result<()> {
        self.ports.entry(index).or_default().loss_percent = percent;
        self.apply()
    }

    /// Drops, in both directions, what the hosts of one side send to those of the other.
    pub(crate) fn separate(&mut self, one: &[u8], other: &[u8]) -> anyhow::Result<()> {
        for (&a, &b) in one.iter().flat_map(|a| other.iter().map(move |b| (a, b))) {
            let (to_a, to_b) = (self.family.address(a), self.family.address(b));
            self.ports.entry(a).or_default().drop_to.insert(to_b);
            self.ports.entry(b).or_default().drop_to.insert(to_a);
        }
        self.apply()
    }

    /// Drops IP packets of more than `bytes` that a host sends or is sent, and tells nobody: a
    /// path with a smaller MTU in its middle. `None` ends it.
    pub(crate) fn narrow(&mut self, index: u8, bytes: Option<u16>) -> anyhow::Result<()> {
        let narrowed = self.family.address(index);
        for (&at, port) in &mut self.ports {
            let to = (at != index).then_some(narrowed);
            match bytes {
                Some(bytes) => port.largest.insert(to, bytes),
                None => port.largest.remove(&to),
            };
        }
        self.apply()
    }

    /// Ends every separation, every loss and every narrow place.
    pub(crate) fn heal(&mut self) -> anyhow::Result<()> {
        self.ports.values_mut().for_each(|port| *port = Port::default());
        self.apply()
    }

    pub(crate) fn keep(&mut self) -> anyhow::Result<()> {
        self.holder.keep()
    }

    fn apply(&self) -> anyhow::Result<()> {
        let mut process = self
            .enter("nft", &["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot start nft")?;
        let script = script(&self.ports);
        process.stdin.take().context("nft has no input")?.write_all(script.as_bytes())?;
        let status = process.wait()?;
        anyhow::ensure!(status.success(), "nft refuses the rules of the underlay:\n{script}");
        Ok(())
    }

    fn enter(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid().to_string(), "--net", "--", program]).args(args);
        command
    }
}

fn mac(index: u8) -> String {
    format!("02:99:00:00:00:{index:02x}")
}

/// Renders the whole table; replacing it is one transaction.
///
/// At the ports' ingress, because not every kernel can track or match addresses on a bridge.
fn script(ports: &BTreeMap<u8, Port>) -> String {
    let mut script = "table netdev underlay\ndelete table netdev underlay\n".to_owned();
    script.push_str("table netdev underlay {\n");
    for (index, Port { drop_to, loss_percent, largest }) in ports {
        let _ = writeln!(script, " chain p{index} {{");
        let _ = writeln!(script, "  type filter hook ingress device p{index} priority 0;");
        for address in drop_to {
            let family = if address.is_ipv4() { "ip" } else { "ip6" };
            let _ = writeln!(script, "  {family} daddr {address} drop");
        }
        for (address, bytes) in largest {
            let to = address.map(|address| match address {
                IpAddr::V4(address) => format!("ip daddr {address} "),
                IpAddr::V6(address) => format!("ip6 daddr {address} "),
            });
            let _ = writeln!(script, "  {}meta length > {bytes} drop", to.unwrap_or_default());
        }
        // ARP is spared: a neighbour entry that fails would lose all for a while.
        match loss_percent {
            0 => {}
            1..100 => {
                let chance = format!("numgen random mod 100 < {loss_percent}");
                let _ = writeln!(script, "  meta protocol {{ ip, ip6 }} {chance} drop");
            }
            100.. => script.push_str("  meta protocol { ip, ip6 } drop\n"),
        }
        script.push_str(" }\n");
    }
    script.push_str("}\n");
    script
}

/// The bridge's MTU is set by hand, or it would follow that of its lowest port.
const SCRIPT: &str = r#"
set -eu
ip link set lo up
# A switch has no firewall.
for setting in /proc/sys/net/bridge/bridge-nf-call-*; do
  [ ! -e "$setting" ] || echo 0 >"$setting"
done
ip link add br0 mtu 1500 type bridge mcast_snooping 0
ip link set br0 mtu 1500 up
ip address add "$1" dev br0 $3
echo "ready $$"
"#;

/// Hosts that end at the same moment may still write.
const FAREWELL: &str = r#"
for attempt in 1 2 3 4 5 6 7 8 9 10; do rm -rf "$2" && break; sleep 0.2; done 2>/dev/null
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_separated_port_drops_by_address_and_a_lossy_one_by_chance() {
        let cut = Port { drop_to: [Family::V4.address(2)].into(), ..Port::default() };
        let lossy = Port { loss_percent: 5, ..Port::default() };
        let script = script(&[(1, cut), (2, lossy)].into());
        assert!(script.contains("device p1 priority 0;\n  ip daddr 10.99.0.12 drop"), "{script}");
        assert!(script.contains("mod 100 < 5 drop"), "{script}");
    }
}
