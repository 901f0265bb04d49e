//! What ADD, CHECK and DEL do in each version, and what ADD refuses.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{Container, Host, eventually};

use crate::{
    SOON,
    call::{Call, cluster, conf, failed_with, in_namespace, own, run},
};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

#[test]
fn a_container_of_any_version_is_reached_by_name_from_another_host() -> anyhow::Result<()> {
    let lab = cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    let host = lab.host(1);
    let client = lab.host(2).container("client")?;
    client.attach("app", "")?;
    for (n, version) in VERSIONS.into_iter().enumerate() {
        let id = format!("box{n}");
        host.sh(&format!("ip netns add {id}"))?;
        let conf = conf(version, "app");
        let args = format!("IgnoreUnknown=1;K8S_POD_NAME=pod{n};COLOUR=red");
        let result = Call::new(host, "ADD", &conf, &id).args(&args).ok()?;

        let (v4, v6) = (&result["ips"][0], &result["ips"][1]);
        ensure!(result["cniVersion"] == version, "{result}");
        ensure!(result["interfaces"][0]["name"] == "eth0", "{result}");
        ensure!(result["interfaces"][0]["sandbox"] == format!("/run/netns/{id}"), "{result}");
        ensure!(result["interfaces"][0]["mtu"].is_number() == (version == "1.1.0"), "{result}");
        ensure!(v4["gateway"] == "10.40.0.1" && v4["interface"] == 0, "{result}");
        ensure!(v6["gateway"] == "fd00:40::1", "{result}");
        let old = version.starts_with("0.");
        ensure!((v4["version"] == "4" && v6["version"] == "6") == old, "{result}");
        ensure!(v4.get("version").is_some() == old, "{result}");
        ensure!(result["routes"][0] == json!({"dst": "0.0.0.0/0", "gw": "10.40.0.1"}), "{result}");
        ensure!(result["dns"]["nameservers"] == json!(["10.40.0.1", "fd00:40::1"]), "{result}");
        ensure!(result["dns"]["search"] == json!(["weft.internal"]), "{result}");

        let name = format!("pod{n}");
        finds(&client, &name)?;
        client.reaches(&name, SOON)?;
        let link = in_namespace(host, &id, "ip -o link show eth0; ip route; ip -6 route")?;
        let mac = result["interfaces"][0]["mac"].as_str().context("no mac")?;
        ensure!(link.contains(mac) && link.contains("default via 10.40.0.1"), "{link}");
        ensure!(link.contains("default via fd00:40::1"), "{link}");

        if version != "0.3.1" {
            Call::new(host, "CHECK", &conf, &id).prev(&result).ok()?;
        }
        for _ in 0..2 {
            let nothing = Call::new(host, "DEL", &conf, &id).prev(&result).ok()?;
            ensure!(nothing.is_null(), "{nothing}");
        }
        ensure!(in_namespace(host, &id, "ip -o link")?.lines().count() == 1, "eth0 is left");
        misses(&client, &name)?;
    }
    ensure!(own(host)? == 0, "an endpoint is left");
    lab.finish();
    Ok(())
}

