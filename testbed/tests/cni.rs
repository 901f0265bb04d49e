//! `weft-cni` called as a container runtime calls it, with a real agent behind it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{Container, Host, Lab, Stop, eventually};

const SOON: Duration = Duration::from_secs(5);
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// One call, and what the plugin did.
struct Call<'a> {
    host: &'a Host,
    verb: &'a str,
    conf: Value,
    /// The container's id, and its namespace unless it is gone.
    container: (&'a str, Option<&'a str>),
    ifname: &'a str,
    args: &'a str,
}

impl<'a> Call<'a> {
    fn new(host: &'a Host, verb: &'a str, conf: &Value, id: &'a str) -> Self {
        let conf = conf.clone();
        Self { host, verb, conf, container: (id, Some(id)), ifname: "eth0", args: "" }
    }

    fn without_namespace(self) -> Self {
        Self { container: (self.container.0, None), ..self }
    }

    fn args(self, args: &'a str) -> Self {
        Self { args, ..self }
    }

    fn ifname(self, ifname: &'a str) -> Self {
        Self { ifname, ..self }
    }

    fn prev(mut self, result: &Value) -> Self {
        self.conf["prevResult"] = result.clone();
        self
    }

    /// Runs the plugin; what it printed must be one JSON value or nothing.
    fn run(self) -> anyhow::Result<(i32, Value)> {
        let (id, netns) = self.container;
        let netns = netns.map_or_else(String::new, |name| format!("/run/netns/{name}"));
        let env = [
            ("COMMAND", self.verb),
            ("CONTAINERID", id),
            ("NETNS", &netns),
            ("IFNAME", self.ifname),
            ("ARGS", self.args),
            ("PATH", "/usr/lib/cni"),
        ];
        let env = env.map(|(name, value)| (format!("CNI_{name}"), value.to_owned()));
        run(self.host, &env, &self.conf.to_string(), "weft-cni")
    }

    /// Runs what must succeed.
    fn ok(self) -> anyhow::Result<Value> {
        let what = format!("{} {} on {}", self.verb, self.container.0, self.host.name());
        let (code, answer) = self.run()?;
        ensure!(code == 0, "{what}: exit code {code}, {answer}");
        Ok(answer)
    }

    /// Runs what must fail under `code`, with a message that holds `word`.
    fn refused(self, code: u64, word: &str) -> anyhow::Result<()> {
        let what = format!("{} {}", self.verb, self.conf);
        let version = self.conf["cniVersion"].clone();
        let (exit, answer) = self.run()?;
        failed_with((exit, &answer), code, word).context(what)?;
        ensure!(version.is_null() || answer["cniVersion"] == version, "{answer}");
        Ok(())
    }
}

fn run(
    host: &Host,
    env: &[(String, String)],
    input: &str,
    program: &str,
) -> anyhow::Result<(i32, Value)> {
    let env: Vec<String> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let shell = ["sh", "-c", "printf %s \"$1\" | \"$2\"", "cni", input, program];
    let command: Vec<&str> =
        ["env"].into_iter().chain(env.iter().map(String::as_str)).chain(shell).collect();
    let ran = host.exec(&command)?;
    let answer = match ran.stdout.trim() {
        "" => Value::Null,
        text => serde_json::from_str(text).with_context(|| format!("no JSON: {ran}"))?,
    };
    Ok((ran.code, answer))
}

fn failed_with((exit, answer): (i32, &Value), code: u64, word: &str) -> anyhow::Result<()> {
    ensure!(exit == 1, "exit code {exit}: {answer}");
    ensure!(answer["code"] == code, "not code {code}: {answer}");
    let message = answer["msg"].as_str().context("no msg")?;
    ensure!(message.contains(word), "the message lacks {word:?}: {answer}");
    ensure!(answer["details"].is_string() && answer["cniVersion"].is_string(), "{answer}");
    Ok(())
}

/// A cluster whose hosts have the plugin by its name.
fn cluster(hosts: u8) -> anyhow::Result<Lab> {
    let lab = Lab::cluster(hosts)?;
    for host in lab.hosts() {
        std::os::unix::fs::symlink("weft", host.dir().join("bin/weft-cni"))?;
    }
    Ok(lab)
}

fn conf(version: &str, network: &str) -> Value {
    json!({"cniVersion": version, "name": network, "type": "weft-cni"})
}

/// How many endpoints `host` has.
fn own(host: &Host) -> anyhow::Result<usize> {
    let endpoints = host.weft_json("ps")?;
    let name = host.name();
    Ok(endpoints.as_array().into_iter().flatten().filter(|e| e["node"] == name).count())
}

