//! Networks that are not for all hosts: of one host alone, and none at all.

use std::time::Duration;

use anyhow::ensure;
use weft_testbed::{Lab, NetworkView, Stop, eventually};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_bridge_network_is_of_its_host_alone() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let (here, there) = (lab.host(1), lab.host(2));
    // Each host has its own of that name, with the same subnet.
    let create = "network create -d bridge lan --subnet 10.60.0.0/24 --subnet fd00:60::/64";
    for host in [here, there] {
        host.weft(create)?.ok()?;
    }
    let lan = NetworkView::read(here, "lan")?;
    ensure!(lan.mtu_bytes == 1500, "nothing is around its packets: {lan:?}");
    ensure!(lan.id != NetworkView::read(there, "lan")?.id, "{lan:?}");
    let listed = there.weft("network ls")?.ok()?;
    ensure!(listed.matches(" lan ").count() == 1, "{listed}");
    for predefined in ["bridge", "host", "none"] {
        let line = listed.lines().find(|line| line.contains(&format!(" {predefined} ")));
        ensure!(line.is_some_and(|line| line.contains(" local ")), "{predefined}: {listed}");
    }

    let (one, two) = (here.container("one")?, here.container("two")?);
    let far = there.container("far")?;
    for container in [&one, &two, &far] {
        container.attach("lan", "")?;
    }
    for ip in two.on("lan")?.ips() {
        one.ping(&ip.to_string())?;
    }
    one.ping("two")?;
    two.ping("one.lan")?;
    ensure!(one.resolve("far").is_err(), "a name of another host is answered");
    // The way out leads by the host; nothing leads in.
    one.ping(&there.address().to_string())?;
    far.attach("app", "--service www")?;

    // A running container joins another network, of another driver, and leaves the first.
    one.attach("app", "")?;
    one.reaches("far", SOON)?;
    one.ping("two")?;
    let shown = here.weft_json("network inspect --verbose app")?;
    let has = |pointer: &str, value: &str| {
        let found = shown.pointer(pointer).and_then(|found| found.as_str());
        ensure!(found == Some(value), "{pointer} is {found:?}, not {value}: {shown}");
        Ok(())
    };
    has("/0/Peers/0/Name", "h1")?;
    has("/0/Peers/1/IP", &there.address().to_string())?;
    has("/0/Services/www/Tasks/0/Name", "far")?;
    has("/0/Driver", "overlay")?;
    one.detach("lan")?;
    ensure!(one.ping("10.60.0.3").is_err(), "a network that was left is reached");
    one.ping("far")?;
    one.attach("lan", "")?;

    let refusal = here.weft("network rm lan")?;
    refusal.refused(1, &["lan", "one on h1", "two on h1"])?;
    there.weft("network rm --force lan")?.ok()?;
    eventually(SOON, "the network is gone", || {
        let left = there.weft("network ls")?.ok()?;
        ensure!(!left.contains(" lan "), "{left}");
        let namespaces = there.sh("ip netns list")?;
        ensure!(namespaces.matches("weft-").count() == 1, "{namespaces}");
        Ok(())
    })?;
    // Of the one host's removal the other one hears nothing.
    one.ping("two")?;
    there.weft(create)?.ok()?;
    lab.finish();
    Ok(())
}

#[test]
fn a_bridge_network_outlives_its_agent() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let host = lab.host(1);
    host.weft("network create -d bridge lan --subnet 10.60.0.0/24")?.ok()?;
    let (one, two) = (host.container("one")?, host.container("two")?);
    for container in [&one, &two] {
        container.attach("lan", "")?;
    }
    let before = NetworkView::read(host, "lan")?;
    host.stop_agent(Stop::Killed)?;
    one.ping(&two.on("lan")?.ip4.expect("an IPv4 network").to_string())?;
    host.start_agent()?;
    eventually(SOON, "names are answered again", || one.ping("two"))?;
    let after = NetworkView::read(host, "lan")?;
    ensure!((&before.id, &before.endpoints) == (&after.id, &after.endpoints), "{after:?}");
    // Addresses that are in use are known to be.
    let three = host.container("three")?;
    let ip = three.attach("lan", "")?.ip4;
    ensure!([&one, &two].iter().all(|other| other.on("lan").unwrap().ip4 != ip), "{ip:?}");
    lab.finish();
    Ok(())
}

