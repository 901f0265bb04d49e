//! Draining: a backend leaves its service without a connection that fails.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{
    Container, Host, Lab, Place, Pressure, Requests, Served, Stop, WebServer, api_call, eventually,
    holds_for, pace,
};

const SOON: Duration = Duration::from_secs(10);
const PORT: u16 = 7000;

#[test]
fn what_is_drained_keeps_its_connections_and_gets_no_new_ones() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.52.0.0/24")?;
    let vip = declare(&lab, &Value::Null)?;
    let (one, two) = (backend(lab.host(1), "one")?, backend(lab.host(2), "two")?);
    let servers = [Lines::start(&one)?, Lines::start(&two)?];
    let client = lab.host(2).container("client")?;
    client.attach("app", "")?;
    let target = SocketAddr::new(vip, PORT);
    let mut held = eventually(SOON, "the first backend answers", || {
        let line = Line::open(&client, target)?;
        ensure!(line.name == "one", "{}", line.name);
        Ok(line)
    })?;

    let host = lab.host(1);
    // Whoever asks at once how far it is finds it draining, not done.
    for _ in 0..20 {
        host.weft("drain one --timeout 1ms")?.refused(4, &["one on app"])?;
        host.weft("drain one --undo")?.ok()?;
    }
    let left = host.weft("drain one --timeout 500ms")?;
    ensure!(left.stdout.contains("1 connection is open"), "{left}");
    left.refused(4, &["one on app", "1 connection is open"])?;
    ensure!(state(lab.host(2), "one")? == "draining", "{:?}", state(lab.host(2), "one"));
    let only_two = || {
        let name = Line::open(&client, target)?.name;
        ensure!(name == "two", "{name}");
        anyhow::Ok(())
    };
    for _ in 0..40 {
        only_two()?;
    }
    held.ask("still there?")?;

    // An agent that starts again goes on with it.
    host.stop_agent(Stop::Killed)?;
    held.ask("without an agent?")?;
    host.start_agent()?;
    holds_for(Duration::from_secs(2), "it is drained", || {
        held.ask("and with another?")?;
        only_two()
    })?;

    let waiting = thread::spawn({
        let host = Arc::clone(host);
        move || host.weft("drain one --timeout 30s --format json")
    });
    holds_for(Duration::from_millis(500), "the command waits", || {
        ensure!(!waiting.is_finished(), "it has ended");
        held.ask("and now?")
    })?;
    drop(held);
    let ran = waiting.join().expect("no panic")?;
    ensure!(ran.took < Duration::from_secs(20), "{ran}");
    let last: Value = serde_json::from_str(ran.ok()?.lines().last().context("a line")?)?;
    ensure!(last["drained"] == true && last["connections"] == 0, "{last}");

    host.weft("drain one --undo")?.ok()?;
    eventually(SOON, "it gets connections again", || {
        let name = Line::open(&client, target)?.name;
        ensure!(name == "one", "{name}");
        Ok(())
    })?;
    lab.host(2).weft("drain one")?.refused(1, &["one", "h1", "weft drain one there"])?;
    lab.host(2).weft("drain h1")?.refused(1, &["h1", "another node", "there"])?;
    host.weft("drain h1 --timeout 5s")?.ok()?;
    for _ in 0..20 {
        only_two()?;
    }
    // A socket of the test's would keep the container's namespace.
    drop(servers);
    host.weft("drain one --stop")?.ok()?;
    eventually(SOON, "it has ended", || match state(lab.host(2), "one") {
        Ok(state) => Err(state),
        Err(_) => Ok(()),
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn all_backends_are_replaced_under_load_and_no_request_fails() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.53.0.0/24")?;
    let http = json!({"probe": {"http": {"port": 80, "path": "/"}},
                      "interval": 200, "timeout": 1000, "rise": 2, "fall": 3});
    let vip = declare(&lab, &http)?;
    let mut serving = Vec::new();
    for index in 1..=3 {
        serving.push(web(lab.host(index), &format!("old{index}"))?);
    }
    let clients: Vec<Container> = (1..=3)
        .map(|index| {
            let client = lab.host(index).container(&format!("client{index}"))?;
            client.attach("app", "")?;
            Ok(client)
        })
        .collect::<anyhow::Result<_>>()?;
    for index in 1..=3 {
        all_see(&lab, &format!("old{index}"), "ready")?;
    }
    let target = format!("{vip}:80");
    let done = Arc::new(AtomicBool::new(false));
    let load: Vec<JoinHandle<anyhow::Result<Vec<Served>>>> = clients
        .into_iter()
        .map(|client| {
            let (target, done) = (target.clone(), Arc::clone(&done));
            let client = Place::Container(client);
            thread::spawn(move || {
                let mut all = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    all.push(Requests::Single.run(&client, &target, PRESSURE, 10)?);
                }
                Ok(all)
            })
        })
        .collect();
    // The first connections of a thousand come at once.
    pace(Duration::from_secs(2));
    let replaced = (1..=3).try_for_each(|index| -> anyhow::Result<()> {
        let host = lab.host(index);
        serving.push(web(host, &format!("new{index}"))?);
        all_see(&lab, &format!("new{index}"), "ready")?;
        let (container, nginx) = serving.remove(0);
        let ran = host.weft(&format!("drain old{index} --timeout 20s"))?;
        let sockets = || container.sh("ss --tcp --numeric --options --info state established");
        show(&ran.ok().with_context(|| format!("connections that are open: {:?}", sockets()))?);
        drop(nginx);
        container.kill();
        Ok(())
    });
    done.store(true, Ordering::Relaxed);
    let served: Vec<_> = load.into_iter().map(|client| client.join().expect("no panic")).collect();
    show(&format!("{served:?}"));
    replaced?;
    for served in served {
        let served = served?;
        let failed: u64 = served.iter().map(|served| served.failed).sum();
        ensure!(failed == 0, "{served:?}");
    }
    lab.finish();
    Ok(())
}

