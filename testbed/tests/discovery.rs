//! Who finds what: hosts on networks, scraping by the real Prometheus, proxies that follow DNS.
//! `deploy/deps.sh web` installs the programs.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use weft_testbed::{Container, Daemon, Host, Lab, Stop, WebServer, eventually};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_host_is_on_a_network_until_it_is_taken_off_whatever_ends_meanwhile() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    lab.create_network("db --subnet 10.41.0.0/24")?;
    let (one, two) = (lab.host(1), lab.host(2));
    let far = two.container("far")?;
    far.attach("app", "")?;
    let near = one.container("near")?;
    near.attach("app", "")?;

    one.weft("expose app db")?.ok()?;
    let own = address(one, "app")?;
    one.weft(&format!("expose app --ip {own}"))?.ok()?;
    ensure!(address(one, "app")? == own);
    one.weft("expose app --ip 10.40.0.77")?.refused(1, &["app", &own, "10.40.0.77", "hide"])?;
    let check = |what: &str, containers: &[&Container]| -> anyhow::Result<()> {
        for container in containers {
            for ip in container.on("app")?.ips() {
                let ip = ip.to_string();
                eventually(SOON, &format!("{what}: host to {}", container.name()), || {
                    one.exec(&["ping", "-n", "-c1", "-W1", &ip])?.ok()
                })?;
            }
            container.reaches(&own, SOON).with_context(|| what.to_owned())?;
            // By its node's name.
            eventually(SOON, &format!("{what}: its name"), || {
                let ips = container.resolve("h1")?;
                ensure!(ips.iter().any(|ip| ip.to_string() == own), "{ips:?}");
                Ok::<_, anyhow::Error>(())
            })?;
        }
        Ok(())
    };
    check("at first", &[&far, &near])?;
    let defaults = one.sh("ip route show default")?;
    ensure!(!defaults.contains("wfx"), "{defaults}");

    one.stop_agent(Stop::Killed)?;
    one.exec(&["ping", "-n", "-c1", "-W1", &own])?.ok()?;
    one.start_agent()?;
    check("after the agent's crash", &[&far, &near])?;

    // Somebody deletes its interface.
    one.sh("for link in $(ls /sys/class/net | grep wfx); do ip link del $link; done")?;
    check("after the loss of its interface", &[&far, &near])?;

    one.power_off();
    eventually(SOON, "the kernel has taken down its namespaces", || {
        match lab.underlay_sh("ip link show p1") {
            Ok(link) => Err(link),
            Err(_) => Ok(()),
        }
    })?;
    lab.power_on(1)?;
    one.start_agent()?;
    check("after a reboot", &[&far])?;

    one.weft("hide app")?.ok()?;
    one.weft("hide app")?.ok()?;
    ensure!(!one.sh("ip address")?.contains(&own));
    let listed = one.weft("ps --node h1 --network db")?.ok()?;
    ensure!(listed.contains("h1"), "{listed}");
    one.weft("hide db nope")?.refused(1, &["nope"])?;
    ensure!(!one.sh("ls /sys/class/net")?.contains("wfx"));

    // What the host routes elsewhere is refused by name.
    one.sh("ip route add 10.41.0.0/16 via $(ip -4 route show dev eth0 | grep -o 'src [0-9.]*' | cut -d' ' -f2)")?;
    one.weft("expose db")?.refused(1, &["10.41.0.0/24", "10.41.0.0/16", "eth0"])?;
    ensure!(!one.weft("ps --node h1")?.ok()?.contains("db"));
    lab.finish();
    Ok(())
}

