//! Services: declared on one host, reached from all.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use weft_testbed::{Answer, By, Container, Echo, Lab, Stop, eventually};

const SOON: Duration = Duration::from_secs(10);
/// What an agent knows of the others, on the disk of a host.
const REMEMBERED: &str = "/var/lib/weft/remembered.json";
/// Where the containers serve.
const TARGET: u16 = 7000;

/// Three hosts with a backend of `web` on each.
struct Site {
    lab: Lab,
    backends: Vec<(Container, Echo)>,
}

impl Site {
    fn build(create: &str) -> anyhow::Result<Self> {
        let lab = Lab::cluster(3)?;
        lab.create_network(&format!("app --subnet 10.40.0.0/24 --subnet fd00:40::/64 {create}"))?;
        let backends = (1..=3).map(|index| {
            let container = lab.host(index).container(&format!("web{index}"))?;
            container.attach("app", "--service web")?;
            let echo = Echo::start(&container, TARGET)?;
            Ok((container, echo))
        });
        let backends = backends.collect::<anyhow::Result<_>>()?;
        Ok(Self { lab, backends })
    }

    /// The virtual addresses of a service, once all hosts agree on them.
    fn vips(&self, service: &str) -> anyhow::Result<Vec<std::net::IpAddr>> {
        eventually(SOON, &format!("all hosts agree on {service}"), || {
            let of_host = |index| -> anyhow::Result<Vec<std::net::IpAddr>> {
                let status = inspect(&self.lab, index, service)?;
                let vips = status["vips"].as_array().context("no vips")?;
                Ok(vips.iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect())
            };
            let all: Vec<_> = (1..=3).map(of_host).collect::<anyhow::Result<_>>()?;
            ensure!(!all[0].is_empty() && all.iter().all(|vips| *vips == all[0]), "{all:?}");
            Ok(all[0].clone())
        })
    }

    /// Asks so many times from one backend; how often each answered, and whom it saw.
    fn spread(
        &self,
        from: usize,
        by: By,
        target: SocketAddr,
        times: u32,
    ) -> anyhow::Result<Spread> {
        let mut spread = Spread::default();
        let inside = self.backends[from].0.namespace()?;
        for _ in 0..times {
            let Answer { name, client } = by.ask(&inside, target)?;
            *spread.names.entry(name).or_default() += 1;
            *spread.clients.entry(client).or_default() += 1;
        }
        Ok(spread)
    }