#[test]
fn a_backend_that_is_killed_fails_its_own_connections_alone() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.54.0.0/24")?;
    let tcp = json!({"probe": {"tcp": {"port": PORT}},
                     "interval": 200, "timeout": 200, "rise": 1, "fall": 2});
    let vip = declare(&lab, &tcp)?;
    let backends: Vec<Container> = (1..=3)
        .map(|index| backend(lab.host(index), &format!("web{index}")))
        .collect::<anyhow::Result<_>>()?;
    let mut servers: Vec<Lines> =
        backends.iter().map(Lines::start).collect::<anyhow::Result<_>>()?;
    let client = lab.host(1).container("client")?;
    client.attach("app", "")?;
    for index in 1..=3 {
        all_see(&lab, &format!("web{index}"), "ready")?;
    }
    let target = SocketAddr::new(vip, PORT);
    let mut lines = eventually(SOON, "there are connections to all", || {
        let lines = (0..30).map(|_| Line::open(&client, target));
        let lines = lines.collect::<anyhow::Result<Vec<_>>>()?;
        let to = |name| lines.iter().any(|line| line.name == name);
        ensure!(["web1", "web2", "web3"].into_iter().all(to), "not to all");
        Ok(lines)
    })?;

    // Its process ends, and the kernel closes what it had.
    drop(servers.remove(2));
    let killed = Instant::now();
    let bound = Duration::from_millis(200 * 2 + 200 + 500);
    eventually(bound, "every new connection is served", || {
        (0..12).try_for_each(|_| {
            let name = Line::open(&client, target)?.name;
            ensure!(name != "web3", "{name}");
            Ok(())
        })
    })?;
    show(&format!("out of rotation after {:?}", killed.elapsed()));
    for line in &mut lines {
        let answered = line.ask("are you there?").is_ok();
        ensure!(answered == (line.name != "web3"), "{} {answered}", line.name);
    }
    drop(servers);
    lab.finish();
    Ok(())
}