#[test]
fn containers_that_may_not_meet_reach_the_outside_only() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let (host, outside) = (lab.host(1), lab.host(2).address().to_string());
    host.weft("network create -d bridge apart --subnet 10.60.0.0/24 --icc=false")?.ok()?;
    host.weft("network create -d bridge docker -o com.docker.network.bridge.enable_icc=false")?
        .ok()?;
    for network in ["apart", "docker"] {
        let (one, two) = (host.container("one")?, host.container("two")?);
        for container in [&one, &two] {
            container.attach(network, "")?;
            container.ping(&outside)?;
        }
        for (from, to) in [(&one, &two), (&two, &one)] {
            let ip = to.on(network)?.ip4.expect("an IPv4 network").to_string();
            ensure!(from.ping(&ip).is_err(), "{} reaches {}", from.name(), to.name());
        }
        one.detach(network)?;
        two.detach(network)?;
    }
    let refused = [
        ("network create x --icc=false", ["icc=false", "-d bridge"]),
        ("network create x -d bridge --encrypted", ["x", "encrypt"]),
        ("network create x -d bridge -o multicast", ["multicast", "x"]),
        ("network create host", ["host", "predefined"]),
        ("network create bridge -d bridge", ["bridge", "predefined"]),
    ];
    for (command, words) in refused {
        host.weft(command)?.refused(1, &words)?;
    }
    for driver in ["host", "none", "ipvlan", "tunnel"] {
        host.weft(&format!("network create x -d {driver}"))?.refused(2, &[driver])?;
    }
    lab.finish();
    Ok(())
}

#[test]
fn the_network_called_bridge_is_there_when_it_is_asked_for() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let outside = lab.host(2).address();
    for name in ["bridge", "host", "none"] {
        let shown = lab.host(1).weft_json(&format!("network inspect {name}"))?;
        let named = shown.pointer("/0/Name").and_then(|name| name.as_str());
        ensure!(named == Some(name) && shown.pointer("/0/Scope").is_some(), "{shown}");
    }
    for host in lab.hosts() {
        let run = format!("run --network bridge --name web -- ping -n -c1 -W2 {outside}");
        host.weft(&run)?.ok()?;
        let bridge = NetworkView::read(host, "bridge")?;
        ensure!(bridge.subnets == ["10.48.0.0/24"], "{bridge:?}");
    }
    let ids = lab.hosts().iter().map(|host| Ok(NetworkView::read(host, "bridge")?.id));
    let ids = ids.collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(ids[0] != ids[1], "{ids:?}");
    lab.finish();
    Ok(())
}

