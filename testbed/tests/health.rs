//! Checks of services: a backend gets connections exactly while it can serve.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{By, Container, Echo, Host, Lab, Stop, api_call, eventually, holds_for, pace};

const SOON: Duration = Duration::from_secs(10);
const PORT: u16 = 7000;
/// Milliseconds between probes, and of patience with one.
const INTERVAL: u64 = 200;
const TIMEOUT: u64 = 200;
/// Failures in a row, and successes.
const FALL: u64 = 2;
const RISE: u64 = 2;
/// What the documentation promises: interval × fall + timeout, and what news takes.
const BOUND: Duration = Duration::from_millis(INTERVAL * FALL + TIMEOUT + 500);

#[test]
fn a_backend_is_in_rotation_exactly_while_it_listens() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.50.0.0/24 --subnet fd00:50::/64")?;
    let vips = declare(&lab, "app", json!({"tcp": {"port": PORT}}))?;
    let (_one, _first) = serving(lab.host(1), "one")?;
    let (two, client) = (lab.host(2).container("two")?, lab.host(1).container("client")?);
    two.attach("app", "--service web")?;
    client.attach("app", "")?;
    for host in lab.hosts() {
        is(host, "one", "ready", SOON)?;
        let reason = is(host, "two", "unhealthy", SOON)?;
        ensure!(reason.contains("refused"), "{reason}");
    }
    holds_for(Duration::from_secs(1), "what does not listen gets nothing", || {
        only(&client, &vips, "one", 4)
    })?;

    for _ in 0..2 {
        let second = Echo::start(&two, PORT)?;
        let came = until(&lab, "two", "ready", Duration::from_millis(INTERVAL * RISE) + BOUND)?;
        eventually(SOON, "both answer", || {
            let names = names(&client, &vips, 12)?;
            ensure!(names.len() == 2, "{names:?}");
            Ok(())
        })?;
        drop(second);
        let went = until(&lab, "two", "unhealthy", BOUND)?;
        show(&format!("in rotation after {came:?}, out after {went:?}"));
        eventually(Duration::from_secs(1), "the one that is left answers", || {
            only(&client, &vips, "one", 12)
        })?;
    }
    lab.finish();
    Ok(())
}

#[test]
fn backends_are_asked_on_every_kind_of_network() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    let kinds = [
        "inside --internal",
        "sealed --encrypted",
        "six --subnet fd00:51::/64",
        "alone --driver bridge",
        "apart --driver bridge --icc=false",
    ];
    for kind in kinds {
        let network = kind.split(' ').next().context("a name")?;
        lab.create_network(kind)?;
        declare_as(host, network, json!({"tcp": {"port": PORT}}))?;
        let backend = host.container(&format!("on-{network}"))?;
        backend.attach(network, "--service web")?;
        // It can be reached without its own loopback interface.
        backend.sh("ip link set lo down")?;
        // A listener at the endpoint's address alone.
        let own = backend.on(network)?.ips().next().context("an address")?;
        let listener = backend.inside(|| Ok(TcpListener::bind(SocketAddr::new(own, PORT))?))?;
        eventually(SOON, &format!("it is healthy on {network}"), || {
            let state = backend_of(host, network, backend.name())?;
            ensure!(state.0 == "ready", "{state:?}");
            Ok(())
        })?;
        drop(listener);
        eventually(SOON, &format!("it is unhealthy on {network}"), || {
            let state = backend_of(host, network, backend.name())?;
            ensure!(state.0 == "unhealthy", "{state:?}");
            Ok(())
        })?;
    }
    lab.finish();
    Ok(())
}

#[test]
fn status_and_body_of_an_answer_decide() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lab.create_network("app")?;
    declare(
        &lab,
        "app",
        json!({"http": {"port": PORT, "path": "/health", "body": "all is well"}}),
    )?;
    let backend = host.container("one")?;
    backend.attach("app", "--service web")?;
    let web = Web::start(&backend)?;
    web.answer("200 OK", "all is well today");
    is(host, "one", "ready", SOON)?;
    ensure!(web.asked().starts_with("GET /health HTTP/1.1\r\n"), "{:?}", web.asked());
    for (status, body, state, words) in [
        ("503 Busy", "all is well", "unhealthy", "503"),
        ("301 Moved", "all is well", "ready", ""),
        ("200 OK", "not so well", "unhealthy", "all is well"),
        ("200 OK", "all is well", "ready", ""),
        ("nonsense", "", "unhealthy", "HTTP"),
    ] {
        web.answer(status, body);
        let reason = is(host, "one", state, SOON)?;
        ensure!(reason.contains(words), "{status} {body}: {reason}");
    }
    web.answer("204 Nothing", "");
    let check = json!({"http": {"port": PORT, "path": "/", "status": 204}});
    update(host, &check)?;
    is(host, "one", "ready", SOON)?;
    lab.finish();
    Ok(())
}

