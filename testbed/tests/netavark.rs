//! `weft-netavark` called as podman 5 and netavark call it, with a real agent behind it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{Host, Lab, eventually};

const SOON: Duration = Duration::from_secs(20);
const PODMAN_5: &str = include_str!("../../agent/tests/engines/podman-5.4.jsonl");

/// What podman 5.4 put on standard input for `call`.
fn recorded(call: &str) -> anyhow::Result<Value> {
    for line in PODMAN_5.lines() {
        let line: Value = serde_json::from_str(line)?;
        if line["argv"][0] == call {
            return Ok(line["stdin"].clone());
        }
    }
    anyhow::bail!("{call} was not recorded")
}

/// Calls the driver by the path at which netavark finds it.
fn call(host: &Host, arguments: &[&str], input: &Value) -> anyhow::Result<(i32, Value)> {
    let script = r#"printf %s "$1" >/run/input; shift; exec "$@" </run/input"#;
    let program = host.dir().join("bin/netavark/weft").display().to_string();
    let input = input.to_string();
    let shell = ["sh", "-c", script, "netavark", &input, &program];
    let ran = host.exec(&[&shell[..], arguments].concat())?;
    let answer = match ran.stdout.trim() {
        "" => Value::Null,
        text => serde_json::from_str(text).with_context(|| format!("no JSON: {ran}"))?,
    };
    Ok((ran.code, answer))
}

fn ok(host: &Host, arguments: &[&str], input: &Value) -> anyhow::Result<Value> {
    let (code, answer) = call(host, arguments, input)?;
    ensure!(code == 0, "{arguments:?} {input}: exit code {code}, {answer}");
    Ok(answer)
}

fn refused(host: &Host, arguments: &[&str], input: &Value, words: &[&str]) -> anyhow::Result<()> {
    let (code, answer) = call(host, arguments, input)?;
    let error = answer["error"].as_str().with_context(|| format!("{code}, {answer}"))?;
    ensure!(code == 1, "exit code {code}: {answer}");
    for word in words {
        ensure!(error.contains(word), "the error lacks {word:?}: {error}");
    }
    Ok(())
}