fn in_namespace(host: &Host, netns: &str, script: &str) -> anyhow::Result<String> {
    host.exec(&["ip", "netns", "exec", netns, "sh", "-ec", script])?.ok()
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
    let mapping = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
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
    ensure!(own(host)? == before, "a refused call left an endpoint");
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

#[test]
fn nothing_of_a_container_outlives_it_whatever_was_cut_off() -> anyhow::Result<()> {
    let lab = cluster(1)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    lab.create_network("db --subnet 10.41.0.0/24")?;
    let host = lab.host(1);
    let (app, db) = (conf("1.1.0", "app"), conf("1.1.0", "db"));
    host.sh("ip netns add a; ip netns add b; ip netns add c")?;

    // An ADD whose answer was lost is answered again.
    let first = Call::new(host, "ADD", &app, "a").ok()?;
    let again = Call::new(host, "ADD", &app, "a").ok()?;
    ensure!(first == again, "{first} {again}");
    ensure!(own(host)? == 1, "an attachment was made twice");

    // A container that comes back under its id, in another namespace.
    host.sh("ip netns delete a; ip netns add a")?;
    let result = Call::new(host, "ADD", &app, "a").ok()?;
    Call::new(host, "CHECK", &app, "a").prev(&result).ok()?;
    eventually(SOON, "one endpoint is left", || match own(host)? {
        1 => Ok(()),
        n => Err(anyhow::anyhow!("{n}")),
    })?;

    // CHECK tells what is no longer so.
    let mut other = result.clone();
    other["ips"][0]["address"] = json!("10.40.0.99/24");
    Call::new(host, "CHECK", &app, "a").prev(&other).refused(101, "10.40.0.99")?;
    Call::new(host, "CHECK", &app, "a").refused(7, "prevResult")?;
    Call::new(host, "CHECK", &app, "b").prev(&result).refused(101, "not attached")?;
    host.sh("ip -n a route delete default")?;
    Call::new(host, "CHECK", &app, "a").prev(&result).refused(101, "default route")?;
    host.sh("ip -n a address flush dev eth0")?;
    Call::new(host, "CHECK", &app, "a").prev(&result).refused(101, "lost")?;

    // The namespace is gone and so is its name, as containerd does it.
    host.sh("ip netns delete a")?;
    Call::new(host, "DEL", &app, "a").without_namespace().ok()?;
    ensure!(own(host)? == 0, "an endpoint is left");

    // GC knows its own network, its own attachments, and what the runtime still has.
    host.weft("attach /run/netns/c --network app --name mine")?.ok()?;
    Call::new(host, "ADD", &app, "a").refused(3, "/run/netns/a")?;
    host.sh("ip netns add a")?;
    for id in ["a", "b"] {
        Call::new(host, "ADD", &app, id).ok()?;
    }
    Call::new(host, "ADD", &db, "a").ifname("eth1").ok()?;
    ensure!(own(host)? == 4, "not all are attached");
    Call::new(host, "GC", &app, "").refused(7, "cni.dev/valid-attachments")?;
    let mut keep = app.clone();
    keep["cni.dev/valid-attachments"] = json!([{"containerID": "b", "ifname": "eth0"}]);
    ensure!(Call::new(host, "GC", &keep, "").ok()?.is_null(), "GC printed something");
    let left = host.weft_json("ps")?;
    let names: Vec<_> = left.as_array().into_iter().flatten().map(|e| &e["name"]).collect();
    ensure!(own(host)? == 3 && !names.is_empty(), "{left}");
    ensure!(in_namespace(host, "a", "ip -o link")?.contains("eth1"), "GC took another network's");
    ensure!(!in_namespace(host, "a", "ip -o link")?.contains("eth0"), "GC left eth0");

    // Without an agent.
    Call::new(host, "STATUS", &app, "").ok()?;
    Call::new(host, "STATUS", &conf("1.1.0", "nowhere"), "").refused(50, "nowhere")?;
    host.stop_agent(Stop::Killed)?;
    Call::new(host, "STATUS", &app, "").refused(50, "no agent")?;
    Call::new(host, "ADD", &app, "a").refused(11, "no agent")?;
    Call::new(host, "DEL", &app, "b").refused(11, "no agent")?;
    host.sh("ip netns delete b")?;
    Call::new(host, "DEL", &app, "b").ok()?;
    host.start_agent()?;
    eventually(SOON, "the agent takes away what has no namespace", || match own(host)? {
        2 => Ok(()),
        n => Err(anyhow::anyhow!("{n}")),
    })?;
    Call::new(host, "DEL", &db, "a").ifname("eth1").ok()?;
    Call::new(host, "VERSION", &app, "").ok()?;
    lab.finish();
    Ok(())
}

#[test]
fn networks_are_made_if_wanted_and_the_first_has_the_default_route() -> anyhow::Result<()> {
    let lab = cluster(2)?;
    let host = lab.host(1);
    host.sh("ip netns add a; ip netns add b")?;
    let mut made = conf("1.0.0", "made");
    made["create"] = json!(true);
    made["subnet"] = json!("10.50.0.0/24");
    made["mtu"] = json!(1300);
    let first = Call::new(host, "ADD", &made, "a").ok()?;
    ensure!(
        first["ips"][0]["address"].as_str().is_some_and(|a| a.starts_with("10.50.0.")),
        "{first}"
    );
    let mut second = conf("1.0.0", "other-name");
    second["network"] = json!("second");
    second["create"] = json!(true);
    second["internal"] = json!(true);
    let result = Call::new(host, "ADD", &second, "a").ifname("net1").ok()?;
    ensure!(result["routes"] == json!([]), "{result}");
    in_namespace(host, "a", "ip link show net1")?;
    let routes = in_namespace(host, "a", "ip route")?;
    ensure!(routes.matches("default").count() == 1, "{routes}");

    let mut none = made.clone();
    none["isDefaultGateway"] = json!(false);
    let result = Call::new(host, "ADD", &none, "b").ok()?;
    ensure!(result["routes"] == json!([]), "{result}");
    ensure!(!in_namespace(host, "b", "ip route")?.contains("default"), "there is a default route");
    second["isDefaultGateway"] = json!(true);
    Call::new(host, "ADD", &second, "b").ifname("net1").refused(100, "isDefaultGateway")?;
    ensure!(!in_namespace(host, "b", "ip -o link")?.contains("net1"), "net1 is left");

    // On the other host it is there already.
    let other = lab.host(2);
    other.sh("ip netns add a")?;
    eventually(SOON, "the network is known", || other.weft("network inspect made")?.ok())?;
    Call::new(other, "ADD", &made, "a").ok()?;
    let target = first["ips"][0]["address"].as_str().and_then(|a| a.split('/').next());
    let target = target.context("no address")?.to_owned();
    eventually(SOON, "the containers reach each other", || {
        in_namespace(other, "a", &format!("ping -n -c 1 -W 1 {target}"))
    })?;

    for (call, ifname) in [(&made, "eth0"), (&second, "net1")] {
        Call::new(host, "DEL", call, "a").ifname(ifname).ok()?;
    }
    lab.finish();
    Ok(())
}

/// Ports need an interface that leads to the host, as Docker's own networks do: the bridge plugin
/// makes it, and weft adds its own beside it.
#[test]
fn in_a_chain_ports_are_published_and_names_found() -> anyhow::Result<()> {
    let lab = cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let host = lab.host(1);
    host.sh("ip netns add a")?;
    let client = lab.host(2).container("client")?;
    client.attach("app", "")?;
    let chain = [
        json!({
            "type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "172.26.0.0/24"}]]},
        }),
        json!({
            "type": "portmap", "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": [
                {"hostPort": 8088, "containerPort": 80, "protocol": "tcp"},
            ]},
        }),
        json!({"type": "weft-cni", "network": "app", "ifname": "weft0"}),
    ];
    let env = |verb: &str| {
        [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "a"),
            ("CNI_NETNS", "/run/netns/a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/usr/lib/cni"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    let call = |verb: &str, plugin: &Value, prev: &Value| {
        let mut conf = plugin.clone();
        conf["cniVersion"] = json!("1.0.0");
        conf["name"] = json!("chain");
        if !prev.is_null() {
            conf["prevResult"] = prev.clone();
        }
        let program = match plugin["type"].as_str().context("no type")? {
            "weft-cni" => "weft-cni".to_owned(),
            stock => format!("/usr/lib/cni/{stock}"),
        };
        let (code, answer) = run(host, &env(verb), &conf.to_string(), &program)?;
        ensure!(code == 0, "{verb} {program}: {answer}");
        Ok(answer)
    };
    let mut result = Value::Null;
    for plugin in &chain {
        result = call("ADD", plugin, &result)?;
    }
    let of = |ifname: &str| {
        let interfaces = result["interfaces"].as_array()?;
        let index = interfaces.iter().position(|interface| interface["name"] == ifname)?;
        result["ips"].as_array()?.iter().find(|ip| ip["interface"] == index)?["address"].as_str()
    };
    ensure!(of("eth0").is_some_and(|ip| ip.starts_with("172.26.0.")), "{result}");
    ensure!(of("weft0").is_some_and(|ip| ip.starts_with("10.40.0.")), "{result}");
    ensure!(result["dns"]["nameservers"] == json!(["10.40.0.1"]), "{result}");
    let routes = in_namespace(host, "a", "ip route")?;
    ensure!(routes.contains("default via 172.26.0.1"), "{routes}");
    // The bridge plugin takes all addresses for its own, and portmap misses IPv6 rules that it did
    // not make: a chain with them needs disableCheck.
    call("CHECK", &chain[2], &result)?;

    // It ends with its host.
    in_namespace(host, "a", "setsid busybox httpd -f -p 80 -h /etc </dev/null >/dev/null 2>&1 &")?;
    let ask = "exec 3<>/dev/tcp/10.99.0.11/8088
               printf 'GET /hostname HTTP/1.0\r\n\r\n' >&3; cat <&3";
    for from in [lab.host(2), host] {
        eventually(SOON, &format!("port 8088 answers to {}", from.name()), || {
            let said = from.exec(&["timeout", "1", "bash", "-ec", ask])?.ok()?;
            ensure!(said.contains("200 OK"), "{said}");
            Ok(())
        })?;
    }
    client.reaches("a", SOON)?;

    for plugin in chain.iter().rev() {
        call("DEL", plugin, &result)?;
    }
    ensure!(own(host)? == 0, "an endpoint is left");
    ensure!(in_namespace(host, "a", "ip -o link")?.lines().count() == 1, "an interface is left");
    lab.finish();
    Ok(())
}