#[test]
fn a_program_of_the_host_decides_and_no_other_is_run() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(1).build()?;
    let host = lab.host(1);
    let (programs, sign) = (host.dir().join("checks"), host.dir().join("sign"));
    host.configure(&format!("check_programs = {:?}\n", programs.display().to_string()))?;
    lab.form_cluster()?;
    lab.create_network("app")?;
    declare(&lab, "app", json!({"exec": {"command": ["seen", sign.display().to_string()]}}))?;
    let backend = host.container("one")?;
    backend.attach("app", "--service web")?;
    let reason = is(host, "one", "unhealthy", SOON)?;
    ensure!(reason.contains("seen") && reason.contains("checks"), "{reason}");

    // It must be the container's namespace that the program looks at.
    fs::create_dir_all(&programs)?;
    let script = "#!/bin/sh\nip -o address show dev eth0 | grep -qw \"$WEFT_ADDRESS\" || exit 9\n\
                  [ \"$WEFT_NAME $WEFT_SERVICE $WEFT_NETWORK\" = 'one web app' ] || exit 8\n\
                  [ -e \"$1\" ] || { echo no sign; exit 7; }\n";
    fs::write(programs.join("seen"), script)?;
    fs::set_permissions(programs.join("seen"), fs::Permissions::from_mode(0o755))?;
    eventually(SOON, "the program says why", || {
        let (state, reason) = backend_of(host, "app", "one")?;
        ensure!(state == "unhealthy" && reason.contains("no sign"), "{state} {reason}");
        Ok(())
    })?;
    fs::write(&sign, "")?;
    is(host, "one", "ready", SOON)?;
    fs::remove_file(&sign)?;
    is(host, "one", "unhealthy", SOON)?;
    update(host, &json!({"exec": {"command": ["/bin/true"]}}))?;
    eventually(SOON, "a program of elsewhere is not run", || {
        let (state, reason) = backend_of(host, "app", "one")?;
        ensure!(state == "unhealthy" && reason.contains("/bin/true"), "{state} {reason}");
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn an_agent_that_starts_again_takes_no_healthy_backend_out() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app")?;
    let vips = declare(&lab, "app", json!({"tcp": {"port": PORT}}))?;
    let (_one, _echo) = serving(lab.host(1), "one")?;
    let client = lab.host(2).container("client")?;
    client.attach("app", "")?;
    for host in lab.hosts() {
        is(host, "one", "ready", SOON)?;
    }
    eventually(SOON, "it answers", || only(&client, &vips, "one", 1))?;
    lab.host(1).stop_agent(Stop::Killed)?;
    lab.host(1).start_agent()?;
    holds_for(Duration::from_secs(3), "it answers all the time", || {
        only(&client, &vips, "one", 4)?;
        let (state, _) = backend_of(lab.host(1), "app", "one")?;
        ensure!(state == "ready", "{state}");
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn backends_of_a_dead_host_get_nothing_after_five_seconds() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app")?;
    let vips = declare(&lab, "app", json!({"tcp": {"port": PORT}}))?;
    let backends: Vec<_> = (1..=3)
        .map(|index| serving(lab.host(index), &format!("web{index}")))
        .collect::<anyhow::Result<_>>()?;
    let client = lab.host(1).container("client")?;
    client.attach("app", "")?;
    eventually(SOON, "all three answer", || {
        let names = names(&client, &vips, 24)?;
        ensure!(names.len() == 3, "{names:?}");
        Ok(())
    })?;
    lab.host(3).power_off();
    let off = Instant::now();
    eventually(Duration::from_secs(5), "the dead host's backend gets nothing", || {
        let names = names(&client, &vips, 24)?;
        ensure!(names.len() == 2, "{names:?}");
        Ok(())
    })?;
    show(&format!("out of rotation {:?} after the host's death", off.elapsed()));
    holds_for(Duration::from_secs(2), "the others answer", || names(&client, &vips, 12).map(drop))?;
    drop(backends);
    lab.finish();
    Ok(())
}

/// Declares the service `web` with a check, and returns its virtual addresses as targets.
fn declare(lab: &Lab, network: &str, probe: Value) -> anyhow::Result<Vec<SocketAddr>> {
    declare_as(lab.host(1), network, probe)?;
    let mut vips = Vec::new();
    for host in lab.hosts() {
        vips = eventually(SOON, &format!("{} knows the service", host.name()), || {
            let service = service(host, network)?;
            let vips = service.get("vips").and_then(Value::as_array).context("vips")?.clone();
            ensure!(!vips.is_empty(), "{service}");
            Ok(vips)
        })?;
    }
    let ip = |vip: &Value| anyhow::Ok(vip.as_str().context("an address")?.parse::<IpAddr>()?);
    vips.iter().map(|vip| Ok(SocketAddr::new(ip(vip)?, PORT))).collect()
}

fn declare_as(host: &Host, network: &str, probe: Value) -> anyhow::Result<()> {
    let body = json!({"name": "web", "network": network, "check": check(&probe)});
    let answer = api_call(host, "POST", "/v1/services", &body.to_string())?;
    ensure!(answer.status == 201, "{answer:?}");
    Ok(())
}

fn update(host: &Host, probe: &Value) -> anyhow::Result<()> {
    let body = json!({"check": check(probe)}).to_string();
    let answer = api_call(host, "PATCH", "/v1/services/web?network=app", &body)?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(())
}

fn check(probe: &Value) -> Value {
    json!({"probe": probe, "interval": INTERVAL, "timeout": TIMEOUT, "rise": RISE, "fall": FALL})
}

fn service(host: &Host, network: &str) -> anyhow::Result<Value> {
    let answer = api_call(host, "GET", &format!("/v1/services/web?network={network}"), "")?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(answer.body)
}

/// The state of a backend as `host` sees it, and the reason.
fn backend_of(host: &Host, network: &str, name: &str) -> anyhow::Result<(String, String)> {
    let service = service(host, network)?;
    let backends = service.get("backends").and_then(Value::as_array).context("backends")?;
    let backend = backends.iter().find(|backend| backend["name"] == name);
    let backend = backend.with_context(|| format!("no backend {name}: {service}"))?;
    let text = |field: &str| backend[field].as_str().unwrap_or_default().to_owned();
    Ok((text("state"), text("reason")))
}

/// Waits until `host` sees a backend in `state`; returns the reason.
fn is(host: &Host, name: &str, state: &str, deadline: Duration) -> anyhow::Result<String> {
    eventually(deadline, &format!("{} sees {name} {state}", host.name()), || {
        let (now, reason) = backend_of(host, "app", name)?;
        ensure!(now == state, "{now} {reason}");
        Ok(reason)
    })
}

/// Waits until all hosts see a backend in `state`; returns how long that took.
fn until(lab: &Lab, name: &str, state: &str, deadline: Duration) -> anyhow::Result<Duration> {
    let start = Instant::now();
    for host in lab.hosts() {
        is(host, name, state, deadline.saturating_sub(start.elapsed()))?;
    }
    Ok(start.elapsed())
}

fn serving(host: &Arc<Host>, name: &str) -> anyhow::Result<(Container, Echo)> {
    let container = host.container(name)?;
    container.attach("app", "--service web")?;
    let echo = Echo::start(&container, PORT)?;
    Ok((container, echo))
}

/// Asks each target so many times; how often each backend answered.
fn names(
    from: &Container,
    targets: &[SocketAddr],
    times: usize,
) -> anyhow::Result<BTreeMap<String, usize>> {
    let namespace = from.namespace()?;
    let mut names = BTreeMap::new();
    for target in targets {
        for _ in 0..times {
            *names.entry(By::Tcp.ask(&namespace, *target)?.name).or_default() += 1;
        }
    }
    Ok(names)
}

fn only(from: &Container, targets: &[SocketAddr], name: &str, times: usize) -> anyhow::Result<()> {
    let names = names(from, targets, times)?;
    ensure!(names.keys().eq([name]), "{names:?}");
    Ok(())
}

/// A server that answers as it is told, and keeps what it was asked last.
struct Web {
    says: Arc<Mutex<String>>,
    asked: Arc<Mutex<String>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Web {
    fn start(container: &Container) -> anyhow::Result<Self> {
        let at = SocketAddr::from(([0, 0, 0, 0], PORT));
        let listener = container.inside(|| Ok(TcpListener::bind(at)?))?;
        listener.set_nonblocking(true)?;
        let (says, asked): (Arc<Mutex<String>>, Arc<Mutex<String>>) = Default::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (saying, asking, stopped) = (Arc::clone(&says), Arc::clone(&asked), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let Ok((mut client, _)) = listener.accept() else {
                    pace(Duration::from_millis(5));
                    continue;
                };
                let _ = client.set_nonblocking(false);
                let _ = client.set_read_timeout(Some(Duration::from_secs(1)));
                let mut request = [0; 1024];
                let length = client.read(&mut request).unwrap_or(0);
                *asking.lock().unwrap_or_else(PoisonError::into_inner) =
                    String::from_utf8_lossy(&request[..length]).into_owned();
                let _ = client
                    .write_all(saying.lock().unwrap_or_else(PoisonError::into_inner).as_bytes());
            }
        });
        Ok(Self { says, asked, stop, thread: Some(thread) })
    }

    fn answer(&self, status: &str, body: &str) {
        let text = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        *self.says.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }

    fn asked(&self) -> String {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[expect(clippy::print_stdout, reason = "a figure that --nocapture shows")]
fn show(figure: &str) {
    println!("{figure}");
}
