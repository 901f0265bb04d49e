//! What happens to containers when agents, hosts and links fail.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use weft_testbed::{
    Container, DnsReply, Flow, Host, Lab, NetworkView, PingStream, Pinger, Question, Stop,
    eventually, holds_for, query, transfer,
};

const SOON: Duration = Duration::from_secs(20);
const MILLISECOND: Duration = Duration::from_millis(1);

#[test]
fn an_agent_that_is_killed_for_30_s_costs_no_packet() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = attached(lab.host(1), "c1", "")?;
    let two = attached(lab.host(2), "c2", "")?;
    let far = address(&two)?;
    one.reaches(&far.to_string(), SOON)?;

    let pings = PingStream::start(&one, far, MILLISECOND)?;
    let flow = Flow::start(&one, &two, far, MILLISECOND * 2)?;
    let back = Flow::start(&two, &one, address(&one)?, MILLISECOND * 2)?;
    lab.host(1).stop_agent(Stop::Killed)?;
    let dead = Instant::now();
    let three = attached(lab.host(3), "c3", "")?;
    holds_for(Duration::from_secs(30).saturating_sub(dead.elapsed()), "h1 has no agent", || {
        ensure!(lab.host(1).weft("status")?.code == 3, "an agent answers");
        two.ping(&address(&one)?.to_string()).map(drop)
    })?;

    let restart = Instant::now();
    lab.host(1).start_agent()?;
    let ready = restart.elapsed();
    one.reaches("c3", SOON)?;
    let reached = restart.elapsed();
    ensure!(reached < Duration::from_secs(10), "c3 after {reached:?}, ready after {ready:?}");
    three.reaches("c1", SOON)?;
    report("restart to a container attached meanwhile", reached);

    let (pings, flow, back) = (pings.stop()?, flow.stop()?, back.stop()?);
    ensure!(pings.sent > 5000 && pings.lost() == 0, "{pings:?}");
    for flow in [flow, back] {
        ensure!(flow.sent_blocks == flow.received_blocks, "{flow:?}");
    }
    lab.finish();
    Ok(())
}

#[test]
fn a_restarted_agent_rewrites_nothing() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let app = lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    let one = attached(lab.host(1), "c1", "")?;
    let two = attached(lab.host(2), "c2", "")?;
    one.reaches("c2", SOON)?;

    let host = lab.host(1);
    let links = app.sh(host, "ip -o link show")?;
    // With handles: a table that was loaded anew has another one.
    let rules = "nft -a list ruleset | sed 's/counter packets [0-9]* bytes [0-9]*//'";
    let rules_before = app.sh(host, rules)? + &host.sh(rules)?;
    for how in [Stop::Killed, Stop::Gracefully] {
        let events = host.dir().join("events");
        let watch = format!(
            "ip netns exec {} ip monitor link address route neigh >{} 2>&1 & echo $!",
            app.namespace(),
            events.display()
        );
        let watcher = host.sh(&watch)?;
        host.stop_agent(how)?;
        host.start_agent()?;
        lab.wait_all_alive(SOON)?;
        one.reaches("c2", SOON)?;
        two.reaches("c1", SOON)?;
        host.sh(&format!("kill {watcher}"))?;
        let rewritten = std::fs::read_to_string(&events)?;
        // The bridge's and the sandbox's own neighbour states come and go with traffic.
        let ours: Vec<_> = rewritten
            .lines()
            .filter(|line| line.contains("PERMANENT") || !line.contains("lladdr"))
            .filter(|line| {
                !["REACHABLE", "STALE", "DELAY", "PROBE"].iter().any(|s| line.contains(s))
            })
            .collect();
        ensure!(ours.is_empty(), "{how:?}: the agent changed {ours:#?}");
        ensure!(app.sh(host, "ip -o link show")? == links, "{how:?}: links changed");
        let rules_after = app.sh(host, rules)? + &host.sh(rules)?;
        ensure!(rules_after == rules_before, "{how:?}: {rules_before}\nbecame\n{rules_after}");
    }
    lab.finish();
    Ok(())
}

