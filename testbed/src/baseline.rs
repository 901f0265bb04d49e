//! The topology that weft makes, made by hand with `ip` and `bridge`: what throughput is measured
//! against.

use std::{net::IpAddr, sync::Arc};

use anyhow::Context as _;

use crate::{Container, Host, Lab};

/// A container on each of the first two hosts of a lab, on one VXLAN network.
#[derive(Debug)]
pub struct Baseline {
    pub one: Container,
    pub other: Container,
    pub address_of_other: IpAddr,
}

impl Baseline {
    /// Builds it on a lab without agents, for which `mtu_bytes` is the inner MTU.
    ///
    /// As weft does: a namespace for the network with a bridge and a VXLAN link that was made in
    /// the host's namespace; no learning; permanent FDB and neighbour entries.
    ///
    /// # Errors
    ///
    /// A command fails.
    pub fn build(lab: &Lab, mtu_bytes: u16) -> anyhow::Result<Self> {
        let one = lab.host(1).container("hand1")?;
        let other = lab.host(2).container("hand2")?;
        let far = address(2).parse().context("an address")?;
        make(lab.host(1), &one, 1, lab.host(2).address(), mtu_bytes)?;
        make(lab.host(2), &other, 2, lab.host(1).address(), mtu_bytes)?;
        one.ping(&address(2))?;
        Ok(Self { one, other, address_of_other: far })
    }
}

fn make(
    host: &Arc<Host>,
    container: &Container,
    index: u8,
    peer: IpAddr,
    mtu: u16,
) -> anyhow::Result<()> {
    let (local, pid) = (host.address(), container.pid());
    let (own_ip, own_mac) = (address(index), mac(index));
    let (peer_ip, peer_mac) = (address(3 - index), mac(3 - index));
    host.sh(&format!(
        "ip netns add hand
         ip link add vx type vxlan id 77 local {local} dstport 4789 nolearning proxy
         ip link set vx netns hand
         ip -n hand link add br0 type bridge mcast_snooping 0
         ip -n hand link set vx mtu {mtu} master br0
         ip netns exec hand bridge link set dev vx learning off
         ip -n hand link add v0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pid}
         ip -n hand link set v0 master br0 up
         ip -n hand link set vx up
         ip -n hand link set br0 mtu {mtu} up
         ip netns exec hand bridge fdb append {peer_mac} dev vx dst {peer} self permanent
         ip -n hand neigh replace {peer_ip} lladdr {peer_mac} dev vx nud permanent"
    ))?;
    container.sh(&format!(
        "ip link set eth0 address {own_mac} up; ip address add {own_ip}/24 dev eth0"
    ))?;
    Ok(())
}

fn address(index: u8) -> String {
    format!("10.77.0.{index}")
}

fn mac(index: u8) -> String {
    format!("02:00:00:00:77:{index:02x}")
}
