//! Networks on an interface of the host: containers beside machines that weft knows nothing of.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_testbed::{Lab, Lan, eventually};

const SOON: Duration = Duration::from_secs(20);
/// The kernel ends namespaces one after the other, those of the whole machine.
const ENDED: Duration = Duration::from_secs(60);

#[test]
fn containers_are_machines_on_their_parents_link() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let (host, other) = (lab.host(1), lab.host(2));
    let lan = Lan::beside(host)?;
    host.sh("ip addr add 10.70.0.2/24 dev lan0; ip link set lan0 mtu 1400")?;
    let before = lan.belongings()?;
    host.weft(Lan::CREATE)?.ok()?;
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

    let [one, two] = lan.pair("lan")?;
    let attached = one.on("lan")?;
    ensure!(attached.mtu_bytes == 1400, "{attached:?}");
    ensure!(attached.ip4 == Some("10.70.0.64".parse()?), "{attached:?}");
    ensure!(two.on("lan")?.ip4 == Some("10.70.0.66".parse()?), "the nas has 10.70.0.65");
    ensure!(attached.resolvers == ["127.0.0.11".parse::<std::net::IpAddr>()?], "{attached:?}");
    Lan::meet(&one, &two, "lan")?;
    one.ping("two")?;
    two.ping("one.lan")?;
    for container in [&one, &two] {
        container.ping("10.70.0.1")?;
        container.ping("fd00:70::1")?;
        // By the gateway, which is not weft's.
        container.ping("198.51.100.7")?;
    }
    let neighbours = lan.machine("ip neigh show dev eth0")?;
    for attached in [one.on("lan")?, two.on("lan")?] {
        for ip in attached.ips() {
            let wanted = format!("{ip} lladdr {}", attached.mac);
            ensure!(neighbours.contains(&wanted), "no {wanted} in {neighbours}");
        }
    }
    lan.machine(&format!("ping -n -c 1 -W 10 {}", two.on("lan")?.ip4.context("no IPv4")?))?;
    // A name server of the container's own has the port to itself.
    one.sh("python3 -c 'import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((\"0.0.0.0\", 53))'")?;

    let mac = "02:70:00:00:00:99";
    let mut run: Vec<_> = "run --network lan --ip 10.70.0.9 --name task --mac".split(' ').collect();
    run.extend([mac, "--", "sh", "-ec"]);
    run.push("ping -n -c1 -W2 10.70.0.1 >/dev/null; getent ahostsv4 two");
    let said = host.weft_args(&run)?.ok()?;
    ensure!(said.starts_with("10.70.0.66 "), "{said}");
    ensure!(lan.machine("ip neigh show 10.70.0.9")?.contains(mac));

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
        let left = lan.belongings()?;
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
    let lan = Lan::beside(host)?;
    let create = |mode: &str| host.weft(&format!("{} -o macvlan_mode={mode}", Lan::CREATE))?.ok();
    for mode in ["private", "vepa"] {
        create(mode)?;
        let [one, two] = lan.pair("lan")?;
        for container in [&one, &two] {
            container.ping("10.70.0.1")?;
        }
        ensure!(Lan::meet(&one, &two, "lan").is_err(), "they reach each other with {mode}");
        ensure!(Lan::meet(&two, &one, "lan").is_err(), "they reach each other with {mode}");
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
    let [one, two] = lan.pair("lan")?;
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
    ensure!(lan.machine("ip neigh show 10.70.0.64")?.contains(&attached.mac));
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
fn a_container_is_on_networks_of_several_drivers() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let host = lab.host(1);
    let lan = Lan::beside(host)?;
    host.weft(Lan::CREATE)?.ok()?;
    host.weft("network create -d macvlan -o parent=lan0 --subnet 10.71.0.0/24 second")?.ok()?;
    host.weft("network create -d bridge inner --subnet 10.60.0.0/24")?.ok()?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let far = lab.host(2).container("far")?;
    far.attach("app", "")?;
    let [one, two] = lan.pair("lan")?;
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
    Lan::meet(&one, &two, "second")?;
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