#[test]
fn a_process_of_weft_run_ends_when_its_work_is_done() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.55.0.0/24")?;
    let (host, client) = (lab.host(1), lab.host(2).container("client")?);
    client.attach("app", "")?;
    // It says when it is told to end, and ends with a status of its own.
    let script = host.dir().join("serve.py");
    std::fs::write(&script, SERVE)?;
    let log = host.dir().join("said");
    let argv = ["run", "-d", "--network", "app", "--name", "web", "--service", "web"];
    let (script, said) = (script.display().to_string(), log.display().to_string());
    let pid = host.weft_args(&[&argv[..], &["--", "python3", &script, &said]].concat())?.ok()?;
    let ip = eventually(SOON, "its name is answered", || {
        let found = client.resolve("web")?;
        found.first().copied().context("no address")
    })?;
    let target = SocketAddr::new(ip, PORT);
    let mut line = eventually(SOON, "it serves", || Line::open(&client, target))?;

    let is_running = || -> anyhow::Result<()> { host.exec(&["kill", "-0", &pid])?.ok().map(drop) };
    host.exec(&["kill", "-TERM", &pid])?.ok()?;
    holds_for(Duration::from_secs(1), "it works until its connection is closed", || {
        line.ask("still there?")?;
        ensure!(!log.exists(), "it was told to end");
        is_running()
    })?;
    drop(line);
    eventually(SOON, "it is told to end", || std::fs::read_to_string(&log))?;
    eventually(SOON, "it ends", || match is_running() {
        Ok(()) => Err("it runs"),
        Err(_) => Ok(()),
    })?;
    eventually(SOON, "its endpoint ends", || {
        let found = client.resolve("web");
        ensure!(found.is_err(), "{found:?}");
        Ok(())
    })?;

    // In the foreground, with its own exit code.
    let run = ["run", "--network", "app", "--name", "web", "--service", "web", "--"];
    let ran = host.weft_args(&[&run[..], &["sh", "-c", "exit 7"]].concat())?;
    ensure!(ran.code == 7, "{ran}");
    let pid =
        host.weft("run -d --network app --name web --drain-timeout 5s -- sleep 1000")?.ok()?;
    let child = host.exec(&["pgrep", "-P", &pid])?.ok()?;
    host.exec(&["kill", "-KILL", &pid])?.ok()?;
    eventually(SOON, "the command ends with its supervisor", || {
        let alive = host.exec(&["kill", "-0", child.trim()])?;
        ensure!(alive.code != 0, "{alive}");
        Ok(())
    })?;
    // Without a supervisor it is the process itself.
    let pid =
        host.weft("run -d --network app --name bare --drain-timeout 0 -- sleep 1000")?.ok()?;
    eventually(SOON, "the process becomes the command", || {
        let name = host.exec(&["cat", &format!("/proc/{pid}/comm")])?.ok()?;
        ensure!(name == "sleep", "{name}");
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

/// A client's; there are three.
const PRESSURE: Pressure = Pressure { connections: 350, threads: 1 };
/// How long news may take while the machine does nothing but serve.
const UNDER_LOAD: Duration = Duration::from_secs(40);

/// Declares the service `web`, with a check unless that is null; returns its virtual address.
fn declare(lab: &Lab, check: &Value) -> anyhow::Result<IpAddr> {
    let body = json!({"name": "web", "network": "app", "check": check});
    let answer = api_call(lab.host(1), "POST", "/v1/services", &body.to_string())?;
    ensure!(answer.status == 201, "{answer:?}");
    let mut vip = None;
    for host in lab.hosts() {
        let found = eventually(SOON, &format!("{} knows the service", host.name()), || {
            let vip = service(host)?["vips"][0].as_str().context("no vip")?.parse::<IpAddr>()?;
            anyhow::Ok(vip)
        });
        vip = Some(found?);
    }
    vip.context("a lab has hosts")
}

fn service(host: &Host) -> anyhow::Result<Value> {
    let answer = api_call(host, "GET", "/v1/services/web?network=app", "")?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(answer.body)
}

fn state(host: &Host, name: &str) -> anyhow::Result<String> {
    let service = service(host)?;
    let backends = service["backends"].as_array().context("backends")?;
    let backend = backends.iter().find(|backend| backend["name"] == name);
    let state = backend.and_then(|backend| backend["state"].as_str());
    state.map(str::to_owned).with_context(|| format!("no backend {name}: {service}"))
}

fn all_see(lab: &Lab, name: &str, wanted: &str) -> anyhow::Result<()> {
    lab.hosts().iter().try_for_each(|host| {
        eventually(UNDER_LOAD, &format!("{} sees {name} {wanted}", host.name()), || {
            let state = state(host, name)?;
            ensure!(state == wanted, "{state}");
            Ok(())
        })
    })
}

fn backend(host: &Arc<Host>, name: &str) -> anyhow::Result<Container> {
    let container = host.container(name)?;
    container.attach("app", "--service web")?;
    Ok(container)
}

fn web(host: &Arc<Host>, name: &str) -> anyhow::Result<(Container, WebServer)> {
    let container = backend(host, name)?;
    let nginx = WebServer::start(&container)?;
    Ok((container, nginx))
}

/// A server that says its container's name, and then every line that it is told, until the client
/// closes the connection.
struct Lines {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Lines {
    fn start(container: &Container) -> anyhow::Result<Self> {
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
        let listener = container.inside(|| Ok(TcpListener::bind(at)?))?;
        listener.set_nonblocking(true)?;
        let (stop, name) = (Arc::new(AtomicBool::new(false)), container.name().to_owned());
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut clients = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let Ok((client, _)) = listener.accept() else {
                    pace(Duration::from_millis(2));
                    continue;
                };
                if let Ok(copy) = client.try_clone() {
                    clients.push(copy);
                }
                let name = name.clone();
                thread::spawn(move || repeat(client, &name));
            }
            for client in clients {
                let _ = client.shutdown(std::net::Shutdown::Both);
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn repeat(mut client: TcpStream, name: &str) -> std::io::Result<()> {
    client.set_nonblocking(false)?;
    writeln!(client, "{name}")?;
    let mut lines = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        client.write_all(line.as_bytes())?;
        line.clear();
    }
    client.shutdown(std::net::Shutdown::Both)
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A connection to one of the [`Lines`].
struct Line {
    name: String,
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Line {
    fn open(from: &Container, target: SocketAddr) -> anyhow::Result<Self> {
        let patience = Duration::from_secs(1);
        let stream = from.inside(|| Ok(TcpStream::connect_timeout(&target, patience)?))?;
        stream.set_read_timeout(Some(patience))?;
        let lines = BufReader::new(stream.try_clone()?);
        let mut line = Self { name: String::new(), stream, lines };
        line.name = line.read()?;
        Ok(line)
    }

    fn ask(&mut self, text: &str) -> anyhow::Result<()> {
        writeln!(self.stream, "{text}")?;
        let answer = self.read()?;
        ensure!(answer == text, "{answer:?}");
        Ok(())
    }

    fn read(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let length = self.lines.read_line(&mut line)?;
        ensure!(length > 0, "the connection is closed");
        Ok(line.trim_end().to_owned())
    }
}

#[expect(clippy::print_stdout, reason = "a figure that --nocapture shows")]
fn show(figure: &str) {
    println!("{figure}");
}

const SERVE: &str = r#"
import signal, socketserver, sys, threading

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"web\n")
        for line in self.rfile:
            self.wfile.write(line)

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

def end(number, frame):
    open(sys.argv[1], "w").write("told")
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
Server(("0.0.0.0", 7000), Handler).serve_forever()
"#;
