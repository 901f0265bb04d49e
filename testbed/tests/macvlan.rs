//! Networks on an interface of the host: containers beside machines that weft knows nothing of.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{Container, Host, Lab, NetworkView, Stop, eventually, holds_for, plugin_call};

const SOON: Duration = Duration::from_secs(5);
const PODMAN_5: &str = include_str!("../../agent/tests/engines/podman-5.4.jsonl");
/// The kernel ends namespaces one after the other, those of the whole machine.
const ENDED: Duration = Duration::from_secs(20);

/// The network of most tests, on `lan0`.
const CREATE: &str = "network create -d macvlan -o parent=lan0 --subnet 10.70.0.0/24 \
    --subnet fd00:70::/64 --gateway 10.70.0.1 --gateway fd00:70::1 --ip-range 10.70.0.64/26 \
    --aux-address nas=10.70.0.65 lan";

/// Links `host` by its interface `lan0` to a machine, which is the gateway of a LAN and has an
/// address beyond it.
fn lan(host: &Host) -> anyhow::Result<()> {
    host.sh("ip netns add machine
         ip link add lan0 type veth peer name eth0 netns machine
         ip link set lan0 up
         ip -n machine link set lo up
         ip -n machine addr add 10.70.0.1/24 dev eth0
         ip -n machine addr add fd00:70::1/64 dev eth0 nodad
         ip -n machine addr add 198.51.100.7/32 dev lo
         ip -n machine link set eth0 up")?;
    Ok(())
}

fn machine(host: &Host, command: &str) -> anyhow::Result<String> {
    host.sh(&format!("ip netns exec machine {command}"))
}

/// What a host has besides its LAN: to be as it was when all is removed.
fn belongings(host: &Host) -> anyhow::Result<String> {
    host.sh("ip -o link | sed 's/ state .*//' | grep -v ' eth0@'; ls /run/netns")
}

fn meet(one: &Container, two: &Container, network: &str) -> anyhow::Result<()> {
    for (from, to) in [(one, two), (two, one)] {
        for ip in to.on(network)?.ips() {
            from.ping(&ip.to_string())?;
        }
    }
    Ok(())
}

fn pair(host: &Arc<Host>, network: &str) -> anyhow::Result<[Container; 2]> {
    let pair = [host.container("one")?, host.container("two")?];
    for container in &pair {
        container.attach(network, "")?;
    }
    Ok(pair)
}

#[test]
fn containers_are_machines_on_their_parents_link() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let (host, other) = (lab.host(1), lab.host(2));
    lan(host)?;
    host.sh("ip addr add 10.70.0.2/24 dev lan0; ip link set lan0 mtu 1400")?;
    let before = belongings(host)?;
    host.weft(CREATE)?.ok()?;
    let shown = host.weft_json("network inspect lan")?;
    for (pointer, value) in [
        ("/0/Driver", "macvlan"),
        ("/0/Scope", "local"),
        ("/0/Options/parent", "lan0"),
        ("/0/Options/macvlan_mode", "bridge"),
        ("/0/IPAM/Config/0/Gateway", "10.70.0.1"),
        // An address of the host's own is no container's.
        ("/0/IPAM/Config/0/AuxiliaryAddresses/host", "10.70.0.2"),
    ] {
        let found = shown.pointer(pointer).and_then(|found| found.as_str());
        ensure!(found == Some(value), "{pointer} is {found:?}, not {value}: {shown}");
    }
    let listed = host.weft("network ls")?.ok()?;
    let line = listed.lines().find(|line| line.contains(" lan ")).context("not listed")?;
    ensure!(line.contains(" macvlan ") && line.contains(" local "), "{listed}");
    ensure!(!other.weft("network ls")?.ok()?.contains(" lan "), "another host knows of it");

    let [one, two] = pair(host, "lan")?;
    let attached = one.on("lan")?;
    ensure!(attached.mtu_bytes == 1400, "{attached:?}");
    ensure!(attached.ip4 == Some("10.70.0.64".parse()?), "{attached:?}");
    ensure!(two.on("lan")?.ip4 == Some("10.70.0.66".parse()?), "the nas has 10.70.0.65");
    ensure!(attached.resolvers == ["127.0.0.11".parse::<std::net::IpAddr>()?], "{attached:?}");
    meet(&one, &two, "lan")?;
    one.ping("two")?;
    two.ping("one.lan")?;
    for container in [&one, &two] {
        container.ping("10.70.0.1")?;
        container.ping("fd00:70::1")?;
        // By the gateway, which is not weft's.
        container.ping("198.51.100.7")?;
    }
    let neighbours = machine(host, "ip neigh show dev eth0")?;
    for attached in [one.on("lan")?, two.on("lan")?] {
        for ip in attached.ips() {
            let wanted = format!("{ip} lladdr {}", attached.mac);
            ensure!(neighbours.contains(&wanted), "no {wanted} in {neighbours}");
        }
    }
    machine(host, &format!("ping -n -c 1 -W 1 {}", two.on("lan")?.ip4.context("no IPv4")?))?;
    // A name server of the container's own has the port to itself.
    one.sh("python3 -c 'import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((\"0.0.0.0\", 53))'")?;

    let mac = "02:70:00:00:00:99";
    let mut run: Vec<_> = "run --network lan --ip 10.70.0.9 --name task --mac".split(' ').collect();
    run.extend([mac, "--", "sh", "-ec"]);
    run.push("ping -n -c1 -W2 10.70.0.1 >/dev/null; getent ahostsv4 two");
    let said = host.weft_args(&run)?.ok()?;
    ensure!(said.starts_with("10.70.0.66 "), "{said}");
    ensure!(machine(host, "ip neigh show 10.70.0.9")?.contains(mac));

    // Two of one MAC address cannot be on one link, in whatever network.
    host.weft("network create -d macvlan -o parent=lan0 --subnet 10.71.0.0/24 more")?.ok()?;
    let taken = two.on("lan")?.mac;
    let three = host.container("three")?;
    three.try_attach("more", &format!("--mac {taken}"))?.refused(1, &[&taken, "two", "lan0"])?;
    let own = host.sh("ip -o link show lan0")?;
    let own = own.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    let own = own.context("lan0 has no MAC address")?;
    three.try_attach("more", &format!("--mac {own}"))?.refused(1, &[own, "take another"])?;
    ensure!(three.sh("ip -o link")?.lines().count() == 1, "the interface stayed");
    host.weft("network rm more")?.ok()?;

    host.weft("network rm lan")?.refused(1, &["lan", "one on h1", "two on h1"])?;
    one.detach("lan")?;
    ensure!(one.sh("ip -o link")?.lines().count() == 1, "the interface stayed");
    host.weft("network rm --force lan")?.ok()?;
    eventually(ENDED, "nothing is left", || {
        let left = belongings(host)?;
        ensure!(left == before, "{left} is not {before}");
        ensure!(two.sh("ip -o link")?.lines().count() == 1, "the interface stayed");
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn the_mode_of_a_network_says_whom_its_containers_reach() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lan(host)?;
    let create = |mode: &str| host.weft(&format!("{CREATE} -o macvlan_mode={mode}"))?.ok();
    for mode in ["private", "vepa"] {
        create(mode)?;
        let [one, two] = pair(host, "lan")?;
        for container in [&one, &two] {
            container.ping("10.70.0.1")?;
        }
        ensure!(meet(&one, &two, "lan").is_err(), "they reach each other with {mode}");
        ensure!(meet(&two, &one, "lan").is_err(), "they reach each other with {mode}");
        // Names are answered, whoever is reached.
        ensure!(one.resolve("two")?.contains(&two.on("lan")?.ip4.context("no IPv4")?.into()));
        host.weft("network rm --force lan")?.ok()?;
    }
    // At the other end of the link is a switch that sends frames back.
    host.sh("ip netns exec machine sh -ec '
         ip link add sw type bridge
         ip link add gw type veth peer name gwport
         ip addr flush dev eth0
         ip link set eth0 master sw
         ip link set gwport master sw
         ip addr add 10.70.0.1/24 dev gw
         for link in sw gw gwport; do ip link set $link up; done
         bridge link set dev eth0 hairpin on'")?;
    create("vepa")?;
    let [one, two] = pair(host, "lan")?;
    eventually(SOON, "they meet by way of the switch", || {
        one.ping(&two.on("lan")?.ip4.context("no IPv4")?.to_string())
    })?;
    host.weft("network rm --force lan")?.ok()?;
    create("private")?;
    for container in [&one, &two] {
        container.attach("lan", "")?;
        eventually(SOON, "the gateway is reached", || container.ping("10.70.0.1"))?;
    }
    ensure!(one.ping(&two.on("lan")?.ip4.context("no IPv4")?.to_string()).is_err());
    host.weft("network rm --force lan")?.ok()?;

    create("passthru")?;
    let attached = one.attach("lan", "")?;
    eventually(SOON, "the gateway is reached", || one.ping("10.70.0.1"))?;
    ensure!(machine(host, "ip neigh show 10.70.0.64")?.contains(&attached.mac));
    two.try_attach("lan", "")?.refused(1, &["lan0", "one", "passthru"])?;
    host.weft("network create -d macvlan -o parent=lan0 --subnet 10.71.0.0/24 more")?
        .refused(1, &["lan0", "lan", "passthru"])?;
    one.detach("lan")?;
    two.attach("lan", "")?;
    eventually(SOON, "the gateway is reached", || two.ping("10.70.0.1"))?;
    lab.finish();
    Ok(())
}

#[test]
fn containers_go_on_without_the_agent_and_their_end_is_noticed() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lan(host)?;
    let before = belongings(host)?;
    host.weft(CREATE)?.ok()?;
    let [one, two] = pair(host, "lan")?;
    let third = host.container("third")?;
    third.attach("lan", "")?;
    for (how, ends) in [(Stop::Killed, None), (Stop::Gracefully, Some(&third))] {
        let known = NetworkView::read(host, "lan")?;
        host.stop_agent(how)?;
        meet(&one, &two, "lan")?;
        one.ping("10.70.0.1")?;
        // One ends while nobody looks.
        if let Some(ends) = ends {
            ends.kill();
        }
        host.start_agent()?;
        eventually(SOON, "names are answered again", || one.ping("two"))?;
        let mut left = known.endpoints.clone();
        left.retain(|name| ends.is_none_or(|ended| ended.name() != name));
        eventually(SOON, "who is there is known", || {
            let now = NetworkView::read(host, "lan")?;
            ensure!(now.id == known.id && now.endpoints == left, "{now:?}, not {left:?}");
            Ok(())
        })?;
    }
    // An address that is in use is known to be.
    let four = host.container("four")?;
    let ip = four.attach("lan", "")?.ip4;
    ensure!([&one, &two].iter().all(|other| other.on("lan").unwrap().ip4 != ip), "{ip:?}");

    // Its namespace outlives its process as long as somebody is in it.
    let web = host.weft("run --network lan --name web -d -- sleep 600")?.ok()?;
    let beside = "run --network container:web --name beside";
    host.weft(&format!("{beside} -- ping -n -c1 -W2 one"))?.ok()?;
    let keeper = host.weft(&format!("{beside} -d -- sleep 600"))?.ok()?;
    host.sh(&format!("kill -KILL {web}"))?;
    one.reaches("web", SOON)?;
    holds_for(Duration::from_secs(2), "web stays", || one.ping("web").map(drop))?;
    // The next agent finds it by whoever is in it.
    host.stop_agent(Stop::Killed)?;
    host.start_agent()?;
    let keeper = keeper.trim();
    let asks = format!("nsenter --target {keeper} --net --mount -- getent ahostsv4 one");
    eventually(SOON, "names are answered in it", || host.sh(&asks))?;
    one.reaches("web", SOON)?;
    host.sh(&format!("kill -KILL {keeper}"))?;
    eventually(ENDED, "web is gone", || {
        let now = NetworkView::read(host, "lan")?;
        ensure!(!now.endpoints.contains(&"web".to_owned()), "{now:?}");
        ensure!(one.resolve("web").is_err(), "its name is answered");
        Ok(())
    })?;
    // A bind mount of a namespace is a way in, too.
    host.sh("ip netns add box")?;
    host.weft("attach /run/netns/box --network lan --name box")?.ok()?;
    one.reaches("box", SOON)?;
    host.sh("ip netns del box")?;
    for container in [one, two, four] {
        container.kill();
    }
    eventually(ENDED, "all are gone", || {
        let now = NetworkView::read(host, "lan")?;
        ensure!(now.endpoints.is_empty(), "{now:?}");
        let left = belongings(host)?;
        ensure!(left == before, "{left} is not {before}");
        Ok(())
    })?;
    host.weft("network rm lan")?.ok()?;
    lab.finish();
    Ok(())
}

#[test]
fn containers_that_come_and_go_leave_nothing_behind() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lan(host)?;
    host.weft(CREATE)?.ok()?;
    let one = host.container("one")?;
    one.attach("lan", "")?;
    // Sockets, redirections and watches of processes are descriptors.
    let descriptors = || -> anyhow::Result<usize> {
        let count = "for p in /proc/[0-9]*; do
                       tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q 'weft agent' || continue
                       ls $p/fd
                     done | wc -l";
        Ok(host.sh(count)?.trim().parse()?)
    };
    let settled = || {
        eventually(ENDED, "one is left", || {
            let now = NetworkView::read(host, "lan")?;
            ensure!(now.endpoints == ["one"], "{now:?}");
            Ok(())
        })
    };
    let round = |round: u8| -> anyhow::Result<()> {
        host.sh(&format!(
            "for n in 1 2 3 4 5 6 7 8; do
               weft run --network lan --name r{round}-$n -- ping -n -c1 -W2 one >/dev/null &
               pids=\"$pids $!\"
             done
             for pid in $pids; do wait $pid; done"
        ))?;
        settled()
    };
    round(0)?;
    let before = descriptors()?;
    ensure!(before > 10, "{before} descriptors of the agent");
    (1..4).try_for_each(round)?;
    eventually(SOON, "the agent lets go of all", || {
        let now = descriptors()?;
        ensure!(now <= before, "{now} descriptors, before {before}");
        Ok(())
    })?;
    for _ in 0..8 {
        one.detach("lan")?;
        one.attach("lan", "")?;
        one.ping("one")?;
    }
    let now = descriptors()?;
    ensure!(now <= before + 2, "{now} descriptors, before {before}");
    lab.finish();
    Ok(())
}

#[test]
fn a_container_is_on_networks_of_several_drivers() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let host = lab.host(1);
    lan(host)?;
    host.weft(CREATE)?.ok()?;
    host.weft("network create -d macvlan -o parent=lan0 --subnet 10.71.0.0/24 second")?.ok()?;
    host.weft("network create -d bridge inner --subnet 10.60.0.0/24")?.ok()?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let far = lab.host(2).container("far")?;
    far.attach("app", "")?;
    let [one, two] = pair(host, "lan")?;
    let leads_by = |gateway: &str| {
        let route = one.sh("ip route show default")?;
        ensure!(route.starts_with(&format!("default via {gateway} ")), "{route}");
        ensure!(route.lines().count() == 1, "{route}");
        Ok(())
    };
    leads_by("10.70.0.1")?;
    one.attach("app", "--gw-priority 3")?;
    leads_by("10.40.0.1")?;
    one.reaches("far", SOON)?;
    one.ping("two")?;
    one.ping("10.70.0.1")?;
    one.attach("inner", "")?;
    leads_by("10.40.0.1")?;
    one.attach("second", "--gw-priority 9")?;
    leads_by("10.71.0.1")?;
    two.attach("second", "")?;
    meet(&one, &two, "second")?;
    one.detach("second")?;
    eventually(SOON, "the route goes back", || leads_by("10.40.0.1"))?;
    one.detach("app")?;
    one.detach("inner")?;
    eventually(SOON, "the route goes back", || leads_by("10.70.0.1"))?;
    one.ping("198.51.100.7")?;
    one.ping("two")?;
    // Where the first network of a sandbox is left, names are still answered for the other.
    two.detach("lan")?;
    ensure!(two.resolve("one").is_err(), "a name of a network that was left is answered");
    one.attach("second", "")?;
    eventually(SOON, "the other network's names are answered", || two.ping("one"))?;
    two.detach("second")?;
    ensure!(two.sh("ip -o link")?.lines().count() == 1);

    let run = "run --network app --network lan,gw-priority=1 --name task";
    let routes = host.weft(&format!("{run} -- ip route show default"))?.ok()?;
    ensure!(routes.starts_with("default via 10.70.0.1 "), "{routes}");
    for name in ["far", "one"] {
        host.weft(&format!("{run}-{name} -- ping -n -c1 -W2 {name}"))?.ok()?;
    }
    lab.finish();
    Ok(())
}

