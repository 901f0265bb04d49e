//! Published ports: every host leads to every backend, and the backend sees who asks.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use weft_testbed::{Answer, By, Container, Echo, Lab, eventually};

const SOON: Duration = Duration::from_secs(10);
/// Where the containers serve, and at which port of the hosts.
const TARGET: u16 = 7000;
const PORT: u16 = 8080;

/// Three hosts, a backend of the service `web` on each, and a client on none of them.
struct Site {
    lab: Lab,
    backends: Vec<(Container, Echo)>,
    client: PathBuf,
}

impl Site {
    fn build(create: &str, publish: &str) -> anyhow::Result<Self> {
        let lab = Lab::cluster(3)?;
        lab.create_network(&format!("app --subnet 10.40.0.0/24 --subnet fd00:40::/64 {create}"))?;
        lab.underlay_sh("ip address add fd98::1/64 dev br0 nodad")?;
        for (index, host) in (1..).zip(lab.hosts()) {
            host.sh(&format!("ip address add fd98::1{index}/64 dev eth0 nodad"))?;
        }
        lab.host(1).weft("service create web --network app --vip none")?.ok()?;
        for protocol in ["tcp", "udp"] {
            let place = format!("--port {PORT} --protocol {protocol} {publish}");
            lab.host(1).weft(&format!("publish web {TARGET} {place}"))?.ok()?;
        }
        let backends = (1..=3).map(|index| backend(&lab, index, &format!("web{index}")));
        let backends = backends.collect::<anyhow::Result<_>>()?;
        let client = lab.underlay_namespace();
        Ok(Self { lab, backends, client })
    }

    /// The published port at host `index`, of both families.
    fn targets(&self, index: u8) -> [SocketAddr; 2] {
        let v6 = format!("fd98::1{index}").parse().expect("an address");
        [self.lab.host(index).address(), v6].map(|ip: IpAddr| SocketAddr::new(ip, PORT))
    }

    /// Asks so many times, each by a connection of its own; how often each backend answered.
    fn spread(&self, by: By, target: SocketAddr, times: u32) -> anyhow::Result<Spread> {
        let mut spread = Spread::default();
        for _ in 0..times {
            let Answer { name, client } = by.ask(&self.client, target)?;
            *spread.names.entry(name).or_default() += 1;
            *spread.clients.entry(client).or_default() += 1;
        }
        Ok(spread)
    }