#[expect(clippy::print_stdout, reason = "figures that --nocapture shows")]
#[test]
fn prometheus_scrapes_the_containers_of_all_hosts_and_follows_them() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).build()?;
    for host in lab.hosts() {
        host.configure("metrics = \"0.0.0.0:9480\"\n")?;
    }
    lab.form_cluster()?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let mut exporters = Vec::new();
    for index in 1..=3 {
        exporters.push(Exporter::start(lab.host(index), &format!("c{index}"))?);
    }
    let mute = lab.host(2).container("mute")?;
    mute.attach("app", "")?;
    let scraper = lab.host(1);
    scraper.weft("expose app")?.ok()?;

    let prometheus = Prometheus::start(scraper)?;
    let all: BTreeSet<String> =
        ["c1", "c2", "c3", "h1", "h2", "h3"].into_iter().map(str::to_owned).collect();
    let start = Instant::now();
    prometheus.sees(&all)?;
    println!("all of 3 containers and 3 agents are up after {:?}", start.elapsed());
    for name in ["c1", "c2", "c3"] {
        let found =
            prometheus.get(&format!("query?query=weft_example%7Binstance%3D%22{name}%22%7D"))?;
        let labels = &found["data"]["result"][0]["metric"];
        ensure!(
            labels["network"] == "app" && labels["host"] == format!("h{}", &name[1..]),
            "{found}"
        );
    }

    let gone = exporters.remove(1);
    let start = Instant::now();
    gone.container.kill();
    // Its server would keep the namespace.
    drop(gone);
    let mut expected = all.clone();
    expected.remove("c2");
    prometheus.sees(&expected)?;
    println!("a killed container is no target after {:?}", start.elapsed());

    let start = Instant::now();
    exporters.push(Exporter::start(lab.host(3), "c4")?);
    expected.insert("c4".into());
    prometheus.sees(&expected)?;
    println!("a new container is scraped after {:?}", start.elapsed());

    let start = Instant::now();
    lab.host(3).power_off();
    for name in ["c3", "c4", "h3"] {
        expected.remove(name);
    }
    prometheus.sees(&expected)?;
    println!("a host without power is no target after {:?}", start.elapsed());
    drop(prometheus);
    lab.finish();
    Ok(())
}

