//! What networks on an interface of the host cannot be, what they need, and who else may use them.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{Lab, Lan, Stop, eventually, holds_for, plugin_call};

const SOON: Duration = Duration::from_secs(20);
/// The kernel ends namespaces one after the other, those of the whole machine.
const ENDED: Duration = Duration::from_secs(60);
const PODMAN_5: &str = include_str!("../../agent/tests/engines/podman-5.4.jsonl");

#[test]
fn runtimes_attach_by_cni_and_netavark_and_docker_is_sent_to_its_own_driver() -> anyhow::Result<()>
{
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    std::os::unix::fs::symlink("weft", host.dir().join("bin/weft-cni"))?;
    let _lan = Lan::beside(host)?;
    host.weft(Lan::CREATE)?.ok()?;
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
    let lan = Lan::beside(host)?;
    host.sh("ip link add br7 type bridge; ip link add port7 type veth peer name other7
             ip link set port7 master br7")?;
    host.weft(Lan::CREATE)?.ok()?;
    let before = lan.belongings()?;
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
    ensure!(lan.belongings()? == before, "something was left behind");

    // Without a parent: among themselves, and nowhere else.
    host.weft("network create -d macvlan alone --subnet 10.73.0.0/24")?.ok()?;
    let shown = host.weft_json("network inspect alone")?;
    ensure!(shown.pointer("/0/Internal") == Some(&true.into()), "{shown}");
    let [one, two] = lan.pair("alone")?;
    Lan::meet(&one, &two, "alone")?;
    one.ping("two")?;
    ensure!(one.sh("ip route show default")?.is_empty(), "something leads out");
    one.attach("lan", "")?;
    one.ping("10.70.0.1")?;
    let findings = || Ok::<_, anyhow::Error>(host.weft_json("status")?["findings"].to_string());
    ensure!(!findings()?.contains("lan0"), "{}", findings()?);
    host.sh("ip link set lan0 down")?;
    ensure!(findings()?.contains("network lan: lan0 is down"), "{}", findings()?);
    host.sh("ip link set lan0 up")?;
    host.weft("network rm --force alone lan")?.ok()?;
    let own = "ip -o link | sed 's/ state .*//' | grep -v ' eth0@'";
    eventually(ENDED, "nothing is left", || {
        let left = lan.belongings()?;
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
    let _lan = Lan::beside(host)?;
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