    fn settle(&self, target: SocketAddr, count: usize) -> anyhow::Result<()> {
        for from in 0..self.backends.len() {
            eventually(SOON, &format!("{count} backends answer {from} at {target}"), || {
                let spread = self.spread(from, By::Tcp, target, 30)?;
                ensure!(spread.names.len() == count, "{spread:?}");
                Ok(())
            })?;
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Spread {
    names: BTreeMap<String, u32>,
    clients: BTreeMap<std::net::IpAddr, u32>,
}

impl Spread {
    /// Pearson's statistic against equal shares.
    fn chi_square(&self) -> f64 {
        let total: u32 = self.names.values().sum();
        let expected = f64::from(total) / self.names.len() as f64;
        self.names.values().map(|&seen| (f64::from(seen) - expected).powi(2) / expected).sum()
    }
}

fn inspect(lab: &Lab, index: u8, service: &str) -> anyhow::Result<Value> {
    let found = lab.host(index).weft_json(&format!("service inspect {service}"))?;
    Ok(found[0].clone())
}

/// The service is unknown at every host.
fn is_gone(lab: &Lab, service: &str) -> anyhow::Result<()> {
    eventually(SOON, &format!("{service} is removed everywhere"), || {
        for host in lab.hosts() {
            let all = host.weft_json("service ls")?;
            let found =
                all.as_array().context("no list")?.iter().find(|one| one["name"] == service);
            let declared = found.is_some_and(|one| one["mode"] != "implied");
            ensure!(!declared, "{}: {all}", host.name());
        }
        Ok(())
    })
}

#[test]
fn every_client_reaches_all_backends_by_one_address_and_is_seen_itself() -> anyhow::Result<()> {
    let site = Site::build("")?;
    site.lab
        .host(2)
        .weft("service create web --network app --port 80:7000 --port 80:7000/udp")?
        .ok()?;
    let vips = site.vips("web")?;
    ensure!(vips.len() == 2, "one of each family: {vips:?}");
    for vip in vips {
        let target = SocketAddr::new(vip, 80);
        site.settle(target, 3)?;
        for from in 0..3 {
            let own: Vec<_> = site.backends[from].0.on("app")?.ips().collect();
            for by in [By::Tcp, By::Udp] {
                let spread = site.spread(from, by, target, 120)?;
                // Two degrees of freedom: one in a million is above by chance.
                let chi = spread.chi_square();
                ensure!(spread.names.len() == 3 && chi < 27.6, "{by:?} {target}: {chi} {spread:?}");
                // A backend that asks itself sees the gateway, else it would answer itself.
                let strangers = spread.clients.iter().filter(|(ip, _)| !own.contains(ip));
                let strange: u32 = strangers.map(|(_, count)| count).sum();
                let itself = spread.names[site.backends[from].0.name()];
                ensure!(strange <= itself, "{by:?} {target}: {spread:?}");
            }
        }
    }
    site.lab.finish();
    Ok(())
}

#[test]
fn a_service_is_changed_and_removed_by_any_host() -> anyhow::Result<()> {
    let site = Site::build("")?;
    let (first, last) = (site.lab.host(1), site.lab.host(3));
    first.weft("service create web --network app --vip 10.40.0.200 --port 80:7000")?.ok()?;
    let vips = site.vips("web")?;
    ensure!(vips.contains(&"10.40.0.200".parse()?), "{vips:?}");
    let target = SocketAddr::new(vips[0], 80);
    site.settle(target, 3)?;

    // The address is known by its owner, everywhere.
    last.weft("service create other --network app --vip 10.40.0.200")?
        .refused(1, &["service web"])?;
    let container = last.container("thief")?;
    container.try_attach("app", "--ip 10.40.0.200")?.refused(1, &["service web"])?;
    first.weft("service create web --network app")?.refused(1, &["declared already"])?;

    last.weft("service update web --port 81:7000 --label-add tier=front")?.ok()?;
    ensure!(site.vips("web")? == vips, "the address stays");
    site.settle(SocketAddr::new(vips[0], 81), 3)?;
    let inside = site.backends[0].0.namespace()?;
    ensure!(By::Tcp.ask(&inside, target).is_err(), "port 80 is still there");
    let status = inspect(&site.lab, 1, "web")?;
    ensure!(status["labels"]["tier"] == "front" && status["writer"] == "h3", "{status}");

    last.weft("service rm web")?.ok()?;
    is_gone(&site.lab, "web")?;
    eventually(SOON, "the address is silent", || {
        let answer = By::Tcp.ask(&inside, SocketAddr::new(vips[0], 81));
        ensure!(answer.is_err(), "{answer:?}");
        Ok(())
    })?;
    // Its holder gives it back, and gives it out again to whoever names it.
    eventually(SOON, "the address is free", || {
        last.weft("service create again --network app --vip 10.40.0.200")?.ok()
    })?;
    site.lab.finish();
    Ok(())
}

#[test]
fn of_two_hosts_that_declare_one_name_at_once_one_wins_and_the_other_gives_back()
-> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    lab.host(1).weft("service create first --network app --vip none")?.ok()?;
    lab.partition(&[1], &[2, 3])?;
    let mut declared = Vec::new();
    for index in [1, 2] {
        let at = lab.host(index);
        at.weft("service create web --network app")?.ok()?;
        declared.push(inspect(&lab, index, "web")?["vips"][0].as_str().context("none")?.to_owned());
    }
    lab.heal()?;
    lab.wait_all_alive(Duration::from_secs(30))?;
    let winner = eventually(SOON, "all agree", || {
        let all = (1..=3).map(|index| {
            let status = inspect(&lab, index, "web")?;
            Ok(status["vips"][0].as_str().context("none")?.to_owned())
        });
        let all: Vec<String> = all.collect::<anyhow::Result<_>>()?;
        ensure!(all.iter().all(|one| *one == all[0]), "{all:?}");
        Ok(all[0].clone())
    })?;
    let lost = declared.iter().find(|vip| **vip != winner).context("two addresses")?;
    eventually(SOON, "the other address is free", || {
        lab.host(3).weft(&format!("service create other --network app --vip {lost}"))?.ok()
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn services_go_on_without_their_agents_and_with_the_next_ones() -> anyhow::Result<()> {
    let site = Site::build("")?;
    site.lab.host(1).weft("service create web --network app --port 80:7000 --check tcp:7000 --check-interval 500ms")?.ok()?;
    site.lab.host(1).weft("publish web 7000 --port 8080")?.ok()?;
    let target = SocketAddr::new(site.vips("web")?[0], 80);
    site.settle(target, 3)?;
    for index in [1, 2] {
        site.lab.host(index).stop_agent(Stop::Killed)?;
    }
    let inside = site.backends[0].0.namespace()?;
    for _ in 0..30 {
        By::Tcp.ask(&inside, target).context("without an agent")?;
    }
    for index in [1, 2] {
        site.lab.host(index).start_agent()?;
        for _ in 0..60 {
            By::Tcp.ask(&inside, target).context("while an agent starts")?;
        }
    }
    site.lab.wait_all_alive(Duration::from_secs(30))?;
    site.settle(target, 3)?;
    ensure!(site.vips("web")?.contains(&target.ip()), "another address");
    site.lab.finish();
    Ok(())
}

#[test]
fn a_host_that_has_acknowledged_a_drain_keeps_its_word_whatever_it_remembers() -> anyhow::Result<()>
{
    let site = Site::build("")?;
    let (drained, host) = (site.lab.host(1), site.lab.host(3));
    host.weft("service create web --network app --port 80:7000")?.ok()?;
    let target = SocketAddr::new(site.vips("web")?[0], 80);
    site.settle(target, 3)?;
    host.sh(&format!("cp {REMEMBERED} {REMEMBERED}.before"))?;
    drained.weft("drain web1")?.ok()?;

    // Both end before the one has written down what the other said last.
    host.stop_agent(Stop::Killed)?;
    drained.stop_agent(Stop::Killed)?;
    host.sh(&format!("cp {REMEMBERED}.before {REMEMBERED}"))?;
    host.start_agent()?;
    let inside = site.backends[2].0.namespace()?;
    let start = std::time::Instant::now();
    let mut answers = BTreeMap::new();
    while start.elapsed() < Duration::from_secs(5) {
        let Answer { name, .. } = By::Tcp.ask(&inside, target)?;
        ensure!(name != "web1", "a new connection after {:?}: {answers:?}", start.elapsed());
        *answers.entry(name).or_insert(0) += 1;
    }
    ensure!(answers.len() == 2, "{answers:?}");
    drained.start_agent()?;
    site.lab.wait_all_alive(Duration::from_secs(30))?;
    drained.weft("drain web1 --undo")?.ok()?;
    site.settle(target, 3)?;
    site.lab.finish();
    Ok(())
}

#[test]
fn a_port_has_one_owner_who_is_named() -> anyhow::Result<()> {
    let site = Site::build("")?;
    let (one, two) = (site.lab.host(1), site.lab.host(2));
    one.weft("publish web 7000 --port 8080")?.ok()?;
    let status = inspect(&site.lab, 1, "web")?;
    ensure!(status["mode"] == "dnsrr", "published without a virtual address: {status}");
    // The very same once more is no change.
    one.weft("publish web 7000 --port 8080")?.ok()?;
    eventually(SOON, "the other host has heard", || inspect(&site.lab, 2, "web"))?;
    two.weft("service create db --network app --vip none")?.ok()?;
    two.weft("publish db 7000 --port 8080")?.refused(1, &["8080", "service web"])?;
    let container = two.container("lone")?;
    container.try_attach("app", "-p 8080:7000")?.refused(1, &["8080", "service web"])?;

    container.attach("app", "-p 8081:7000 -p 7000/udp")?;
    let listed = two.weft("port lone")?.ok()?;
    ensure!(listed.contains("7000/tcp -> 0.0.0.0:8081"), "{listed}");
    ensure!(listed.lines().any(|line| line.starts_with("7000/udp -> 0.0.0.0:")), "{listed}");
    two.weft("publish db 7000 --port 8081")?.refused(1, &["container lone"])?;
    one.weft("unpublish web 7000")?.ok()?;
    eventually(SOON, "the port is free", || two.weft("publish db 7000 --port 8080")?.ok())?;
    site.lab.finish();
    Ok(())
}

#[test]
fn a_port_of_a_process_is_refused_and_a_thousand_are_taken_at_once() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let host = lab.host(1);
    let process = host.inside(|| Ok(std::net::TcpListener::bind("0.0.0.0:20500")?))?;
    host.weft("service create web --network app --vip none")?.ok()?;
    host.weft("publish web 7000 --port 20500")?.refused(1, &["20500", "in use"])?;
    let container = host.container("lone")?;
    let many = "-p 20000-20999:20000-20999";
    container.try_attach("app", many)?.refused(1, &["20500", "in use"])?;
    container.try_attach("app", "-p 20000-21100:20000-21100")?.refused(2, &["1101", "1024"])?;
    drop(process);
    let start = std::time::Instant::now();
    container.attach("app", many)?;
    let took = start.elapsed();
    ensure!(took < SOON, "1,000 ports after {took:?}");
    let _echo = Echo::start(&container, 20_999)?;
    let client = lab.underlay_namespace();
    let at = SocketAddr::new(host.address(), 20_999);
    eventually(SOON, "the last port is open", || By::Tcp.ask(&client, at))?;
    lab.finish();
    Ok(())
}

#[test]
fn a_port_of_one_container_is_open_on_its_own_host_alone() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    lab.create_network("local --driver bridge --subnet 10.41.0.0/24").ok();
    let container = lab.host(1).container("lone")?;
    container.attach("app", "-p 8081:7000")?;
    let _echo = Echo::start(&container, TARGET)?;
    let client = lab.underlay_namespace();
    let at = |index| SocketAddr::new(lab.host(index).address(), 8081);
    let answer = eventually(SOON, "the port is open", || By::Tcp.ask(&client, at(1)))?;
    ensure!(answer.name == "lone" && answer.client == lab.router(), "{answer:?}");
    ensure!(By::Tcp.ask(&client, at(2)).is_err(), "open on the other host");
    container.detach("app")?;
    eventually(SOON, "the port is closed", || {
        let answer = By::Tcp.ask(&client, at(1));
        ensure!(answer.is_err(), "{answer:?}");
        Ok(())
    })?;
    lab.finish();
    Ok(())
}
