use std::sync::Arc;

use anyhow::ensure;

use crate::{Container, Host};

/// A machine on a link of a host, which knows nothing of weft: at the other end of the host's
/// interface `lan0`. It is the gateway of 10.70.0.0/24 and fd00:70::/64, and has 198.51.100.7 behind
/// itself.
#[derive(Debug)]
pub struct Lan(Arc<Host>);

impl Lan {
    /// Makes the macvlan network `lan` on the link.
    pub const CREATE: &str = "network create -d macvlan -o parent=lan0 --subnet 10.70.0.0/24 \
        --subnet fd00:70::/64 --gateway 10.70.0.1 --gateway fd00:70::1 --ip-range 10.70.0.64/26 \
        --aux-address nas=10.70.0.65 lan";

    /// # Errors
    ///
    /// The host is off, or has such a link already.
    pub fn beside(host: &Arc<Host>) -> anyhow::Result<Self> {
        host.sh("ip netns add machine
             ip link add lan0 type veth peer name eth0 netns machine
             ip link set lan0 up
             ip -n machine link set lo up
             ip -n machine addr add 10.70.0.1/24 dev eth0
             ip -n machine addr add fd00:70::1/64 dev eth0 nodad
             ip -n machine addr add 198.51.100.7/32 dev lo
             ip -n machine link set eth0 up")?;
        Ok(Self(Arc::clone(host)))
    }

    /// Runs a command on the machine and returns what it printed.
    ///
    /// # Errors
    ///
    /// It fails.
    pub fn machine(&self, command: &str) -> anyhow::Result<String> {
        self.0.sh(&format!("ip netns exec machine {command}"))
    }

    /// What the host has of links and namespaces besides its underlay: to be compared.
    ///
    /// # Errors
    ///
    /// The host is off.
    pub fn belongings(&self) -> anyhow::Result<String> {
        self.0.sh("ip -o link | sed 's/ state .*//' | grep -v ' eth0@'; ls /run/netns")
    }

    /// Starts the containers `one` and `two` on `network`.
    ///
    /// # Errors
    ///
    /// They cannot be attached.
    pub fn pair(&self, network: &str) -> anyhow::Result<[Container; 2]> {
        let pair = [self.0.container("one")?, self.0.container("two")?];
        for container in &pair {
            container.attach(network, "")?;
        }
        Ok(pair)
    }

    /// Whether both reach each other at all addresses that they have on `network`.
    ///
    /// # Errors
    ///
    /// One does not reach the other.
    pub fn meet(one: &Container, two: &Container, network: &str) -> anyhow::Result<()> {
        for (from, to) in [(one, two), (two, one)] {
            let attachment = to.on(network)?;
            ensure!(attachment.ips().count() > 0, "{} has no address on {network}", to.name());
            attachment.ips().try_for_each(|ip| from.ping(&ip.to_string()).map(drop))?;
        }
        Ok(())
    }
}