#[test]
fn what_is_asked_for_in_any_way_is_given_and_what_cannot_be_is_named() -> anyhow::Result<()> {
    let lab = cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let (host, other) = (lab.host(1), lab.host(2));
    let client = other.container("client")?;
    client.attach("app", "--ip 10.40.0.200")?;
    host.sh("ip netns add a; ip netns add b; ip netns add c; ip netns add d")?;

    // As podman says it, and as a runtime that knows the capabilities does.
    let plain = conf("1.0.0", "app");
    let args = "IgnoreUnknown=1;K8S_POD_NAME=fixed;MAC=02:11:22:33:44:55;IP=10.40.0.77";
    let result = Call::new(host, "ADD", &plain, "a").args(args).ok()?;
    ensure!(result["ips"][0]["address"] == "10.40.0.77/24", "{result}");
    ensure!(result["interfaces"][0]["mac"] == "02:11:22:33:44:55", "{result}");
    let mut capable = conf("1.0.0", "app");
    capable["capabilities"] = json!({"aliases": true, "ips": true, "mac": true});
    capable["runtimeConfig"] = json!({
        "aliases": {"app": ["second", "b"]}, "ips": ["10.40.0.78/24"], "mac": "02:11:22:33:44:56",
    });
    capable["dns"] = json!({"search": ["corp.example"], "options": ["ndots:2"]});
    let result = Call::new(host, "ADD", &capable, "b").args("WEFT_NAME=first").ok()?;
    ensure!(result["ips"][0]["address"] == "10.40.0.78/24", "{result}");
    ensure!(result["dns"]["search"] == json!(["weft.internal", "corp.example"]), "{result}");
    for name in ["fixed", "first", "second"] {
        client.reaches(name, SOON)?;
    }
    // Nomad's: by its group, and by group and job.
    let args = "IgnoreUnknown=true;NOMAD_ALLOC_ID=c;NOMAD_GROUP_NAME=web;NOMAD_JOB_ID=shop";
    let args = args.replace("=c;", "=1a2b3c4d-0000-1111-2222-333344445555;");
    Call::new(host, "ADD", &plain, "c").args(&args).ok()?;
    for name in ["web-1a2b3c4d", "web", "web.shop", "tasks.web"] {
        client.reaches(name, SOON)?;
    }

    let before = own(host)?;
    let with = |key: &str, value: Value| {
        let mut conf = plain.clone();
        conf[key] = value;
        conf
    };
    let runtime = |key: &str, value: Value| with("runtimeConfig", json!({key: value}));
    let mapping = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "sctp"}]);
    let cases: &[(Value, &str, u64, &str)] = &[
        (conf("9.0.0", "app"), "", 1, "9.0.0"),
        (json!({"name": "app", "type": "weft-cni"}), "", 1, "cniVersion"),
        (with("colour", json!("red")), "", 2, "colour"),
        (with("ipam", json!({"type": "host-local"})), "", 2, "ipam"),
        (runtime("portMappings", mapping), "", 2, "portMappings"),
        (runtime("bandwidth", json!({"ingressRate": 1000})), "", 2, "bandwidth"),
        (plain.clone(), "COLOUR=red", 4, "COLOUR"),
        (plain.clone(), "IP=10.40.0", 4, "IP"),
        (plain.clone(), "MAC=zz", 4, "MAC"),
        (with("name", json!("a/b")), "", 7, "a/b"),
        (with("network", json!("nowhere")), "", 7, "\"create\": true"),
        (with("subnet", json!("10.41.0.0/24")), "", 7, "10.41.0.0/24"),
        (with("encrypted", json!(true)), "", 7, "encrypted"),
        (runtime("ips", json!(["10.99.0.1/24"])), "", 7, "10.99.0.1"),
        (runtime("ips", json!(["10.40.0.2", "10.40.0.3"])), "", 7, "10.40.0.3"),
        (plain.clone(), "IP=10.40.0.1", 7, "10.40.0.1"),
        (plain.clone(), "IP=10.40.0.200", 100, "10.40.0.200"),
        (plain.clone(), "K8S_POD_NAME=fixed", 100, "fixed"),
        (plain.clone(), "MAC=02:11:22:33:44:55", 100, "02:11:22:33:44:55"),
        (with("agent_socket", json!("/run/nowhere.sock")), "", 11, "/run/nowhere.sock"),
        (with("prevResult", json!({"ips": 1})), "", 7, "prevResult"),
    ];
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|(conf, args, code, word)| {
            let call = Call::new(host, "ADD", conf, "d").args(args);
            call.refused(*code, word).err().map(|error| format!("{args}: {error:#}"))
        })
        .collect();
    ensure!(wrong.is_empty(), "{} answers are wrong:\n{}", wrong.len(), wrong.join("\n"));
    Call::new(host, "ADD", &plain, "nobody").refused(3, "/run/netns/nobody")?;
    Call::new(host, "ADD", &plain, "d").ifname("no/slash").refused(4, "CNI_IFNAME")?;
    Call::new(host, "ADD", &plain, "d").ifname("lo").refused(4, "CNI_IFNAME")?;
    Call::new(host, "ADD", &plain, "a").ifname("eth1").refused(100, "attached")?;
    Call::new(host, "ADD", &plain, "d").without_namespace().refused(4, "CNI_NETNS")?;
    host.sh("ip -n d link add eth0 type bridge")?;
    Call::new(host, "ADD", &plain, "d").refused(4, "eth0")?;
    refused_before_the_agent_is_asked(host)?;
    ensure!(own(host)? == before, "a refused call left an endpoint: {}", host.weft("ps")?);
    ensure!(in_namespace(host, "d", "ip -o link")?.lines().count() == 2, "a link is left");
    lab.finish();
    Ok(())
}

fn refused_before_the_agent_is_asked(host: &Host) -> anyhow::Result<()> {
    let env = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    let call = |pairs: &[(&str, &str)], input: &str, code: u64, word: &str| {
        let (exit, answer) = run(host, &env(pairs), input, "weft-cni")?;
        failed_with((exit, &answer), code, word).with_context(|| format!("{pairs:?} {input}"))
    };
    let add = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "d"),
        ("CNI_NETNS", "/run/netns/d"),
        ("CNI_IFNAME", "eth9"),
    ];
    call(&[], "", 4, "CNI_COMMAND")?;
    call(&[("CNI_COMMAND", "FROB")], "{}", 4, "FROB")?;
    call(&add[..1], "{}", 4, "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME")?;
    call(&[&add[..1], &add[2..], &[("CNI_CONTAINERID", "../x")]].concat(), "{}", 4, "../x")?;
    for input in ["", "{", "[1]"] {
        call(&add, input, 6, "JSON")?;
    }
    let conf = conf("1.1.0", "app").to_string();
    let host_namespace = [&add[..2], &add[3..], &[("CNI_NETNS", "/proc/1/ns/net")]].concat();
    call(&host_namespace, &conf, 4, "own network namespace")?;
    let no_namespace = [&add[..2], &add[3..], &[("CNI_NETNS", "/etc/hostname")]].concat();
    call(&no_namespace, &conf, 4, "CNI_NETNS")?;

    let large = "yes ' ' | tr -d '\\n' | head -c 2000000 | CNI_COMMAND=VERSION weft-cni";
    let ran = host.exec(&["sh", "-c", large])?;
    let answer: Value = serde_json::from_str(&ran.stdout)?;
    failed_with((ran.code, &answer), 6, "standard input")
}

fn finds(container: &Container, name: &str) -> anyhow::Result<()> {
    let what = format!("{} finds {name}", container.name());
    eventually(SOON, &what, || container.resolve(name)).map(drop)
}

fn misses(container: &Container, name: &str) -> anyhow::Result<()> {
    eventually(SOON, &format!("{name} is gone"), || match container.resolve(name) {
        Ok(found) => anyhow::bail!("{name} is {found:?}"),
        Err(_) => Ok(()),
    })
}