#[test]
fn runtimes_attach_by_cni_and_netavark_and_docker_is_sent_to_its_own_driver() -> anyhow::Result<()>
{
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    std::os::unix::fs::symlink("weft", host.dir().join("bin/weft-cni"))?;
    lan(host)?;
    host.weft(CREATE)?.ok()?;
    let one = host.container("one")?;
    one.attach("lan", "")?;
    host.sh("ip netns add box")?;
    let conf = json!({"cniVersion": "1.0.0", "name": "lan", "type": "weft-cni"});
    let call = |verb: &str, conf: &Value| -> anyhow::Result<Value> {
        let environment = format!(
            "CNI_COMMAND={verb} CNI_CONTAINERID=box CNI_NETNS=/run/netns/box CNI_IFNAME=eth0"
        );
        let said = host.sh(&format!("printf %s '{conf}' | {environment} CNI_PATH=/ weft-cni"))?;
        Ok(if said.trim().is_empty() { Value::Null } else { serde_json::from_str(&said)? })
    };
    let added = call("ADD", &conf)?;
    ensure!(added["dns"]["nameservers"] == json!(["127.0.0.11"]), "{added}");
    ensure!(added["ips"][0]["gateway"] == "10.70.0.1", "{added}");
    let again = call("ADD", &conf)?;
    ensure!(again == added, "{again} is not {added}");
    let mut checked = conf.clone();
    checked["prevResult"] = added;
    call("CHECK", &checked)?;
    one.ping("box")?;
    host.sh("ip netns exec box ping -n -c1 -W2 10.70.0.1")?;
    call("DEL", &conf)?;
    ensure!(one.resolve("box").is_err(), "its name is answered");

    // What podman 5.4 put on standard input, for this network.
    let lines = PODMAN_5.lines().map(serde_json::from_str::<Value>);
    let recorded = lines.filter_map(Result::ok).find(|line| line["argv"][0] == "setup");
    let mut setup = recorded.context("no setup was recorded")?["stdin"].clone();
    setup["network"]["options"] = json!({"weft.network": "lan"});
    setup["network"]["subnets"] = json!([{"subnet": "10.70.0.0/24", "gateway": "10.70.0.1"}]);
    setup["network_options"]["static_ips"] = Value::Null;
    setup["port_mappings"] = json!([]);
    std::fs::write(host.dir().join("setup.json"), setup.to_string())?;
    std::os::unix::fs::symlink("weft", host.dir().join("bin/weft-netavark"))?;
    let netavark = |verb: &str| {
        let input = host.dir().join("setup.json");
        host.sh(&format!("weft-netavark {verb} /run/netns/box <{}", input.display()))
    };
    let answer: Value = serde_json::from_str(&netavark("setup")?)?;
    ensure!(answer["dns_server_ips"] == json!(["127.0.0.11"]), "{answer}");
    let name = setup["container_name"].as_str().context("it has no name")?;
    one.ping(name)?;
    netavark("teardown")?;
    ensure!(one.resolve(name).is_err(), "its name is answered");

    let pool = json!({"AddressSpace": "weft", "Pool": "10.70.0.0/24", "Options": {}, "V6": false});
    plugin_call(host, "IpamDriver.RequestPool", &pool.to_string())?;
    let network = json!({
        "NetworkID": "4d4a".repeat(16),
        "Options": {"com.docker.network.generic": {"weft.network": "lan"}},
        "IPv4Data": [{"AddressSpace": "weft", "Pool": "10.70.0.0/24", "Gateway": "10.70.0.1/24"}],
        "IPv6Data": [],
    });
    let refused = plugin_call(host, "NetworkDriver.CreateNetwork", &network.to_string())?;
    let error = refused.body["Err"].as_str().context("it was not refused")?;
    ensure!(error.contains("lan") && error.contains("docker network create -d macvlan"), "{error}");
    lab.finish();
    Ok(())
}