#[test]
fn names_of_a_lost_host_vanish_and_return() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = attached(lab.host(1), "c1", "")?;
    let two = attached(lab.host(2), "c2", "")?;
    let three = attached(lab.host(3), "c3", "--ip 10.40.0.77")?;
    // One in each third of the subnet: each of the three hosts lends one third.
    let thirds = ["10.40.0.40", "10.40.0.120", "10.40.0.200"];
    let mut moving = Vec::new();
    for ip in thirds {
        moving.push(attached(lab.host(1), &format!("old-{}", &ip[8..]), &format!("--ip {ip}"))?);
    }
    for from in [&one, &two] {
        from.reaches("c3", SOON)?;
    }
    for ip in thirds {
        three.reaches(ip, SOON)?;
    }

    lab.cut(3)?;
    let lost = Instant::now();
    for from in [&one, &two] {
        resolves_to(from, "c3", &[], SOON)?;
    }
    let vanished = lost.elapsed();
    report("cut to names gone on both other hosts", vanished);
    ensure!(vanished <= SOON, "gone after {vanished:?}");

    // What the lost host holds is not given out twice.
    let thief = lab.host(1).container("thief")?;
    thief.try_attach("app", "--ip 10.40.0.77")?.refused(1, &["10.40.0.77", "h3"])?;
    // What the others lend may move while it is away; what it lends may not.
    let mut moved = Vec::new();
    for (old, ip) in moving.iter().zip(thirds) {
        old.detach("app")?;
        let new = lab.host(2).container(&format!("new-{}", &ip[8..]))?;
        let ran = new.try_attach("app", &format!("--ip {ip}"))?;
        match ran.code {
            0 => moved.push((new, ip)),
            _ => ran.refused(1, &["h3"]).map(drop)?,
        }
    }
    ensure!(moved.len() == 2, "two of three thirds are lent by hosts that are there: {moved:?}");
    for (new, ip) in &moved {
        resolves_to(&one, new.name(), &[ip], SOON)?;
    }

    lab.mend(3)?;
    let healed = Instant::now();
    for from in [&one, &two] {
        resolves_to(from, "c3", &["10.40.0.77"], SOON)?;
    }
    let returned = healed.elapsed();
    for (new, ip) in &moved {
        resolves_to(&three, new.name(), &[ip], SOON)?;
    }
    let seen = healed.elapsed();
    report("mend to names back on both other hosts", returned);
    report("mend to the lost host's knowledge of a moved address", seen);
    ensure!(returned <= SOON, "back after {returned:?}");
    for (new, ip) in &moved {
        transfer(&three, new, ip.parse()?, 100_000).context("to the right host")?;
    }
    one.reaches("c3", SOON)?;
    lab.finish();
    Ok(())
}

#[test]
fn an_agent_that_starts_again_denies_no_name_that_there_is() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = attached(lab.host(1), "c1", "")?;
    let two = attached(lab.host(2), "c2", "--service web --ip 10.40.0.77")?;
    lab.host(2).weft("service create web --network app --port 80 --vip 10.40.0.200")?.ok()?;
    let known = [("c2", "10.40.0.77"), ("tasks.web", "10.40.0.77"), ("web.app", "10.40.0.200")];
    for (name, ip) in known {
        resolves_to(&one, name, &[ip], SOON)?;
    }
    let socket = resolver_of(&one)?;
    let ask = |name: &str| query(&socket, name, Question::A, Duration::from_millis(200));

    // What no agent answers is asked again by every resolver library, so silence is no denial.
    let host = lab.host(1);
    for _ in 0..3 {
        let start = std::thread::scope(|scope| {
            let restart = scope.spawn(|| {
                host.stop_agent(Stop::Killed)?;
                host.start_agent()
            });
            let mut asked = Asked::default();
            while !restart.is_finished() || asked.since.elapsed() < Duration::from_secs(4) {
                for (name, ip) in known {
                    asked.note(name, ip, ask(name).ok())?;
                }
            }
            restart.join().map_err(|_| anyhow::anyhow!("the restart panicked"))??;
            anyhow::Ok(asked)
        })?;
        ensure!(start.answered > 100, "{start:?}");
    }

    // A host that hears nobody: it knows what it knew, until that is too long ago.
    host.stop_agent(Stop::Killed)?;
    lab.cut(1)?;
    host.start_agent()?;
    let started = Instant::now();
    let mut asked = Asked::default();
    while started.elapsed() < Duration::from_secs(5) {
        for (name, ip) in known {
            asked.note(name, ip, ask(name).ok())?;
        }
        for unknown in ["new.app", "new.weft.internal"] {
            let Ok(reply) = ask(unknown) else { continue };
            ensure!(reply.rcode == 2, "{unknown} after {:?}: {reply:?}", started.elapsed());
            asked.undenied += 1;
        }
    }
    ensure!(asked.answered > 100 && asked.undenied > 100, "{asked:?}");
    resolves_to(&one, "c2", &[], Duration::from_secs(20))?;
    eventually(SOON, "the name is denied", || {
        let reply = ask("c2.app")?;
        ensure!(reply.rcode == 3, "{reply:?}");
        Ok::<_, anyhow::Error>(())
    })?;
    report("start without anybody to names gone", started.elapsed());
    lab.mend(1)?;
    for (name, ip) in known {
        resolves_to(&one, name, &[ip], Duration::from_secs(20))?;
    }
    two.reaches("c1", SOON)?;
    lab.finish();
    Ok(())
}

