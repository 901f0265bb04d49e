use std::{
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use weft_testbed::{Capture, Container, Host, Lab, NetworkView, eventually, report::percentile};

use super::converge::{Course, milliseconds};

/// Plays the main job, as a person would type it.
pub(crate) fn run(keep: bool) -> anyhow::Result<()> {
    let start = Instant::now();
    let lab = Lab::builder().hosts(3).build()?;
    let mut timings: Vec<(&str, Duration)> = vec![("three hosts", start.elapsed())];

    let mark = Instant::now();
    show_hosts(&lab)?;
    make_cluster(&lab)?;
    timings.push(("a cluster of three", mark.elapsed()));

    let mark = Instant::now();
    let app = make_networks(&lab)?;
    let containers = start_containers(&lab)?;
    timings.push(("two networks, five containers", mark.elapsed()));

    let mark = Instant::now();
    reach_by_name(&lab)?;
    stay_apart(&lab, &containers)?;
    timings.push(("pings by name, and none across", mark.elapsed()));

    show_kernel(&lab, &app)?;
    show_wire(&lab, &app, &containers)?;
    let mark = Instant::now();
    show_encryption(&lab, &containers)?;
    timings.push(("an encrypted network", mark.elapsed()));
    show_convergence(&lab)?;

    title("Timings");
    for (what, took) in timings {
        line(&format!("{what:<34} {:>7.0} ms", took.as_secs_f64() * 1e3));
    }
    line(&format!("{:<34} {:>7.1} s", "all", start.elapsed().as_secs_f64()));
    match keep {
        true => leave(lab),
        false => take_down(lab),
    }
}

fn show_hosts(lab: &Lab) -> anyhow::Result<()> {
    title("Three hosts, network namespaces on one underlay");
    for host in lab.hosts() {
        typed(host, &["ip", "-br", "address", "show", "eth0"])?;
    }
    Ok(())
}

fn make_cluster(lab: &Lab) -> anyhow::Result<()> {
    title("A cluster: one host makes it, the others join with a token");
    let first = lab.host(1);
    weft(first, &format!("init --name h1 --advertise {}", first.address()))?;
    start_agent(first)?;
    for host in &lab.hosts()[1..] {
        let token = weft(first, "token create")?;
        let (name, address) = (host.name(), host.address());
        weft(host, &format!("join {token} --name {name} --advertise {address}"))?;
        start_agent(host)?;
    }
    lab.wait_all_alive(Duration::from_secs(15))?;
    weft(lab.host(2), "nodes").map(drop)
}

fn make_networks(lab: &Lab) -> anyhow::Result<NetworkView> {
    title("Two networks, known to every host");
    weft(lab.host(1), "network create app --ipv6")?;
    weft(lab.host(3), "network create vault --internal")?;
    for host in lab.hosts() {
        eventually(Duration::from_secs(5), "every host knows both networks", || {
            host.weft("network inspect app vault")?.ok()
        })?;
    }
    weft(lab.host(2), "network ls")?;
    NetworkView::read(lab.host(1), "app")
}

fn start_containers(lab: &Lab) -> anyhow::Result<Vec<Container>> {
    title("Containers on all hosts: namespaces with a process in them");
    let mut containers = Vec::new();
    for (index, network, name) in [
        (1, "app", "web"),
        (2, "app", "worker"),
        (3, "app", "cache"),
        (1, "vault", "keys"),
        (3, "vault", "store"),
    ] {
        let host = lab.host(index);
        let run = format!("run --network {network} --name {name} -d -- sleep 3600");
        let pid = weft(host, &run)?;
        containers.push(Container::running(host, name, pid.parse().context("a process id")?));
    }
    eventually(Duration::from_secs(5), "h2 knows all five containers", || {
        let ps = host_ps(lab.host(2))?;
        ensure!(ps == 5, "{ps} endpoints");
        Ok(())
    })?;
    weft(lab.host(2), "ps")?;
    Ok(containers)
}

fn reach_by_name(lab: &Lab) -> anyhow::Result<()> {
    title("By name across hosts, IPv4 and IPv6");
    let here = lab.host(2);
    weft(here, "run --network app --name guest4 -- ping -4 -c 2 -i 0.2 web")?;
    weft(here, "run --network app --name guest6 -- ping -6 -c 2 -i 0.2 cache.app.weft.internal")?;
    weft(here, "resolve web --network app").map(drop)
}

fn stay_apart(lab: &Lab, containers: &[Container]) -> anyhow::Result<()> {
    title("The other network: no name, no packet");
    let here = lab.host(2);
    let store = containers.iter().find(|c| c.name() == "store").context("there is a store")?;
    let address = store.sh("ip -4 -o address show dev eth0")?;
    let address = address.split_whitespace().nth(3).and_then(|cidr| cidr.split('/').next());
    let address = address.context("store has an address")?;
    for (command, word) in [
        ("run --network app --name asker -- ping -c 1 -W 1 store".to_owned(), "ping: store:"),
        (
            format!("run --network app --name stranger -- ping -c 2 -i 0.2 -W 1 {address}"),
            "100% packet loss",
        ),
    ] {
        let ran = here.weft(&command)?;
        line(&format!("h2# weft {command}"));
        show(&ran.stdout);
        show(&ran.stderr);
        ensure!(format!("{ran}").contains(word), "the networks are not apart: {ran}");
    }
    // The same address answers inside its own network.
    weft(lab.host(1), &format!("run --network vault --name insider -- ping -c 1 {address}"))
        .map(drop)
}

fn show_kernel(lab: &Lab, app: &NetworkView) -> anyhow::Result<()> {
    title("What the kernel of h1 was told");
    let host = lab.host(1);
    let namespace = app.namespace();
    let inside = ["ip", "netns", "exec", &namespace];
    typed(host, &[&inside[..], &["bridge", "fdb", "show", "dev", "vx0"]].concat())?;
    typed(host, &[&inside[..], &["ip", "neigh", "show", "dev", "vx0"]].concat())?;
    Ok(())
}

fn show_wire(lab: &Lab, app: &NetworkView, containers: &[Container]) -> anyhow::Result<()> {
    title("One ping on the underlay, decoded by tcpdump");
    let web = containers.iter().find(|c| c.name() == "web").context("there is a web")?;
    let file = lab.dir().join("demo.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p1", "udp port 4789", file)?;
    web.ping("worker")?;
    let lines = capture.stop("")?;
    let vni = format!("vni {}", app.vni);
    ensure!(lines.iter().any(|line| line.contains(&vni)), "no {vni} in {lines:?}");
    lines.iter().take(4).for_each(|packet| line(packet));
    Ok(())
}

fn show_encryption(lab: &Lab, plain: &[Container]) -> anyhow::Result<()> {
    title("An encrypted network: the same ping, and what the underlay sees of it");
    weft(lab.host(1), "network create secret --encrypted")?;
    let mut sealed = Vec::new();
    for (index, name) in [(1, "north"), (2, "south")] {
        let host = lab.host(index);
        eventually(Duration::from_secs(5), "every host knows the network", || {
            host.weft("network inspect secret")?.ok()
        })?;
        let pid = weft(host, &format!("run --network secret --name {name} -d -- sleep 3600"))?;
        sealed.push(Container::running(host, name, pid.parse().context("a process id")?));
    }
    let web = plain.iter().find(|c| c.name() == "web").context("there is a web")?;
    weft(lab.host(1), "run --network secret --name guest -- ping -c 2 -i 0.2 -W 1 south")?;
    for (from, to, network, clear) in
        [(web, "worker", "app", true), (&sealed[0], "south", "secret", false)]
    {
        let file = lab.dir().join(format!("{network}.pcap"));
        let filter = "udp portrange 6791-6798 or udp port 4789";
        let capture = Capture::start(&lab.underlay_namespace(), "p1", filter, file)?;
        let pattern: String = WORDS.iter().map(|byte| format!("{byte:02x}")).collect();
        let target = weft(lab.host(2), &format!("resolve {to} --network {network}"))?;
        let ip = target.split_whitespace().find(|word| word.parse::<IpAddr>().is_ok());
        let ip = ip.with_context(|| format!("no address in {target:?}"))?;
        from.exec(&["ping", "-n", "-c", "2", "-i", "0.2", "-p", &pattern, ip])?.ok()?;
        let recording = capture.record()?;
        let (found, all) = (recording.holding(WORDS), recording.packets().len());
        let words = String::from_utf8_lossy(WORDS);
        line(&format!("{network}: {words:?} is in {found} of {all} packets between the hosts"));
        ensure!((found > 0) == clear && all > 0, "{network} is not what it should be");
        let last = recording.packets().last().context("a packet")?;
        dump(last.get(42..).context("a packet has headers")?);
    }
    let status = lab.host(1).weft("status")?.ok()?;
    line("h1# weft status");
    // Offloads, peers and encrypted networks stand at its end.
    let rest = status.lines().skip_while(|text| !text.starts_with("OFFLOAD"));
    rest.for_each(|text| line(&format!("   {text}")));
    Ok(())
}

/// Shows the beginning of what a UDP packet carries.
fn dump(payload: &[u8]) {
    for row in payload.chunks(16).take(9) {
        let hex: String = row.iter().map(|byte| format!("{byte:02x} ")).collect();
        let shown = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' };
        let text: String = row.iter().map(shown).collect();
        line(&format!("   {hex:<48} {text}"));
    }
}

fn show_convergence(lab: &Lab) -> anyhow::Result<()> {
    title("From attach on one host to seen on another, 20 times");
    let mut course = Course::new(lab)?;
    let samples = (0..20).map(|_| course.measure()).collect::<anyhow::Result<Vec<_>>>()?;
    let resolved = milliseconds(&samples, |sample| sample.resolved);
    let reached = milliseconds(&samples, |sample| sample.reached);
    for (what, values) in [("name resolved", resolved), ("first ping answered", reached)] {
        let (median, slowest) = (percentile(&values, 50.0), percentile(&values, 100.0));
        line(&format!("{what:<34} median {median:.1} ms, slowest {slowest:.1} ms"));
    }
    Ok(())
}

fn leave(lab: Lab) -> anyhow::Result<()> {
    title("The lab stays");
    for host in lab.hosts() {
        line(&format!("enter {}:   {}", host.name(), host.enter_script().display()));
    }
    line("   then:     weft ps, weft nodes, weft network inspect app, ip netns");
    line("take down:   make clean");
    lab.keep()
}

fn take_down(lab: Lab) -> anyhow::Result<()> {
    let dir: PathBuf = lab.dir().to_owned();
    lab.finish();
    ensure!(!dir.exists(), "{} is left", dir.display());
    title("Done; nothing is left behind");
    Ok(())
}

fn start_agent(host: &Host) -> anyhow::Result<()> {
    line(&format!("{}# weft agent &", host.name()));
    host.start_agent()
}

fn host_ps(host: &Host) -> anyhow::Result<usize> {
    Ok(host.weft_json("ps")?.as_array().map_or(0, Vec::len))
}

/// Types `weft ARGS` on a host, shows what it says, and returns that.
fn weft(host: &Host, args: &str) -> anyhow::Result<String> {
    let words: Vec<&str> = args.split_whitespace().collect();
    typed(host, &[&["weft"], &words[..]].concat())
}

fn typed(host: &Host, argv: &[&str]) -> anyhow::Result<String> {
    line(&format!("{}# {}", host.name(), shortened(&argv.join(" "))));
    let text = host.exec(argv)?.ok()?;
    show(&text);
    Ok(text)
}

fn show(text: &str) {
    text.lines().for_each(|output| line(&format!("   {}", shortened(output))));
}

/// A token is long, and this one is used up when it is read.
fn shortened(text: &str) -> String {
    let shorten = |word: &str| match word.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &word[..end]),
        None => word.to_owned(),
    };
    text.split(' ').map(shorten).collect::<Vec<_>>().join(" ")
}

fn title(text: &str) {
    line("");
    line(&format!("== {text}"));
}

#[expect(clippy::print_stdout, reason = "a demonstration speaks")]
fn line(text: &str) {
    println!("{text}");
}

/// What the echoes of the encrypted part say.
const WORDS: &[u8; 16] = b"meet me at dawn!";
