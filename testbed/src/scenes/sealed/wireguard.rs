use std::{net::IpAddr, time::Duration};

use weft_testbed::{Daemon, Lab, eventually};

use super::contender::{Ends, routed};

/// A container on each host, joined by two WireGuard processes: `argv`, to which the name of the
/// interface is added.
pub(super) fn start(lab: &Lab, name: &str, argv: &[&str]) -> anyhow::Result<Ends> {
    let mut daemons = Vec::new();
    let mut keys = Vec::new();
    for host in lab.hosts() {
        daemons.push(Daemon::start(host, name, &[argv, &["wg0"]].concat())?);
        keys.push(host.sh("umask 077; wg genkey >/run/wg.key; wg pubkey </run/wg.key")?);
    }
    for (index, daemon) in [1, 2].into_iter().zip(&daemons) {
        let (host, far) = (lab.host(index), 3 - index);
        let (peer, key) = (lab.host(far).address(), &keys[usize::from(far) - 1]);
        let configure = format!(
            "wg set wg0 listen-port 51820 private-key /run/wg.key \
                peer {key} endpoint {peer}:51820 allowed-ips 10.78.{far}.0/24,10.79.0.{far}/32"
        );
        let what = format!("{name} on {} takes its configuration", host.name());
        eventually(Duration::from_secs(5), &what, || {
            host.sh(&configure).map_err(|error| format!("{error:#}; it says: {}", daemon.log()))
        })?;
        host.sh(&format!(
            "ip address add 10.79.0.{index}/24 dev wg0
             ip link set wg0 mtu {MTU_BYTES} up
             ip route add 10.78.{far}.0/24 dev wg0"
        ))?;
    }
    let (one, other) = (routed(lab.host(1), 1, MTU_BYTES)?, routed(lab.host(2), 2, MTU_BYTES)?);
    Ok(Ends::of_containers(one, other, IpAddr::from([10, 78, 2, 2]), MTU_BYTES, daemons))
}

/// What wg-quick(8) sets over an underlay of 1500 bytes.
const MTU_BYTES: u16 = 1420;