#[test]
fn names_of_a_host_without_power_vanish_and_it_comes_back_clean() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = attached(lab.host(1), "c1", "")?;
    let lost = attached(lab.host(3), "c3", "")?;
    one.reaches("c3", SOON)?;

    lab.host(3).power_off();
    resolves_to(&one, "c3", &[], SOON)?;
    drop(lost);
    lab.power_on(3)?;
    lab.host(3).start_agent()?;
    lab.wait_all_alive(SOON)?;
    // Its container is gone with its power, and its name must not come back.
    eventually(SOON, "c3 is gone for good", || {
        let app = NetworkView::read(lab.host(1), "app")?;
        ensure!(app.endpoints == ["c1"], "{app:?}");
        Ok(())
    })?;
    let again = attached(lab.host(3), "c3", "")?;
    one.reaches("c3", SOON)?;
    again.reaches("c1", SOON)?;
    lab.finish();
    Ok(())
}

#[test]
fn a_released_address_is_reachable_at_once_on_its_new_host() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let mut askers = Vec::new();
    for (host, name) in lab.hosts().iter().zip(["a1", "a2", "a3"]) {
        askers.push(attached(host, name, "")?);
    }
    let target: IpAddr = "10.40.0.99".parse()?;
    let mut slowest = Duration::ZERO;
    for turn in 0..6_u8 {
        let host = lab.host(turn % 3 + 1);
        let container = host.container(&format!("t{turn}"))?;
        container.attach("app", "--ip 10.40.0.99")?;
        let start = Instant::now();
        for asker in &askers {
            let pinger = Pinger::open(asker, target)?;
            let what = format!("{} reaches {target} on {}", asker.name(), host.name());
            let mut sequence = 0;
            eventually(SOON, &what, || {
                sequence += 1;
                let answer = pinger.echo(sequence, Duration::from_millis(20));
                answer.map_err(|error| error.to_string())?.ok_or_else(|| "silence".to_owned())
            })?;
        }
        slowest = slowest.max(start.elapsed());
        transfer(&askers[0], &container, target, 10_000).context("to the right host")?;
        container.detach("app")?;
    }
    report("attach to reachable from all three hosts, slowest of 6", slowest);
    // Long before a kernel forgets by itself where the address was.
    ensure!(slowest < Duration::from_secs(10), "reachable after {slowest:?}");
    lab.finish();
    Ok(())
}

#[test]
fn both_sides_of_a_partition_allocate_and_no_address_is_given_twice() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let mut containers = Vec::new();
    for (host, name) in lab.hosts().iter().zip(["before1", "before2", "before3"]) {
        containers.push(attached(host, name, "")?);
    }

    lab.partition(&[1], &[2, 3])?;
    eventually(Duration::from_secs(30), "each side has lost the other", || {
        for (index, gone) in [(1, 2), (2, 1), (3, 1)] {
            let states = lab.node_states(index)?;
            ensure!(states[&format!("h{gone}")] != "alive", "h{index} sees {states:?}");
        }
        Ok(())
    })?;
    for host in lab.hosts() {
        for number in 1..=3 {
            containers.push(attached(host, &format!("{}-{number}", host.name()), "")?);
        }
    }

    lab.heal()?;
    lab.wait_all_alive(3 * SOON)?;
    let views = eventually(SOON, "all hosts have one view", || {
        let views: Vec<_> = lab.hosts().iter().map(|host| view(host)).collect::<Result<_, _>>()?;
        let one: BTreeSet<_> = views.iter().collect();
        ensure!(one.len() == 1 && views[0].len() == containers.len(), "{views:#?}");
        Ok(views)
    })?;
    let addresses: BTreeSet<_> = views[0].iter().map(|(_, address, _)| address).collect();
    ensure!(addresses.len() == containers.len(), "an address is given twice: {views:#?}");
    for (from, to) in containers.iter().zip(containers.iter().rev()) {
        from.reaches(to.name(), SOON)?;
    }
    lab.finish();
    Ok(())
}

#[test]
fn a_node_that_runs_out_of_addresses_says_where_they_are_and_what_helps() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/26")?;
    let other = attached(lab.host(1), "other", "")?;

    // What the other side lends cannot be had; what is here can, to the last address.
    lab.partition(&[1], &[2])?;
    let (attached, refusal) = fill(lab.host(2), "lost")?;
    ensure!(!attached.is_empty(), "a host that is cut off has nothing to give: {refusal}");
    for word in ["app", "h1", "reached", "leased", "release"] {
        ensure!(refusal.contains(word), "the error lacks {word:?}: {refusal}");
    }

    // All of the subnet but its first, its last and the gateway's address is used in the end.
    lab.heal()?;
    lab.wait_all_alive(3 * SOON)?;
    let (more, refusal) = fill(lab.host(2), "healed")?;
    for word in ["app", "10.40.0.0/26", "h1", "release", "larger subnet"] {
        ensure!(refusal.contains(word), "the error lacks {word:?}: {refusal}");
    }
    let all = attached.iter().chain(&more).chain([&other]);
    let addresses: BTreeSet<_> = all.map(address).collect::<Result<_, _>>()?;
    ensure!(addresses.len() == attached.len() + more.len() + 1, "{addresses:?}");
    lab.finish();
    Ok(())
}

