//! Ports that Docker is asked to publish for containers whose way out is weft's gateway.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use weft_testbed::{By, Daemon, Docker, Echo, Engine as _, Lab, Stop, eventually};

const SOON: Duration = Duration::from_secs(20);
/// Where the containers serve.
const TARGET: u16 = 7000;

/// Hosts with Docker, the network `out` of weft's gateway and of both families in each.
fn hosts(count: u8) -> anyhow::Result<(Lab, Vec<Docker>)> {
    let (lab, dockers) = Docker::on_cluster(count)?;
    lab.underlay_sh("ip address add fd98::1/64 dev br0 nodad")?;
    for (index, docker) in (1..).zip(&dockers) {
        docker.host().sh(&format!("ip address add fd98::1{index}/64 dev eth0 nodad"))?;
        let subnets = "--ipv6 --subnet 10.81.0.0/24 --subnet fd00:81::/64";
        docker.create_network(&format!("{subnets} -o weft.gateway=true out"))?;
    }
    Ok((lab, dockers))
}

/// A server in one of Docker's containers.
fn echo(docker: &Docker, container: &str) -> anyhow::Result<Echo> {
    Echo::start(&docker.process(container)?, TARGET)
}

/// Waits until `container` answers at a port of a host; returns which client it sees of one that is
/// on no host.
fn reached(lab: &Lab, by: By, at: SocketAddr, container: &str) -> anyhow::Result<IpAddr> {
    eventually(SOON, &format!("{container} answers at {at}"), || {
        let answer = by.ask(&lab.underlay_namespace(), at)?;
        ensure!(answer.name == container, "{answer:?}");
        Ok(answer.client)
    })
}

/// Sees that Docker itself publishes nothing on a host, nor holds `port` there.
fn left_to_weft(docker: &Docker, port: u16) -> anyhow::Result<()> {
    let script = format!(
        "iptables -t nat -S | grep -w {port} || true; ps -eo args= | grep '[d]ocker-proxy' || true"
    );
    let found = docker.host().sh(&script)?;
    ensure!(found.is_empty(), "Docker has {port} as well: {found}");
    Ok(())
}

