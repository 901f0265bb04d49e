use std::{fs, net::IpAddr, time::Duration};

use anyhow::Context as _;
use weft_testbed::{Daemon, Lab, eventually};

use super::contender::{Ends, routed};

/// A container on each host, joined by two nebula nodes with what nebula configures by itself.
pub(super) fn start(lab: &Lab) -> anyhow::Result<Ends> {
    let pki = lab.dir().join("nebula");
    let dir = pki.display();
    let mut daemons = Vec::new();
    if !pki.exists() {
        fs::create_dir(&pki)?;
        lab.host(1).sh(&format!(
            "cd {dir}; nebula-cert ca -name bench
             for i in 1 2; do
               nebula-cert sign -name h$i -ip 10.79.0.$i/24 -subnets 10.78.$i.0/24
             done"
        ))?;
    }
    for index in [1, 2] {
        let (host, far) = (lab.host(index), 3 - index);
        let file = pki.join(format!("h{index}.yml"));
        let peer = lab.host(far).address();
        fs::write(&file, configuration(&format!("{dir}"), index, far, peer))?;
        let file = file.to_str().context("a lab's path is text")?;
        let daemon = Daemon::start(host, "nebula", &["nebula", "-config", file])?;
        eventually(Duration::from_secs(5), "nebula has its device", || {
            host.sh("ip route show dev nebula1 | grep -q 10.78")
                .map_err(|error| format!("{error:#}; it says: {}", daemon.log()))
        })?;
        daemons.push(daemon);
    }
    let (one, other) = (routed(lab.host(1), 1, MTU_BYTES)?, routed(lab.host(2), 2, MTU_BYTES)?);
    Ok(Ends::of_containers(one, other, IpAddr::from([10, 78, 2, 2]), MTU_BYTES, daemons))
}

fn configuration(pki: &str, index: u8, far: u8, peer: IpAddr) -> String {
    format!(
        r#"pki:
  ca: {pki}/ca.crt
  cert: {pki}/h{index}.crt
  key: {pki}/h{index}.key
static_host_map:
  "10.79.0.{far}": ["{peer}:4242"]
lighthouse:
  am_lighthouse: false
listen:
  host: 0.0.0.0
  port: 4242
tun:
  dev: nebula1
  unsafe_routes:
    - route: 10.78.{far}.0/24
      via: 10.79.0.{far}
firewall:
  outbound:
    - {{port: any, proto: any, host: any}}
  inbound:
    - {{port: any, proto: any, host: any}}
"#
    )
}

/// What nebula gives its device.
const MTU_BYTES: u16 = 1300;
