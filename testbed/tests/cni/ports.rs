//! Ports of the host that a runtime has the plugin publish.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{By, Container, Daemon, Echo, Host, Lab, Stop, eventually};

use crate::{
    SOON,
    call::{Call, cluster, conf, own},
};

/// Where the containers serve.
const TARGET: u16 = 7000;

/// A container of the lab's that the plugin is to attach, by its name.
fn container(lab: &Lab, index: u8, name: &str) -> anyhow::Result<Container> {
    let container = lab.host(index).container(name)?;
    lab.host(index).sh(&format!("ip netns attach {name} {}", container.pid()))?;
    Ok(container)
}

/// The configuration of a network, as a runtime that publishes ports hands it over.
fn with_ports(network: &str, mappings: &Value) -> Value {
    let mut conf = conf("1.1.0", network);
    conf["capabilities"] = json!({"portMappings": true});
    conf["runtimeConfig"] = json!({"portMappings": mappings});
    conf
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

/// Waits until a process could have a port of a host.
fn is_free(host: &Host, port: u16) -> anyhow::Result<()> {
    let bind = || host.inside(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?));
    eventually(SOON, &format!("port {port} is free"), bind).map(drop)
}

#[test]
fn a_mapped_port_leads_to_its_container_until_del() -> anyhow::Result<()> {
    let lab = cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    lab.underlay_sh("ip address add fd98::1/64 dev br0 nodad")?;
    let (host, other) = (lab.host(1), lab.host(2));
    host.sh("ip address add fd98::11/64 dev eth0 nodad")?;
    let (web, late) = (container(&lab, 1, "web")?, container(&lab, 1, "late")?);
    let mapped = with_ports(
        "app",
        &json!([
            {"hostPort": 8080, "containerPort": TARGET, "protocol": "tcp"},
            {"hostPort": 8080, "containerPort": TARGET, "protocol": "udp"},
            {"hostPort": 8081, "containerPort": TARGET, "hostIP": "127.0.0.1"},
        ]),
    );
    let result = Call::new(host, "ADD", &mapped, "web").ok()?;
    let _served = Echo::start(&web, TARGET)?;
    let at = SocketAddr::new(host.address(), 8080);
    let v6 = SocketAddr::new("fd98::11".parse()?, 8080);
    for (at, client) in [(at, lab.router()), (v6, "fd98::1".parse()?)] {
        for by in [By::Tcp, By::Udp] {
            let seen = reached(&lab, by, at, "web")?;
            ensure!(seen == client, "{by:?} {at}: {seen}, not {client}");
        }
    }
    let answer = By::Tcp.ask(&other.namespace()?, at)?;
    ensure!(answer.client == other.address(), "{answer:?}");
    let elsewhere = SocketAddr::new(other.address(), 8080);
    ensure!(By::Tcp.ask(&lab.underlay_namespace(), elsewhere).is_err(), "h2 has the port too");
    let local = SocketAddr::from(([127, 0, 0, 1], 8081));
    eventually(SOON, "the host reaches it", || By::Tcp.ask(&host.namespace()?, local))?;
    let outer = SocketAddr::new(host.address(), 8081);
    ensure!(By::Tcp.ask(&lab.underlay_namespace(), outer).is_err(), "reached from outside");

    // The same call again finds all as it is; so does CHECK, until a port is another's wish.
    let again = Call::new(host, "ADD", &mapped, "web").ok()?;
    ensure!(again == result, "{again}");
    Call::new(host, "CHECK", &mapped, "web").prev(&result).ok()?;
    let more = with_ports("app", &json!([{"hostPort": 8099, "containerPort": TARGET}]));
    Call::new(host, "CHECK", &more, "web").prev(&result).refused(101, "8099/tcp")?;

    // An agent that ends takes nothing along.
    for how in [Stop::Killed, Stop::Gracefully] {
        host.stop_agent(how)?;
        By::Tcp.ask(&lab.underlay_namespace(), at).context("while the agent is away")?;
        host.start_agent()?;
        reached(&lab, By::Tcp, at, "web")?;
    }

    // What is taken is refused with who has it, and nothing is left of the call.
    let process = Daemon::start(host, "listener", &["socat", "TCP-LISTEN:8082,fork", "PIPE"])?;
    eventually(SOON, "the process listens", || host.sh("ss -tlnH 'sport = 8082' | grep -q 8082"))?;
    for (port, word) in [(8080, "container web of network app"), (8082, "socat")] {
        let mapping = json!([
            {"hostPort": 8090, "containerPort": TARGET},
            {"hostPort": port, "containerPort": TARGET},
        ]);
        let taken = with_ports("app", &mapping);
        Call::new(host, "ADD", &taken, "late").refused(100, word)?;
        ensure!(own(host)? == 1, "a refused call left an endpoint");
    }
    drop(process);
    Call::new(host, "DEL", &mapped, "web").ok()?;
    is_free(host, 8080)?;
    Call::new(host, "ADD", &mapped, "late").ok()?;
    let _served = Echo::start(&late, TARGET)?;
    reached(&lab, By::Udp, at, "late")?;
    lab.finish();
    Ok(())
}

#[test]
fn ports_are_published_once_and_only_where_something_comes_in() -> anyhow::Result<()> {
    let lab = cluster(1)?;
    let host = lab.host(1);
    lab.create_network("app --subnet 10.40.0.0/24")?;
    lab.create_network("db --subnet 10.41.0.0/24")?;
    lab.create_network("inner --subnet 10.42.0.0/24 --internal")?;
    let web = container(&lab, 1, "web")?;
    let mapping = json!([{"hostPort": 8080, "containerPort": TARGET, "protocol": "tcp"}]);
    // Runtimes tell each of a container's networks of all its ports.
    let (app, db) = (with_ports("app", &mapping), with_ports("db", &mapping));
    Call::new(host, "ADD", &app, "web").ok()?;
    for _ in 0..2 {
        Call::new(host, "ADD", &db, "web").ifname("eth1").ok()?;
    }
    let _served = Echo::start(&web, TARGET)?;
    let at = SocketAddr::new(host.address(), 8080);
    ensure!(reached(&lab, By::Tcp, at, "web")? == lab.router(), "the client is hidden");
    let shown = host.weft("port web")?.ok()?;
    ensure!(shown.lines().count() == 2, "{shown}");
    // They go with the network that they came with.
    Call::new(host, "DEL", &app, "web").ok()?;
    is_free(host, 8080)?;
    Call::new(host, "DEL", &db, "web").ifname("eth1").ok()?;

    let internal = with_ports("inner", &mapping);
    Call::new(host, "ADD", &internal, "web").refused(7, "internal")?;
    let sctp = json!([{"hostPort": 8080, "containerPort": TARGET, "protocol": "sctp"}]);
    Call::new(host, "ADD", &with_ports("app", &sctp), "web").refused(2, "7000/sctp")?;
    let none = json!([{"hostPort": 0, "containerPort": TARGET}]);
    Call::new(host, "ADD", &with_ports("app", &none), "web").refused(7, "port 0")?;
    ensure!(own(host)? == 0, "an endpoint is left");
    lab.finish();
    Ok(())
}
