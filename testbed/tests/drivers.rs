//! Networks that are not for all hosts: of one host alone, and none at all.

use std::time::Duration;

use anyhow::ensure;
use weft_testbed::{Lab, NetworkView, Stop, eventually};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_bridge_network_is_of_its_host_alone() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let (here, there) = (lab.host(1), lab.host(2));
    // Each host has its own of that name, with the same subnet.
    let create = "network create -d bridge local --subnet 10.60.0.0/24 --subnet fd00:60::/64";
    for host in [here, there] {
        host.weft(create)?.ok()?;
    }
    let local = NetworkView::read(here, "local")?;
    ensure!(local.mtu_bytes == 1500, "nothing is around its packets: {local:?}");
    ensure!(local.id != NetworkView::read(there, "local")?.id, "{local:?}");
    let listed = there.weft("network ls")?.ok()?;
    ensure!(listed.matches(" local ").count() == 1, "{listed}");

    let (one, two) = (here.container("one")?, here.container("two")?);
    let far = there.container("far")?;
    for container in [&one, &two, &far] {
        container.attach("local", "")?;
    }
    for ip in two.on("local")?.ips() {
        one.ping(&ip.to_string())?;
    }
    one.ping("two")?;
    two.ping("one.local")?;
    ensure!(one.resolve("far").is_err(), "a name of another host is answered");
    // The way out leads by the host; nothing leads in.
    one.ping(&there.address().to_string())?;
    far.attach("app", "")?;

    // A running container joins another network, of another driver, and leaves the first.
    one.attach("app", "")?;
    one.reaches("far", SOON)?;
    one.ping("two")?;
    one.detach("local")?;
    ensure!(one.ping("10.60.0.3").is_err(), "a network that was left is reached");
    one.ping("far")?;
    one.attach("local", "")?;

    let refusal = here.weft("network rm local")?;
    refusal.refused(1, &["local", "one on h1", "two on h1"])?;
    there.weft("network rm --force local")?.ok()?;
    eventually(SOON, "the network is gone", || {
        let left = there.weft("network ls")?.ok()?;
        ensure!(!left.contains(" local "), "{left}");
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
    host.weft("network create -d bridge local --subnet 10.60.0.0/24")?.ok()?;
    let (one, two) = (host.container("one")?, host.container("two")?);
    for container in [&one, &two] {
        container.attach("local", "")?;
    }
    let before = NetworkView::read(host, "local")?;
    host.stop_agent(Stop::Killed)?;
    one.ping(&two.on("local")?.ip4.expect("an IPv4 network").to_string())?;
    host.start_agent()?;
    eventually(SOON, "names are answered again", || one.ping("two"))?;
    let after = NetworkView::read(host, "local")?;
    ensure!((&before.id, &before.endpoints) == (&after.id, &after.endpoints), "{after:?}");
    // Addresses that are in use are known to be.
    let three = host.container("three")?;
    let ip = three.attach("local", "")?.ip4;
    ensure!([&one, &two].iter().all(|other| other.on("local").unwrap().ip4 != ip), "{ip:?}");
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
    for driver in ["host", "none", "ipvlan"] {
        host.weft(&format!("network create x -d {driver}"))?.refused(2, &[driver])?;
    }
    lab.finish();
    Ok(())
}

#[test]
fn the_network_called_bridge_is_there_when_it_is_asked_for() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let outside = lab.host(2).address();
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
