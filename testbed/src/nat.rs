use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    process::Command,
    time::Duration,
};

use crate::{
    command::Ran,
    holder::{HOLD, Holder},
};

/// A router that hides one host: it gives what the host sends its own address and another port,
/// lets in only answers, and forgets who was spoken to soon.
#[derive(Debug)]
pub(crate) struct Nat {
    holder: Holder,
    index: u8,
}

impl Nat {
    /// Builds it for host `index`, without a cable; it forgets UDP that pauses for `patience`.
    pub(crate) fn build(dir: &Path, index: u8, patience: Duration) -> anyhow::Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "bash", "-c", &format!("{SCRIPT}{HOLD}"), "nat"]);
        command.arg(patience.as_secs().to_string());
        let holder = Holder::start(command, &dir.join(format!("nat{index}.log")))?;
        Ok(Self { holder, index })
    }

    /// The address of host `index` behind its router.
    pub(crate) fn inner_address(index: u8) -> IpAddr {
        Ipv4Addr::new(192, 168, index, 2).into()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.holder.pid()
    }

    /// Runs a shell script in the router.
    pub(crate) fn sh(&self, script: &str) -> anyhow::Result<String> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid().to_string(), "--net", "--", "sh", "-ec", script]);
        Ran::run(command, script.to_owned())?.ok()
    }

    /// Gives the namespaces of process `pid`, the host's, an `eth0` behind the router.
    pub(crate) fn plug(&self, pid: u32, mtu_bytes: u16) -> anyhow::Result<()> {
        let (index, address) = (self.index, Self::inner_address(self.index));
        // The cable of a host that lost its power a moment ago may still be there.
        self.sh(&format!(
            "ip link del lan 2>/dev/null || true
             ip link add lan mtu {mtu_bytes} type veth \
                peer name eth0 address 02:98:00:00:00:{index:02x} mtu {mtu_bytes} netns {pid}
             ip address add 192.168.{index}.1/24 dev lan
             ip link set lan up
             nsenter --target {pid} --net ip -batch - <<END
link set lo up
link set eth0 up
address add {address}/24 dev eth0
route add default via 192.168.{index}.1 dev eth0
END"
        ))
        .map(drop)
    }

    pub(crate) fn keep(&mut self) -> anyhow::Result<()> {
        self.holder.keep()
    }
}

/// Ports are changed too, as by a router behind which several hosts use the same.
const SCRIPT: &str = r#"
set -eu
echo 1 >/proc/sys/net/ipv4/ip_forward
nft -f - <<END
table ip nat {
  chain out {
    type nat hook postrouting priority srcnat;
    oifname eth0 meta l4proto { tcp, udp } masquerade to :40000-49999
    oifname eth0 masquerade
  }
  chain pass {
    type filter hook forward priority filter; policy drop;
    iifname lan accept
    ct state established,related accept
  }
}
END
for state in nf_conntrack_udp_timeout nf_conntrack_udp_timeout_stream; do
  echo "$1" >/proc/sys/net/netfilter/$state
done
echo "ready $$"
"#;