#[test]
fn a_command_runs_on_the_hosts_network_on_none_or_in_a_containers() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    lab.create_network("db --subnet 10.41.0.0/24")?;
    let (here, there) = (lab.host(1), lab.host(2));
    let own = here.sh("readlink /proc/self/ns/net")?;
    let on_host =
        here.weft("run --network host --name tool -- readlink /proc/self/ns/net")?.ok()?;
    ensure!(on_host == own, "{on_host} is not {own}");
    ensure!(here.weft("run --network host --name tool -- hostname")?.ok()?.trim() == "tool");
    ensure!(here.sh("hostname")?.trim() == here.name(), "the host has another name");

    let links = here.weft("run --network none --name alone -- ip -o -br link")?.ok()?;
    ensure!(links.lines().count() == 1 && links.contains("LOOPBACK,UP"), "{links}");
    here.weft("run --network none --name alone -- ping -n -c1 -W1 127.0.0.1")?.ok()?;

    let far = there.container("far")?;
    far.attach("app", "")?;
    let web = here.weft("run --network app --name web -d -- sleep 600")?.ok()?;
    let beside = "run --network container:web --name beside";
    let addresses = here.weft(&format!("{beside} -- ip -o -4 addr show eth0"))?.ok()?;
    let web_on_app = NetworkView::read(here, "app")?;
    ensure!(addresses.contains("10.40.0."), "{addresses}");
    ensure!(web_on_app.endpoints == ["far", "web"], "{web_on_app:?}");
    here.weft(&format!("{beside} -- ping -n -c1 -W2 far"))?.ok()?;
    // The container of a name joins another network; whoever shares its namespace has it too.
    here.weft("attach container:web --network db --name web")?.ok()?;
    let links = here.weft(&format!("{beside} -- ip -o -br link"))?.ok()?;
    ensure!(links.contains("eth0") && links.contains("eth1"), "{links}");
    ensure!(NetworkView::read(here, "db")?.endpoints == ["web"]);

    here.weft("run --network container:nobody --name x -- true")?.refused(1, &["nobody"])?;
    there.weft("run --network container:web --name x -- true")?.refused(1, &["web"])?;
    for args in
        ["host --network app", "none --ip 10.40.0.9", "container:web --mac 02:00:00:00:00:01"]
    {
        let refusal = here.weft(&format!("run --network {args} --name x -- true"))?;
        refusal.refused(1, &[args.split(' ').next().unwrap_or_default()])?;
    }
    // It shares the namespace and outlives its maker; then names and addresses go.
    let keeper = here.weft(&format!("{beside} -d -- sleep 600"))?.ok()?;
    here.sh(&format!("kill -KILL {web}"))?;
    far.ping("web")?;
    here.sh(&format!("kill -KILL {keeper}"))?;
    eventually(SOON, "the endpoints are gone with the last process", || {
        let app = NetworkView::read(there, "app")?;
        ensure!(app.endpoints == ["far"], "{app:?}");
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn what_is_on_no_network_of_wefts_is_listed_on_its_host() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let (here, there) = (lab.host(1), lab.host(2));
    here.weft("run --network app --name web -d -- sleep 600")?.ok()?;
    let mut pids = Vec::new();
    for (network, name) in [("host", "tool"), ("none", "batch"), ("container:web", "debug")] {
        let pid =
            here.weft(&format!("run --network {network} --name {name} -d -- sleep 600"))?.ok()?;
        let shown = here.weft("ps")?.ok()?;
        let row = shown.lines().find(|line| line.contains(&format!(" {name} ")));
        ensure!(row.is_some_and(|row| row.contains(network) && row.contains("h1")), "{shown}");
        let listed = here.weft_json(&format!("ps --network {network}"))?;
        ensure!(listed[0]["name"] == name, "{listed}");
        ensure!(listed[0]["pid"] == pid.parse::<u32>()?, "{listed} not {pid}");
        pids.push(pid);
    }
    let taken = here.weft("run --network none --name tool -- true")?;
    taken.refused(1, &["tool", "--network host", &pids[0]])?;
    ensure!(there.weft_json("ps")?.as_array().map(Vec::len) == Some(1), "another host lists them");

    // They need no agent, and are listed again when there is one.
    here.stop_agent(Stop::Killed)?;
    here.start_agent()?;
    ensure!(here.weft_json("ps --node h1")?.as_array().map(Vec::len) == Some(4));
    here.sh(&format!("kill -KILL {}", pids.join(" ")))?;
    eventually(SOON, "what has ended is listed no more", || {
        let shown = here.weft_json("ps")?;
        ensure!(shown.as_array().map(Vec::len) == Some(1), "{shown}");
        Ok(())
    })?;
    here.weft("run --network none --name tool -- true")?.ok()?;

    let listed = here.weft_json("network ls")?;
    let listed = listed.as_array().into_iter().flatten();
    let names: Vec<_> = listed.map(|network| network["name"].as_str().unwrap_or("?")).collect();
    ensure!(names == ["app", "bridge", "host", "none"], "{names:?}");
    lab.finish();
    Ok(())
}

#[test]
fn the_default_route_follows_the_priorities_of_a_containers_networks() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let (host, outside) = (lab.host(1), lab.host(2).address().to_string());
    lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    lab.create_network("inner --subnet 10.41.0.0/24 --internal")?;
    host.weft("network create -d bridge lan --subnet 10.60.0.0/24")?.ok()?;
    let box1 = host.container("box1")?;
    let leads_by = |gateway: &str| {
        let routes = box1.sh("ip route show default; ip -6 route show default")?;
        let v4: Vec<_> = routes.lines().filter(|line| !line.contains("fd00:")).collect();
        match v4.as_slice() {
            [route] if route.contains(&format!("via {gateway} ")) => Ok(()),
            _ => anyhow::bail!("not by {gateway} alone: {routes}"),
        }
    };
    box1.attach("app", "")?;
    box1.attach("inner", "--gw-priority 100")?;
    leads_by("10.40.0.1")?;
    // A running container's route moves when a network of a higher priority is joined.
    box1.attach("lan", "--gw-priority 7")?;
    leads_by("10.60.0.1")?;
    box1.ping(&outside)?;
    let v6 = box1.sh("ip -6 route show default")?;
    ensure!(v6.contains("via fd00:40::1 "), "of IPv6 there is no other way: {v6}");
    box1.detach("lan")?;
    eventually(SOON, "the route goes back to app", || leads_by("10.40.0.1"))?;
    box1.ping(&outside)?;
    box1.attach("lan", "--gw-priority 0")?;
    leads_by("10.40.0.1")?;
    box1.detach("app")?;
    eventually(SOON, "lan takes over", || leads_by("10.60.0.1"))?;
    box1.ping(&outside)?;
    // What somebody else has set is left alone.
    box1.sh("ip route replace default via 10.60.0.77")?;
    box1.attach("app", "--gw-priority 9")?;
    leads_by("10.60.0.77")?;

    let run = "run --network app --network lan,gw-priority=1 --name task";
    let routes = host.weft(&format!("{run} -- ip route show default"))?.ok()?;
    ensure!(routes.starts_with("default via 10.60.0.1 "), "{routes}");
    host.weft(&format!("{run} --network inner,weight=3 -- true"))?.refused(1, &["weight=3"])?;
    lab.finish();
    Ok(())
}