    /// Waits until each backend answers by the port of each host.
    fn settle(&self) -> anyhow::Result<()> {
        for index in 1..=3 {
            for target in self.targets(index) {
                eventually(SOON, &format!("all backends answer at {target}"), || {
                    let spread = self.spread(By::Tcp, target, 12)?;
                    ensure!(spread.names.len() == self.backends.len(), "{spread:?}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Spread {
    names: BTreeMap<String, u32>,
    clients: BTreeMap<IpAddr, u32>,
}

impl Spread {
    /// Pearson's statistic against equal shares.
    fn chi_square(&self) -> f64 {
        let total: u32 = self.names.values().sum();
        let expected = f64::from(total) / self.names.len() as f64;
        self.names.values().map(|&seen| (f64::from(seen) - expected).powi(2) / expected).sum()
    }
}

fn backend(lab: &Lab, host: u8, name: &str) -> anyhow::Result<(Container, Echo)> {
    let container = lab.host(host).container(name)?;
    container.attach("app", "--service web")?;
    let echo = Echo::start(&container, TARGET)?;
    Ok((container, echo))
}

#[test]
fn every_host_spreads_connections_over_all_backends_which_see_the_client() -> anyhow::Result<()> {
    let site = Site::build("", "")?;
    site.settle()?;
    let clients: [IpAddr; 2] = [site.lab.router(), "fd98::1".parse()?];
    for index in 1..=3 {
        for (target, client) in site.targets(index).into_iter().zip(clients) {
            for by in [By::Tcp, By::Udp] {
                let spread = site.spread(by, target, 240)?;
                // Two degrees of freedom: one in a million is above by chance.
                let chi = spread.chi_square();
                ensure!(spread.names.len() == 3 && chi < 27.6, "{by:?} {target}: {chi} {spread:?}");
                ensure!(spread.clients.keys().eq([&client]), "{by:?} {target}: {spread:?}");
            }
        }
    }
    site.lab.finish();
    Ok(())
}

#[test]
fn an_encrypted_network_is_reached_in_the_same_way() -> anyhow::Result<()> {
    let site = Site::build("--encrypted", "")?;
    site.settle()?;
    for index in 1..=3 {
        for by in [By::Tcp, By::Udp] {
            let spread = site.spread(by, site.targets(index)[0], 60)?;
            ensure!(spread.names.len() == 3, "{by:?} h{index}: {spread:?}");
            ensure!(spread.clients.keys().eq([&site.lab.router()]), "{spread:?}");
        }
    }
    site.lab.finish();
    Ok(())
}

#[test]
fn a_host_and_its_containers_reach_a_published_port_of_their_own() -> anyhow::Result<()> {
    let site = Site::build("", "")?;
    site.settle()?;
    let host = site.lab.host(1).namespace()?;
    let inside = site.backends[0].0.namespace()?;
    for by in [By::Tcp, By::Udp] {
        for ip in [site.lab.host(1).address(), "127.0.0.1".parse()?, "fd98::11".parse()?] {
            by.ask(&host, SocketAddr::new(ip, PORT)).context("from the host itself")?;
        }
        for index in 1..=2 {
            let target = SocketAddr::new(site.lab.host(index).address(), PORT);
            by.ask(&inside, target).with_context(|| format!("from a container, h{index}"))?;
        }
    }
    site.lab.finish();
    Ok(())
}

#[test]
fn a_port_that_is_bound_to_loopback_is_for_the_host_alone() -> anyhow::Result<()> {
    let site = Site::build("", "--host-ip 127.0.0.1")?;
    let (host, here) = (site.lab.host(1).namespace()?, SocketAddr::from(([127, 0, 0, 1], PORT)));
    eventually(SOON, "the host reaches it", || By::Tcp.ask(&host, here))?;
    let outer = SocketAddr::new(site.lab.host(1).address(), PORT);
    ensure!(By::Tcp.ask(&site.client, outer).is_err(), "reached at the host's address");
    // A neighbour that routes the loopback network to the host gets nowhere.
    site.lab.underlay_sh(&format!(
        "sysctl -qw net.ipv4.conf.br0.route_localnet=1
         ip route replace 127.0.0.1/32 via {} dev br0 table 99
         ip rule add to 127.0.0.1/32 pref 1 lookup 99
         ip rule del pref 0; ip rule add pref 2 lookup local",
        site.lab.host(1).address()
    ))?;
    ensure!(By::Tcp.ask(&site.client, here).is_err(), "reached by a route");
    site.lab.finish();
    Ok(())
}

#[test]
fn a_host_that_is_switched_off_takes_nobody_with_it() -> anyhow::Result<()> {
    let mut site = Site::build("", "")?;
    site.settle()?;
    // Clients of one ingress do not notice that another goes, with the backend on a third.
    let [target, _] = site.targets(1);
    let asked = Instant::now();
    site.lab.host(2).power_off();
    site.backends.remove(1);
    let (mut last_failure, mut failures) = (Duration::ZERO, 0);
    while asked.elapsed() < Duration::from_secs(8) {
        if By::Tcp.ask(&site.client, target).is_err() {
            (last_failure, failures) = (asked.elapsed(), failures + 1);
        }
    }
    ensure!(
        last_failure < Duration::from_secs(5),
        "{failures} failed, the last at {last_failure:?}"
    );
    let spread = site.spread(By::Tcp, target, 60)?;
    ensure!(spread.names.keys().eq(["web1", "web3"]), "{spread:?}");
    ensure!(spread.clients.keys().eq([&site.lab.router()]), "{spread:?}");
    site.lab.finish();
    Ok(())
}

#[test]
fn a_udp_client_that_never_pauses_follows_its_backend() -> anyhow::Result<()> {
    let mut site = Site::build("", "")?;
    site.settle()?;
    let [target, _] = site.targets(1);
    let socket = weft_testbed::in_network_namespace(&site.client, || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        socket.connect(target)?;
        Ok(socket)
    })?;
    let ask = || {
        let mut buffer = [0; 512];
        socket.send(b"who?").ok()?;
        let length = socket.recv(&mut buffer).ok()?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        text.split(' ').next().map(str::to_owned)
    };
    let reached = |deadline: Duration| -> anyhow::Result<(String, Duration)> {
        let begin = Instant::now();
        let name = eventually(deadline, "an answer", || ask().context("silence"))?;
        Ok((name, begin.elapsed()))
    };
    // One backend after the other goes, the one that this client has; to the last.
    while !site.backends.is_empty() {
        let (name, took) = reached(Duration::from_secs(2))?;
        ensure!(took < Duration::from_secs(1), "{name} answers after {took:?}");
        let at = site.backends.iter().position(|(container, _)| container.name() == name);
        let (container, echo) = site.backends.remove(at.context("a backend that has gone")?);
        container.detach("app")?;
        drop(echo);
    }
    // While it goes on sending to none, one comes.
    ensure!(ask().is_none(), "answered by nobody");
    site.backends.push(backend(&site.lab, 2, "late")?);
    let (name, took) = reached(Duration::from_secs(2))?;
    ensure!(name == "late" && took < Duration::from_secs(1), "{name} answers after {took:?}");
    site.lab.finish();
    Ok(())
}