#[test]
fn what_podman_5_4_sent_attaches_a_container_that_others_find() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let (host, other) = (lab.host(1), lab.host(2));
    for host in lab.hosts() {
        std::fs::create_dir(host.dir().join("bin/netavark"))?;
        std::os::unix::fs::symlink("../weft", host.dir().join("bin/netavark/weft"))?;
    }
    host.sh("ip netns add a; ip netns add b")?;
    let (create, mut setup) = (recorded("create")?, recorded("setup")?);
    ensure!(ok(host, &["info"], &Value::Null)?["api_version"] == "1.0.0", "another version");

    // Podman on each host makes the network; the cluster's is one.
    for host in lab.hosts() {
        let made = eventually(SOON, "the network is made", || ok(host, &["create"], &create))?;
        ensure!(made == create, "create changed the network: {made}");
    }
    let networks = host.weft_json("network ls")?;
    ensure!(networks[1]["id"].is_null(), "{networks}");
    ensure!(networks[0]["pools"][0]["subnet"] == "10.93.0.0/24", "{networks}");

    // It was called with a published port, and nobody had said who publishes it.
    let (a, b) = (["setup", "/run/netns/a"], ["setup", "/run/netns/b"]);
    refused(host, &a, &setup, &["port_mappings", "8077", "ports=here", "ports=elsewhere"])?;
    setup["network"]["options"]["ports"] = json!("elsewhere");
    ok(host, &a, &setup)?;
    ensure!(host.weft("port nv1")?.ok()?.is_empty(), "weft publishes what others do");
    setup["network"]["options"]["ports"] = json!("here");
    let answer = ok(host, &a, &setup)?;
    let shown = host.weft("port nv1 80")?.ok()?;
    ensure!(shown.contains("0.0.0.0:8077"), "{shown}");
    let mut taken = setup.clone();
    taken["container_id"] = json!("fedcba9876543210");
    taken["container_name"] = json!("nv3");
    taken["network_options"]["static_ips"] = Value::Null;
    refused(host, &b, &taken, &["8077", "container nv1 of network shop"])?;
    setup["port_mappings"] = json!([]);
    let made = &answer["interfaces"]["eth0"];
    ensure!(
        made["subnets"] == json!([{"ipnet": "10.93.0.2/24", "gateway": "10.93.0.1"}]),
        "{answer}"
    );
    ensure!(answer["dns_server_ips"] == json!(["10.93.0.1"]), "{answer}");
    ensure!(answer["dns_search_domains"] == json!(["weft.internal"]), "{answer}");
    let link = host.sh("ip -n a -o link show eth0; ip -n a route")?;
    let mac = made["mac_address"].as_str().context("no mac")?;
    ensure!(link.contains(mac) && link.contains("mtu 1400"), "{link}");
    ensure!(link.contains("default via 10.93.0.1"), "{link}");
    let client = other.container("client")?;
    client.attach("shop", "")?;
    for name in ["nv1", "al9", "nv1.shop"] {
        client.reaches(name, SOON)?;
    }

    // The other host's podman knows nothing of the address that this one gave out.
    let mut same = setup.clone();
    same["container_id"] = json!("0123456789abcdef");
    same["container_name"] = json!("nv2");
    same["network_options"]["aliases"] = json!(["second"]);
    other.sh("ip netns add b")?;
    refused(other, &b, &same, &["10.93.0.2", "--ip-range"])?;
    // Without a choice of podman's weft makes one.
    same["network_options"]["static_ips"] = Value::Null;
    let answer = ok(other, &b, &same)?;
    ensure!(answer["interfaces"]["eth0"]["subnets"][0]["ipnet"] != "10.93.0.2/24", "{answer}");
    client.reaches("second", SOON)?;

    // A second network of the same container leads out if its metric is the lower one.
    let (mut other_network, mut second) = (create.clone(), setup.clone());
    for network in [&mut other_network, &mut second["network"]] {
        network["name"] = json!("lead");
        network["subnets"] = json!([{"subnet": "10.94.0.0/24", "gateway": "10.94.0.1"}]);
        network["options"] = json!({"metric": "50"});
    }
    second["network_options"]["interface_name"] = json!("eth1");
    second["network_options"]["static_ips"] = Value::Null;
    ok(host, &["create"], &other_network)?;
    ok(host, &a, &second)?;
    for gateway in ["10.94.0.1", "10.93.0.1"] {
        let default = format!("default via {gateway}");
        eventually(SOON, &default, || {
            let routes = host.sh("ip -n a route")?;
            ensure!(
                routes.contains(&default) && routes.matches("default").count() == 1,
                "{routes}"
            );
            Ok(())
        })?;
        ok(host, &["teardown", "/run/netns/a"], &second)?;
    }

    let mut strange = setup.clone();
    strange["network"]["options"] = json!({"colour": "red"});
    refused(host, &b, &strange, &["colour", "red"])?;
    strange["network"]["options"] = json!({"metric": "low"});
    refused(host, &b, &strange, &["metric", "low"])?;
    let mut absent = setup.clone();
    absent["network"]["options"] = json!({"weft.network": "nowhere"});
    refused(host, &b, &absent, &["nowhere"])?;
    let mut differs = create.clone();
    differs["subnets"] = json!([{"subnet": "10.95.0.0/24"}]);
    refused(host, &["create"], &differs, &["10.95.0.0/24", "10.93.0.0/24"])?;
    refused(host, &["frob"], &Value::Null, &["teardown"])?;
    refused(host, &["create"], &Value::Null, &["object"])?;
    refused(host, &["setup", "/run/netns/nowhere"], &same, &["/run/netns/nowhere"])?;

    for _ in 0..2 {
        let nothing = ok(host, &["teardown", "/run/netns/a"], &setup)?;
        ensure!(nothing.is_null(), "{nothing}");
    }
    eventually(SOON, "nv1 is gone", || match client.resolve("nv1") {
        Ok(found) => anyhow::bail!("{found:?}"),
        Err(_) => Ok(()),
    })?;
    ensure!(host.sh("ip -n a -o link")?.lines().count() == 1, "eth0 is left");
    ok(other, &["teardown", "/run/netns/b"], &same)?;
    lab.finish();
    Ok(())
}
