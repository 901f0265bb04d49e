//! The ways by which a client's connection gets to a backend.

use std::{fmt, fs, sync::Arc, time::Duration};

use anyhow::Context as _;
use weft_testbed::{Container, Daemon, Host, Lab, eventually};

/// One way, and a row of the tables.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Way {
    /// From container to container on another host, at its own address.
    Direct,
    /// The same, to a backend at the service's virtual address.
    Vip,
    /// From outside to a container of another hand's, by a route through its host.
    Routed,
    /// From outside to a published port, the backend on the host that is asked.
    Ingress,
    /// The backend on another host.
    Remote,
    Haproxy,
    DockerProxy,
}

impl Way {
    pub(super) const ALL: [Self; 7] = [
        Self::Direct,
        Self::Vip,
        Self::Routed,
        Self::Ingress,
        Self::Remote,
        Self::Haproxy,
        Self::DockerProxy,
    ];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct, host to host",
            Self::Vip => "weft virtual IP",
            Self::Routed => "routed, no translation",
            Self::Ingress => "weft ingress",
            Self::Remote => "weft ingress, remote",
            Self::Haproxy => "HAProxy, TCP mode",
            Self::DockerProxy => "docker-proxy",
        })
    }
}

/// A container that hangs on its host by a plain veth: what a router, HAProxy and docker-proxy have
/// behind them.
#[derive(Debug)]
pub(super) struct Handmade {
    pub(super) container: Container,
    pub(super) proxies: Vec<Daemon>,
}

impl Handmade {
    pub(super) const ADDRESS: &str = "10.88.0.2";
    /// Of the host, one for each proxy.
    pub(super) const HAPROXY: &str = "10.99.0.201";
    pub(super) const DOCKER_PROXY: &str = "10.99.0.202";

    /// Makes it on the first host; the third one is the client.
    pub(super) fn build(lab: &Lab) -> anyhow::Result<Self> {
        let (host, client) = (lab.host(1), lab.host(3));
        let container = host.container("handmade")?;
        let (address, pid) = (Self::ADDRESS, container.pid());
        host.sh(&format!(
            "ip link add hand0 type veth peer name eth0 netns {pid}
             ip address add 10.88.0.1/30 dev hand0
             ip link set hand0 up
             ip address add {}/24 dev eth0
             ip address add {}/24 dev eth0
             sysctl -qw net.ipv4.ip_forward=1",
            Self::HAPROXY,
            Self::DOCKER_PROXY,
        ))?;
        container.sh(&format!(
            "ip address add {address}/30 dev eth0
             ip link set eth0 up
             ip route add default via 10.88.0.1"
        ))?;
        client.sh(&format!("ip route add {address}/32 via {}", host.address()))?;
        let mut proxies = vec![haproxy(host)?];
        for port in PORTS {
            let name = format!("docker-proxy-{port}");
            let port = port.to_string();
            let argv = [
                "docker-proxy",
                "-proto",
                "tcp",
                "-host-ip",
                Self::DOCKER_PROXY,
                "-host-port",
                &port,
                "-container-ip",
                address,
                "-container-port",
                &port,
            ];
            // It tells its parent by descriptor 3 that it listens.
            let line = format!("exec {} 3>/dev/null", argv.join(" "));
            proxies.push(Daemon::start(host, &name, &["sh", "-c", &line])?);
        }
        for ip in [Self::HAPROXY, Self::DOCKER_PROXY] {
            for port in PORTS {
                eventually(
                    Duration::from_secs(5),
                    &format!("a proxy listens at {ip}:{port}"),
                    || host.sh(&format!("ss -tlnH 'src {ip} and sport = {port}' | grep -q {port}")),
                )?;
            }
        }
        Ok(Self { container, proxies })
    }
}

/// What is served: nginx and iperf3.
pub(super) const PORTS: [u16; 2] = [80, 5201];

fn haproxy(host: &Arc<Host>) -> anyhow::Result<Daemon> {
    let mut config = "global\n maxconn 8192\ndefaults\n mode tcp\n timeout connect 5s\n \
                      timeout client 60s\n timeout server 60s\n"
        .to_owned();
    for port in PORTS {
        let (at, to) = (Handmade::HAPROXY, Handmade::ADDRESS);
        config += &format!("listen p{port}\n bind {at}:{port}\n server s {to}:{port}\n");
    }
    let path = host.dir().join("haproxy.cfg");
    fs::write(&path, config).with_context(|| format!("cannot write {}", path.display()))?;
    Daemon::start(host, "haproxy", &["haproxy", "-db", "-f", &path.display().to_string()])
}