#[test]
fn a_lossy_link_does_not_make_a_node_suspect() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = attached(lab.host(1), "c1", "")?;
    for index in 1..=3 {
        lab.lose(index, 10)?;
    }
    holds_for(Duration::from_secs(15), "all are alive at 10 % loss", || {
        for index in 1..=3 {
            let states = lab.node_states(index)?;
            ensure!(states.values().all(|state| state == "alive"), "h{index} sees {states:?}");
        }
        Ok(())
    })?;
    // News still arrives.
    let two = attached(lab.host(2), "c2", "")?;
    resolves_to(&one, "c2", &[&address(&two)?.to_string()], SOON)?;
    lab.finish();
    Ok(())
}

/// Attaches to `app` until that is refused; returns what was attached, and the refusal.
fn fill(host: &std::sync::Arc<Host>, name: &str) -> anyhow::Result<(Vec<Container>, String)> {
    let mut containers = Vec::new();
    for number in 0..64 {
        let container = host.container(&format!("{name}-{number}"))?;
        let ran = container.try_attach("app", "")?;
        if ran.code != 0 {
            return Ok((containers, ran.refused(1, &[])?));
        }
        container.note(ran)?;
        containers.push(container);
    }
    anyhow::bail!("{} attached 64 containers in a subnet of 64 addresses", host.name())
}

fn attached(host: &std::sync::Arc<Host>, name: &str, options: &str) -> anyhow::Result<Container> {
    let container = host.container(name)?;
    container.attach("app", options)?;
    Ok(container)
}

fn address(container: &Container) -> anyhow::Result<IpAddr> {
    Ok(container.on("app")?.ip4.context("no IPv4 address")?.into())
}

/// What was answered while an agent started.
#[derive(Debug)]
struct Asked {
    since: Instant,
    answered: u32,
    undenied: u32,
}

impl Default for Asked {
    fn default() -> Self {
        Self { since: Instant::now(), answered: 0, undenied: 0 }
    }
}

impl Asked {
    /// Takes silence and the right address, and nothing else.
    fn note(&mut self, name: &str, ip: &str, reply: Option<DnsReply>) -> anyhow::Result<()> {
        let Some(reply) = reply else { return Ok(()) };
        let right = reply.rcode == 0 && reply.addresses == [ip.parse::<IpAddr>()?];
        ensure!(right, "{name} after {:?}: {reply:?}", self.since.elapsed());
        self.answered += 1;
        Ok(())
    }
}

/// A socket to the gateway that answers a container's names.
fn resolver_of(from: &Container) -> anyhow::Result<UdpSocket> {
    let gateway = *from.on("app")?.gateways.first().context("no gateway")?;
    from.inside(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(SocketAddr::new(gateway, 53))?;
        Ok(socket)
    })
}

/// Asks the gateway itself until it answers `addresses`, an empty list being "no such name".
fn resolves_to(
    from: &Container,
    name: &str,
    addresses: &[&str],
    deadline: Duration,
) -> anyhow::Result<()> {
    let socket = resolver_of(from)?;
    let wanted: Vec<IpAddr> =
        addresses.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    eventually(deadline, &format!("{} resolves {name} to {addresses:?}", from.name()), || {
        let reply = query(&socket, name, Question::A, Duration::from_millis(200))?;
        ensure!(reply.addresses == wanted && (reply.rcode == 0 || wanted.is_empty()), "{reply:?}");
        Ok(())
    })
}

/// Name, address and host of every endpoint that `host` would answer for.
fn view(host: &Host) -> anyhow::Result<BTreeSet<(String, String, String)>> {
    let endpoints = host.weft_json("ps")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let endpoints = endpoints.as_array().context("no list")?;
    let reachable = endpoints.iter().filter(|endpoint| endpoint["reachable"] == true);
    Ok(reachable.map(|e| (text(&e["name"]), text(&e["addresses"][0]), text(&e["node"]))).collect())
}

#[expect(clippy::print_stdout, reason = "a figure that --nocapture shows")]
fn report(what: &str, took: Duration) {
    println!("FIGURE {what}: {:.3} s", took.as_secs_f64());
}