#[test]
fn a_port_leads_to_its_container_which_sees_who_asks_until_it_stops() -> anyhow::Result<()> {
    let (lab, dockers) = hosts(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    let ports = "-p 8080:7000 -p 8080:7000/udp -p 127.0.0.1:8081:7000 -p 7000";
    one.container("web", &format!("--network out {ports}"))?;
    let served = echo(one, "web")?;
    let (v4, v6) = (one.host().address(), "fd98::11".parse::<IpAddr>()?);
    for (ip, client) in [(v4, lab.router()), (v6, "fd98::1".parse()?)] {
        for by in [By::Tcp, By::Udp] {
            let seen = reached(&lab, by, SocketAddr::new(ip, 8080), "web")?;
            ensure!(seen == client, "{by:?} {ip}: {seen}, not {client}");
        }
    }
    left_to_weft(one, 8080)?;

    // The other host is a client as others are, and so are its containers; it has no such port.
    let at = SocketAddr::new(v4, 8080);
    let answer = By::Tcp.ask(&two.host().namespace()?, at)?;
    ensure!(answer.client == two.host().address(), "{answer:?}");
    two.container("client", "--network out")?;
    By::Tcp.ask(&two.process("client")?.namespace()?, at).context("from a container")?;
    let elsewhere = SocketAddr::new(two.host().address(), 8080);
    ensure!(By::Tcp.ask(&lab.underlay_namespace(), elsewhere).is_err(), "h2 has the port too");

    // One is for the host alone, and one has the number that was free.
    let here = one.host().namespace()?;
    By::Tcp.ask(&here, SocketAddr::from(([127, 0, 0, 1], 8081)))?;
    let local = SocketAddr::new(v4, 8081);
    ensure!(By::Tcp.ask(&lab.underlay_namespace(), local).is_err(), "reached from outside");
    let shown = one.host().weft("port web 7000/tcp")?.ok()?;
    let any: Vec<u16> = shown
        .lines()
        .filter(|line| line.starts_with("0.0.0.0:"))
        .filter_map(|line| line.rsplit(':').next()?.parse().ok())
        .filter(|port| *port != 8080)
        .collect();
    let [any] = any[..] else { anyhow::bail!("{shown}") };
    reached(&lab, By::Tcp, SocketAddr::new(v4, any), "web")?;

    // A restart is another sandbox, and the same ports.
    drop(served);
    one.run("restart -t 0 web")?;
    let served = echo(one, "web")?;
    reached(&lab, By::Tcp, at, "web")?;
    drop(served);
    one.run("stop -t 0 web")?;
    // Docker's own way may have them now, at once.
    let own = "--network bridge -p 8080:7000 -p 8080:7000/udp";
    one.container("next", own)?;
    let _served = echo(one, "next")?;
    reached(&lab, By::Tcp, at, "next")?;
    one.refuses("start web", &["8080", "docker-proxy"])?;
    one.run("rm -f next")?;
    one.run("start web")?;
    let _served = echo(one, "web")?;
    reached(&lab, By::Udp, at, "web")?;
    lab.finish();
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_refused_with_who_has_it_and_nothing_starts() -> anyhow::Result<()> {
    let (lab, dockers) = hosts(1)?;
    let [docker] = &dockers[..] else { unreachable!() };
    let host = docker.host();
    docker.container("web", "--network out -p 8080:7000")?;
    host.weft("service create shop --network out --vip none")?.ok()?;
    host.weft("publish shop 7000 --port 8081")?.ok()?;
    let _process = Daemon::start(host, "listener", &["socat", "TCP-LISTEN:8082,fork", "PIPE"])?;
    eventually(SOON, "the process listens", || host.sh("ss -tlnH 'sport = 8082' | grep -q 8082"))?;
    docker.container("own", "--network bridge -p 8083:7000")?;
    for (options, words) in [
        ("-p 8080:7000", ["port 0.0.0.0:8080/tcp", "container web of network out"]),
        ("-p 8081:7000", ["8081", "service shop of network out"]),
        ("-p 8082:7000", ["8082", "socat"]),
        ("-p 8083:7000", ["8083", "docker-proxy"]),
        ("-p 8084:7000 -p 8080:7001", ["8080", "container web of network out"]),
        ("-p 8085:7000/sctp", ["7000/sctp", "tcp and udp"]),
    ] {
        let line = format!("run -d --init --name late --network out {options} weft-test sleep 99");
        docker.refuses(&line, &words)?;
        let state = docker.run("inspect -f {{.State.Status}}/{{.State.Pid}} late")?;
        ensure!(state == "created/0", "{options}: {state}");
        let known =
            docker.run_args(&["network", "inspect", "-f", "{{json .Containers}}", "out"])?;
        ensure!(known.contains("web") && !known.contains("late"), "{options}: {known}");
        let endpoints = host.weft("ps")?.ok()?;
        ensure!(!endpoints.contains("late"), "{options}: {endpoints}");
        docker.run("rm late")?;
    }
    // None of two that were asked for together was opened.
    docker.container("late", "--network out -p 8084:7000 -p 8086:7000 -p 8080-8089:7001")?;
    let _served = echo(docker, "late")?;
    reached(&lab, By::Tcp, SocketAddr::new(host.address(), 8084), "late")?;
    // Of a range the first that nobody has, nor the container itself.
    let shown = host.weft("port late 7001")?.ok()?;
    ensure!(shown.starts_with("0.0.0.0:8085"), "{shown}");
    // A container that was refused starts when the port is free.
    docker.run("create --init --name waits --network out -p 8080:7000 weft-test sleep 1000000")?;
    docker.refuses("start waits", &["container web of network out"])?;
    docker.run("rm -f web")?;
    docker.run("start waits")?;
    let _served = echo(docker, "waits")?;
    reached(&lab, By::Tcp, SocketAddr::new(host.address(), 8080), "waits")?;
    lab.finish();
    Ok(())
}

#[test]
fn ports_outlive_the_agent_and_end_with_what_a_killed_daemon_lost() -> anyhow::Result<()> {
    let (lab, dockers) = hosts(1)?;
    let [docker] = &dockers[..] else { unreachable!() };
    let host = docker.host();
    let at = |port| SocketAddr::new(host.address(), port);
    docker.container("web", "--network out -p 8080:7000 --restart always")?;
    docker.container("lost", "--network out -p 8081:7000")?;
    let served = echo(docker, "web")?;
    reached(&lab, By::Tcp, at(8080), "web")?;
    for how in [Stop::Killed, Stop::Gracefully] {
        host.stop_agent(how)?;
        By::Tcp.ask(&lab.underlay_namespace(), at(8080)).context("while the agent is away")?;
        host.start_agent()?;
        reached(&lab, By::Tcp, at(8080), "web")?;
        let line = "run --rm --network out -p 8080:7000 weft-test true";
        docker.refuses(line, &["container web of network out"])?;
    }

    // Docker says goodbye to nobody then.
    drop(served);
    docker.stop_daemon("KILL")?;
    docker.start_daemon(&[])?;
    docker.container("next", "--network out -p 8081:7000")?;
    let _next = echo(docker, "next")?;
    reached(&lab, By::Tcp, at(8081), "next")?;
    let running = || docker.run("inspect -f {{.State.Running}} web");
    eventually(SOON, "web is back", || {
        let running = running()?;
        ensure!(running == "true", "{running}");
        Ok(())
    })?;
    let _served = echo(docker, "web")?;
    reached(&lab, By::Tcp, at(8080), "web")?;

    // One that is removed while no agent runs waits for it.
    host.stop_agent(Stop::Killed)?;
    thread::scope(|scope| {
        let removed = scope.spawn(|| docker.run("rm -f next"));
        host.start_agent()?;
        removed.join().expect("no panic")
    })?;
    docker.container("last", "--network out -p 8081:7000")?;
    let _last = echo(docker, "last")?;
    reached(&lab, By::Tcp, at(8081), "last")?;
    lab.finish();
    Ok(())
}

#[test]
fn ports_of_containers_that_outlive_their_daemon_stay_and_end_with_them() -> anyhow::Result<()> {
    let (lab, dockers) = hosts(1)?;
    let [docker] = &dockers[..] else { unreachable!() };
    let at = SocketAddr::new(docker.host().address(), 8080);
    docker.stop_daemon("TERM")?;
    docker.start_daemon(&["--live-restore"])?;
    docker.container("web", "--network out -p 8080:7000")?;
    let served = echo(docker, "web")?;
    reached(&lab, By::Tcp, at, "web")?;
    docker.stop_daemon("KILL")?;
    By::Tcp.ask(&lab.underlay_namespace(), at).context("while the daemon is away")?;
    docker.host().stop_agent(Stop::Killed)?;
    docker.host().start_agent()?;
    docker.start_daemon(&["--live-restore"])?;
    ensure!(reached(&lab, By::Tcp, at, "web")? == lab.router(), "the client is hidden");
    docker.refuses("run --rm --network out -p 8080:7000 weft-test true", &["container web"])?;
    drop(served);
    docker.run("rm -f web")?;
    docker.container("next", "--network out -p 8080:7000")?;
    let _served = echo(docker, "next")?;
    reached(&lab, By::Tcp, at, "next")?;
    lab.finish();
    Ok(())
}

#[test]
fn ports_follow_the_network_that_leads_out() -> anyhow::Result<()> {
    let (lab, dockers) = hosts(1)?;
    let [docker] = &dockers[..] else { unreachable!() };
    let at = SocketAddr::new(docker.host().address(), 8080);
    docker.create_network("--subnet 10.78.0.0/24 app")?;
    docker.container("web", "--network app -p 8080:7000")?;
    let _served = echo(docker, "web")?;
    let outside = lab.router();
    // Docker's own way first, then weft's, and back.
    reached(&lab, By::Tcp, at, "web")?;
    ensure!(left_to_weft(docker, 8080).is_err(), "Docker does not publish");
    docker.run("network connect out web")?;
    ensure!(reached(&lab, By::Tcp, at, "web")? == outside, "the client is hidden");
    left_to_weft(docker, 8080)?;
    docker.run("network disconnect out web")?;
    reached(&lab, By::Tcp, at, "web")?;
    ensure!(left_to_weft(docker, 8080).is_err(), "Docker does not publish again");

    // Of two that could lead out Docker takes one, and the ports are there.
    docker.create_network("--subnet 10.82.0.0/24 -o weft.gateway=true beyond")?;
    for network in ["out", "beyond"] {
        docker.run(&format!("network connect {network} web"))?;
    }
    for network in ["out", "beyond"] {
        ensure!(reached(&lab, By::Tcp, at, "web")? == outside, "the client is hidden");
        left_to_weft(docker, 8080)?;
        docker.run(&format!("network disconnect {network} web"))?;
    }
    lab.finish();
    Ok(())
}

/// What comes to a published service goes back by the container's default route.
#[test]
fn a_service_is_reached_whatever_leads_its_containers_out() -> anyhow::Result<()> {
    let (lab, dockers) = hosts(1)?;
    let [docker] = &dockers[..] else { unreachable!() };
    docker.create_network("--subnet 10.78.0.0/24 app")?;
    let clients = [("app", 8090, None), ("out", 8091, Some(lab.router()))];
    for (network, port, client) in clients {
        let host = docker.host();
        host.weft(&format!("service create {network}-web --network {network} --vip none"))?.ok()?;
        host.weft(&format!("publish {network}-web {TARGET} --port {port}"))?.ok()?;
        let name = format!("in-{network}");
        docker
            .container(&name, &format!("--network {network} --label weft.service={network}-web"))?;
        let _served = echo(docker, &name)?;
        let seen = reached(&lab, By::Tcp, SocketAddr::new(host.address(), port), &name)?;
        ensure!(client.is_none_or(|client| client == seen), "{network}: {seen}");
    }
    lab.finish();
    Ok(())
}