#[expect(clippy::print_stdout, reason = "figures that --nocapture shows")]
#[test]
fn haproxy_and_nginx_follow_new_and_removed_backends_by_dns() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let mut backends = Vec::new();
    for index in 1..=2 {
        backends.push(web(lab.host(index), &format!("web{index}"))?);
    }
    let host = lab.host(3);
    host.weft("service create web --network app --port 80 --vip none")?.ok()?;
    host.weft("expose app")?.ok()?;
    let haproxy = example("haproxy/haproxy.cfg");
    let haproxy = Daemon::start(host, "haproxy", &["haproxy", "-db", "-f", &text(&haproxy)])?;
    let nginx = example("nginx/nginx.conf");
    let prefix = text(host.dir());
    // As its package makes it.
    host.sh("mkdir -p /var/lib/nginx")?;
    let nginx = Daemon::start(host, "nginx", &["nginx", "-p", &prefix, "-c", &text(&nginx)])?;

    let answers = |proxy: &str, port: u16, expected: &[&str]| -> anyhow::Result<Duration> {
        let start = Instant::now();
        let expected: BTreeSet<String> = expected.iter().map(|name| (*name).to_owned()).collect();
        let log = || format!("{} {}", haproxy.log(), nginx.log());
        eventually(SOON, &format!("{proxy} answers from {expected:?}"), || {
            let mut seen = BTreeSet::new();
            for _ in 0..12 {
                seen.insert(http_get(host, port, "/")?.trim().to_owned());
            }
            ensure!(seen == expected, "{seen:?} {}", log());
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(start.elapsed())
    };
    let both = |what: &str, expected: &[&str]| -> anyhow::Result<()> {
        let haproxy = answers("HAProxy", 8080, expected)?;
        let nginx = answers("nginx", 8081, expected)?;
        println!("{what}: HAProxy after {haproxy:?}, nginx {nginx:?} later at most");
        Ok(())
    };
    both("two backends", &["web1", "web2"])?;
    backends.push(web(lab.host(3), "web3")?);
    both("a third backend", &["web1", "web2", "web3"])?;
    let (first, server) = backends.remove(0);
    first.kill();
    drop(server);
    both("the first one killed", &["web2", "web3"])?;
    lab.host(2).weft("drain web2")?.ok()?;
    both("the second one drained", &["web3"])?;
    drop((haproxy, nginx));
    lab.finish();
    Ok(())
}

#[test]
fn the_name_of_a_service_is_its_address_and_srv_records_are_its_ready_backends()
-> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    let client = lab.host(1).container("client")?;
    client.attach("app", "")?;
    let mut members = Vec::new();
    for (index, name) in [(1, "web1"), (2, "web2")] {
        let container = lab.host(index).container(name)?;
        container.attach("app", "--service web")?;
        members.push(container);
    }
    let ips = |name: &str| -> anyhow::Result<BTreeSet<String>> {
        Ok(client.resolve(name)?.iter().map(ToString::to_string).collect())
    };
    let own: BTreeSet<String> = members
        .iter()
        .map(|member| Ok(member.on("app")?.ips().map(|ip| ip.to_string()).collect::<Vec<_>>()))
        .collect::<anyhow::Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect();
    let is = |name: &str, expected: &BTreeSet<String>| -> anyhow::Result<()> {
        eventually(SOON, &format!("{name} is {expected:?}"), || {
            let found = ips(name)?;
            ensure!(found == *expected, "{found:?}");
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(())
    };
    is("web", &own)?;
    lab.host(2).weft("service create web --network app --port 80:8080")?.ok()?;
    let vips: BTreeSet<String> = eventually(SOON, "the virtual addresses are known", || {
        let found = ips("web.app.weft.internal")?;
        ensure!(found.is_disjoint(&own) && found.len() == 2, "{found:?}");
        Ok::<_, anyhow::Error>(found)
    })?;
    is("web", &vips)?;
    is("tasks.web", &own)?;
    let shown = lab.host(1).weft("resolve web --network app")?.ok()?;
    ensure!(vips.iter().all(|ip| shown.contains(ip)), "{shown}");

    lab.host(2).weft("drain web2")?.ok()?;
    let first: BTreeSet<String> = members[0].on("app")?.ips().map(|ip| ip.to_string()).collect();
    is("tasks.web", &first)?;
    is("web", &vips)?;
    // Its own name stays.
    ensure!(ips("web2")?.len() == 2);

    let one = lab.host(1);
    for (state, expected) in [("ready", 1.0), ("draining", 1.0), ("unhealthy", 0.0)] {
        let labels = ["network=\"app\"", "service=\"web\"", &format!("state=\"{state}\"")];
        let found = one.metrics()?.sum("weft_service_backends", &labels);
        ensure!(found == expected, "{found} {state}: {}", one.metrics()?.text());
    }
    ensure!(one.metrics()?.sum("weft_service_changes_total", &["network=\"app\""]) > 0.0);
    ensure!(one.metrics()?.sum("weft_dns_queries_total", &["network=\"app\""]) > 0.0);
    one.weft("network rm app --force")?.ok()?;
    eventually(SOON, "no row of the removed network is left", || {
        let text = one.metrics()?.text().to_owned();
        let left: Vec<_> = text.lines().filter(|line| line.contains("network=\"app\"")).collect();
        ensure!(left.is_empty() && !text.contains("service=\"web\""), "{left:?}");
        Ok::<_, anyhow::Error>(())
    })?;
    lab.finish();
    Ok(())
}

/// nginx as an exporter of metrics, in a container that asks to be scraped.
struct Exporter {
    container: Container,
    _nginx: Daemon,
}

impl Exporter {
    fn start(host: &Arc<Host>, name: &str) -> anyhow::Result<Self> {
        let container = host.container(name)?;
        container.attach(
            "app",
            "--label prometheus.io/scrape=true --label prometheus.io/port=9100 --label prometheus.io/path=/stats",
        )?;
        let dir = host.dir().join(format!("{name}.exporter"));
        fs::create_dir_all(&dir)?;
        let config = dir.join("nginx.conf");
        fs::write(&config, EXPORTER.replace("DIR", &text(&dir)))?;
        let namespace = format!("--net=/proc/{}/ns/net", container.pid());
        let argv = ["nsenter", &namespace, "nginx", "-p", &text(&dir), "-c", &text(&config)];
        let nginx = Daemon::start(host, &format!("exporter-{name}"), &argv)?;
        Ok(Self { container, _nginx: nginx })
    }
}

const EXPORTER: &str = "
daemon off;
master_process off;
pid DIR/nginx.pid;
error_log DIR/error.log;
events {}
http {
  access_log off;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/proxy;
  fastcgi_temp_path DIR/fastcgi;
  uwsgi_temp_path DIR/uwsgi;
  scgi_temp_path DIR/scgi;
  server {
    listen 9100;
    location /stats { default_type text/plain; return 200 \"weft_example 1\\n\"; }
  }
}
";

/// The real Prometheus, with the example's configuration, made to hurry.
struct Prometheus {
    host: Arc<Host>,
    daemon: Daemon,
}

impl Prometheus {
    fn start(host: &Arc<Host>) -> anyhow::Result<Self> {
        let config = fs::read_to_string(example("scrape/prometheus.yml"))?;
        let config = config
            .replace("refresh_interval: 5s", "refresh_interval: 1s")
            .replace("scrape_interval: 15s", "scrape_interval: 1s");
        let file = host.dir().join("prometheus.yml");
        fs::write(&file, config)?;
        let argv = [
            "prometheus",
            &format!("--config.file={}", text(&file)),
            &format!("--storage.tsdb.path={}", text(&host.dir().join("prometheus"))),
            "--web.listen-address=127.0.0.1:9090",
            "--log.level=warn",
        ];
        let daemon = Daemon::start(host, "prometheus", &argv)?;
        Ok(Self { host: Arc::clone(host), daemon })
    }

    fn get(&self, path: &str) -> anyhow::Result<Value> {
        let body = http_get(&self.host, 9090, &format!("/api/v1/{path}"))?;
        serde_json::from_str(&body).with_context(|| format!("{path}: {body}"))
    }

    /// Waits until these targets are the ones there are, and all of them are up.
    fn sees(&self, expected: &BTreeSet<String>) -> anyhow::Result<()> {
        eventually(Duration::from_secs(20), &format!("Prometheus scrapes {expected:?}"), || {
            let found = self.get("targets?state=active")?;
            let targets = found["data"]["activeTargets"].as_array().context("no list")?;
            let named = |target: &Value| target["labels"]["instance"].as_str().map(str::to_owned);
            let names: BTreeSet<String> = targets.iter().filter_map(named).collect();
            let down = targets.iter().find(|target| target["health"] != "up");
            ensure!(
                names == *expected && down.is_none(),
                "{names:?} {down:?} {}",
                self.daemon.log()
            );
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(())
    }
}

fn web(host: &Arc<Host>, name: &str) -> anyhow::Result<(Container, WebServer)> {
    let container = host.container(name)?;
    container.attach("app", "--service web")?;
    let server = WebServer::start(&container)?;
    Ok((container, server))
}

/// The host's IPv4 address on a network.
fn address(host: &Host, network: &str) -> anyhow::Result<String> {
    let found = host.weft_json(&format!("ps --node {} --network {network}", host.name()))?;
    let own = found.as_array().into_iter().flatten().find(|e| e["name"] == host.name());
    let text = own.and_then(|own| own["addresses"][0].as_str()).context("not exposed")?;
    Ok(text.split('/').next().unwrap_or(text).to_owned())
}

/// Asks a server at the host's loopback; the body of its answer.
fn http_get(host: &Host, port: u16, path: &str) -> anyhow::Result<String> {
    let ask = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{port}
         printf 'GET {} HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' >&3; cat <&3",
        path.replace('%', "%%")
    );
    let answer = host.exec(&["bash", "-ec", &ask])?.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    ensure!(head.contains(" 200 "), "{answer}");
    Ok(body.to_owned())
}

fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(path)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