#[test]
fn what_cannot_be_a_macvlan_network_is_refused_by_name() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lan(host)?;
    host.sh("ip link add br7 type bridge; ip link add port7 type veth peer name other7
             ip link set port7 master br7")?;
    host.weft(CREATE)?.ok()?;
    let before = belongings(host)?;
    for (arguments, words) in [
        ("-d macvlan -o parent=eth9 --subnet 10.72.0.0/24 x", &["eth9", "ip link"][..]),
        ("-d macvlan -o parent=eth9.50 --subnet 10.72.0.0/24 x", &["eth9", "eth9.50"]),
        ("-d macvlan -o parent=lo x", &["lo", "loopback"]),
        ("-d macvlan -o parent=port7 x", &["port7", "br7"]),
        ("-d macvlan -o parent=a/b x", &["a/b", "eth0"]),
        ("-d macvlan -o parent=lan0 -o macvlan_mode=source x", &["source", "passthru"]),
        ("-d macvlan -o parent=lan0 -o macvlan_mode=passthru x", &["lan0", "lan", "passthru"]),
        ("-d macvlan -o parent=lan0 --subnet 10.70.0.0/25 x", &["10.70.0.0/25", "lan", "lan0"]),
        ("-d macvlan -o parent=lan0 -o mtu=9000 x", &["9000", "1500", "lan0"]),
        ("-d macvlan -o parent=lan0 --encrypted x", &["x", "encrypt"]),
        ("-d macvlan -o parent=lan0 -o multicast x", &["multicast", "x"]),
        ("-d macvlan -o parent=lan0 --icc=false x", &["icc=false", "-d bridge"]),
        ("-d macvlan -o parent=lan0 lan", &["lan", "exists"]),
        ("-d bridge -o parent=lan0 x", &["parent=lan0", "-d macvlan"]),
        ("-o macvlan_mode=vepa x", &["macvlan_mode=vepa", "-d macvlan"]),
    ] {
        host.weft(&format!("network create {arguments}"))?.refused(1, words)?;
    }
    host.weft("docker network create -d macvlan -o parent=lan0 x")?
        .refused(1, &["macvlan", "docker network create -d macvlan"])?;
    ensure!(belongings(host)? == before, "something was left behind");

    // Without a parent: among themselves, and nowhere else.
    host.weft("network create -d macvlan alone --subnet 10.73.0.0/24")?.ok()?;
    let shown = host.weft_json("network inspect alone")?;
    ensure!(shown.pointer("/0/Internal") == Some(&true.into()), "{shown}");
    let [one, two] = pair(host, "alone")?;
    meet(&one, &two, "alone")?;
    one.ping("two")?;
    ensure!(one.sh("ip route show default")?.is_empty(), "something leads out");
    one.attach("lan", "")?;
    one.ping("10.70.0.1")?;
    host.weft("network rm --force alone lan")?.ok()?;
    let own = "ip -o link | sed 's/ state .*//' | grep -v ' eth0@'";
    eventually(ENDED, "nothing is left", || {
        let left = belongings(host)?;
        ensure!(left == before, "{left} is not {before}: {}", host.sh(own)?);
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn a_vlan_is_made_for_a_network_where_the_kernel_can_and_refused_where_it_cannot()
-> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    lan(host)?;
    let create = |id: u8, name: &str| {
        host.weft(&format!(
            "network create -d macvlan -o parent=lan0.{id} --subnet 10.{id}.0.0/24 {name}"
        ))
    };
    let probe = host
        .exec(&["ip", "link", "add", "link", "lan0", "name", "p.9", "type", "vlan", "id", "9"])?;
    if probe.ok().is_err() {
        create(50, "fifty")?.refused(1, &["lan0.50", "802.1q", "CONFIG_VLAN_8021Q", "8021q"])?;
        let listed = host.weft("network ls")?.ok()?;
        ensure!(!listed.contains("fifty"), "{listed}");
        lab.finish();
        return Ok(());
    }
    host.sh("ip -n machine link add link eth0 name eth0.50 type vlan id 50
             ip -n machine addr add 10.50.0.1/24 dev eth0.50
             ip -n machine link set eth0.50 up
             ip link add link lan0 name lan0.60 type vlan id 60; ip link set lan0.60 up")?;
    let there = |name: &str| host.exec(&["ip", "link", "show", name]).map(|ran| ran.ok().is_ok());
    create(50, "fifty")?.ok()?;
    create(60, "sixty")?.ok()?;
    host.weft("network create -d macvlan -o parent=lan0.50 --subnet 10.51.0.0/24 more")?.ok()?;
    ensure!(there("lan0.50")?, "the VLAN was not made");
    let one = host.container("one")?;
    one.attach("fifty", "")?;
    one.ping("10.50.0.1")?;
    host.stop_agent(Stop::Killed)?;
    host.start_agent()?;
    eventually(SOON, "names are answered again", || one.ping("one"))?;
    host.weft("network rm --force fifty sixty")?.ok()?;
    holds_for(Duration::from_secs(1), "another network needs it", || {
        ensure!(there("lan0.50")?, "the VLAN is gone");
        Ok(())
    })?;
    host.weft("network rm more")?.ok()?;
    eventually(SOON, "the VLAN is gone", || {
        ensure!(!there("lan0.50")?, "it is there");
        Ok(())
    })?;
    ensure!(there("lan0.60")?, "a VLAN of somebody else's is gone");
    lab.finish();
    Ok(())
}
