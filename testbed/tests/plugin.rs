//! Docker's plugin protocol without Docker: what its daemons 20.10 and 26.1 sent, sent again; and
//! what they send when something goes wrong.

use std::{
    collections::BTreeMap,
    os::unix::net::UnixListener,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{Host, Lab, Stop, eventually, plugin_call};

const SOON: Duration = Duration::from_secs(20);
const DOCKER_20: &str = include_str!("../../agent/tests/engines/docker-20.10.jsonl");
const DOCKER_26: &str = include_str!("../../agent/tests/engines/docker-26.1.jsonl");

const NETWORK: &str = "4d4a39a0dace29a88d4294102af9bb61688e5d961682d7ae23408191561eab9b";
const ENDPOINT: &str = "6ba33e5566275fef82b6f9e08c0e0313b551cc33e74a8d4216323d6757c1f609";
const SANDBOX: &str = "/run/docker/netns/8940ce25c163";

/// Makes a call that must succeed.
fn call(host: &Host, method: &str, body: &Value) -> anyhow::Result<Value> {
    let answer = plugin_call(host, method, &body.to_string())?;
    ensure!(answer.status == 200, "{method} {body}: {answer:?}");
    ensure!(answer.body.get("Err").is_none(), "{method} {body}: {answer:?}");
    Ok(answer.body)
}

/// Makes a call that must be refused, in words that hold `words`.
fn refused(host: &Host, method: &str, body: &str, words: &[&str]) -> anyhow::Result<()> {
    let answer = plugin_call(host, method, body)?;
    let error =
        answer.body["Err"].as_str().with_context(|| format!("{method} {body}: {answer:?}"))?;
    for word in words {
        ensure!(error.contains(word), "{method} {body}: the error lacks {word:?}: {error}");
    }
    Ok(())
}

/// How many endpoints the cluster has, as `host` sees it.
fn endpoints(host: &Host) -> anyhow::Result<usize> {
    Ok(host.weft_json("ps")?.as_array().map_or(0, Vec::len))
}

/// What an answer of the recording became in the replay: the same text in later requests means the
/// new one.
#[derive(Default)]
struct Replay {
    renamed: BTreeMap<String, String>,
}

impl Replay {
    fn run(&mut self, host: &Host, recording: &str, twice: bool) -> anyhow::Result<()> {
        let mut calls = 0;
        for line in recording.lines() {
            let line: Value = serde_json::from_str(line)?;
            let Some(method) = line["call"].as_str() else { continue };
            let request = self.rename(&line["request"]);
            let answer = call(host, method, &request).with_context(|| line.to_string())?;
            if twice && !method.starts_with("IpamDriver.Request") {
                let again = call(host, method, &request)?;
                ensure!(again == answer, "{method} twice: {again}, {answer}");
            }
            self.compare(host, method, &line["answer"], &answer)?;
            calls += 1;
        }
        ensure!(calls > 40, "only {calls} calls");
        Ok(())
    }

    fn rename(&self, request: &Value) -> Value {
        let mut text = request.to_string();
        for (old, new) in &self.renamed {
            text = text.replace(&format!("\"{old}"), &format!("\"{new}"));
        }
        serde_json::from_str(&text).expect("only texts were replaced")
    }

    /// The answer has the recorded one's fields; what they hold is of our choice.
    fn compare(
        &mut self,
        host: &Host,
        method: &str,
        old: &Value,
        new: &Value,
    ) -> anyhow::Result<()> {
        let different = || format!("{method}: {new}, recorded {old}");
        match method {
            "IpamDriver.RequestPool" => {
                ensure!(old["Pool"] == new["Pool"], different());
                let id = new["PoolID"].as_str().with_context(different)?;
                self.renamed.insert("POOL".into(), id.into());
            }
            "IpamDriver.RequestAddress" => {
                let address =
                    |answer: &Value| answer["Address"].as_str().map(|a| a.replace("/24", ""));
                let (old, new) = (address(old).context("none")?, address(new).context("none")?);
                ensure!(new.starts_with("10.88.0."), different());
                self.renamed.insert(old, new);
            }
            "NetworkDriver.CreateEndpoint" => {
                let has = |answer: &Value| !answer["Interface"]["MacAddress"].is_null();
                ensure!(has(old) == has(new), different());
            }
            "NetworkDriver.Join" => {
                ensure!(
                    new["InterfaceName"]["DstPrefix"] == "eth" && new.get("Gateway").is_none(),
                    different()
                );
                let link = new["InterfaceName"]["SrcName"].as_str().with_context(different)?;
                let shown = host.sh(&format!("ip -o link show {link}"))?;
                ensure!(shown.contains("mtu 1450") && shown.contains("state DOWN"), "{shown}");
            }
            _ => ensure!(old == new, different()),
        }
        Ok(())
    }
}

#[test]
fn what_docker_20_and_26_sent_is_answered_as_they_expect_also_when_sent_twice() -> anyhow::Result<()>
{
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    Replay::default().run(host, DOCKER_20, false)?;
    // The recording ends with its network still there.
    let remaining = endpoints(host)?;
    Replay::default().run(host, DOCKER_26, true)?;
    ensure!(endpoints(host)? == remaining, "endpoints are left");
    lab.finish();
    Ok(())
}

/// A network on the cluster's network `app`, with one endpoint that has an address.
struct Made {
    pool: Value,
    address: String,
}

fn make(host: &Host) -> anyhow::Result<Made> {
    let pool = make_network(host)?;
    let address = request_address(host, &pool)?;
    let interface = json!({"Address": address, "AddressIPv6": "", "MacAddress": ""});
    let endpoint = json!({"NetworkID": NETWORK, "EndpointID": ENDPOINT, "Interface": interface, "Options": {}});
    call(host, "NetworkDriver.CreateEndpoint", &endpoint)?;
    let (address, _) = address.split_once('/').context("no length")?;
    Ok(Made { pool, address: address.to_owned() })
}

/// Makes one of Docker's networks on the cluster's network `app`, and returns its pool.
fn make_network(host: &Host) -> anyhow::Result<Value> {
    let asked =
        json!({"AddressSpace": "weft", "Pool": "", "SubPool": "", "Options": {}, "V6": false});
    let given = call(host, "IpamDriver.RequestPool", &asked)?;
    let pool = given["PoolID"].clone();
    let options = json!({"RequestAddressType": "com.docker.network.gateway"});
    let gateway = json!({"PoolID": pool, "Address": "", "Options": options});
    let gateway = call(host, "IpamDriver.RequestAddress", &gateway)?["Address"].clone();
    let data = json!({"AddressSpace": "weft", "Gateway": gateway, "Pool": given["Pool"]});
    let options = json!({"com.docker.network.generic": {"weft.network": "app"}});
    let network =
        json!({"NetworkID": NETWORK, "Options": options, "IPv4Data": [data], "IPv6Data": []});
    call(host, "NetworkDriver.CreateNetwork", &network)?;
    Ok(pool)
}

fn request_address(host: &Host, pool: &Value) -> anyhow::Result<String> {
    let asked = json!({"PoolID": pool, "Address": "", "Options": null});
    let given = call(host, "IpamDriver.RequestAddress", &asked)?;
    Ok(given["Address"].as_str().context("no address")?.to_owned())
}

fn join() -> Value {
    json!({"NetworkID": NETWORK, "EndpointID": ENDPOINT, "SandboxKey": SANDBOX, "Options": {}})
}

#[test]
fn an_agent_that_was_killed_between_two_calls_goes_on_with_the_next() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    let made = make(host)?;
    let restart = |how| -> anyhow::Result<()> {
        host.stop_agent(how)?;
        let socket = host.sh("ls /run/docker/plugins")?;
        ensure!(how == Stop::Killed || socket.is_empty(), "{socket} is left");
        host.start_agent()
    };
    restart(Stop::Killed)?;
    call(host, "NetworkDriver.Join", &join())?;
    restart(Stop::Killed)?;
    let joined = call(host, "NetworkDriver.Join", &join())?;
    let found = host.weft_json(&format!("resolve {}", &ENDPOINT[..12]))?;
    ensure!(found.to_string().contains(&made.address), "{found}");
    restart(Stop::Gracefully)?;
    ensure!(call(host, "NetworkDriver.Join", &join())? == joined, "another interface");

    // A daemon that was killed says of its endpoints only that their addresses are free.
    let release = json!({"PoolID": made.pool, "Address": made.address});
    call(host, "IpamDriver.ReleaseAddress", &release)?;
    ensure!(endpoints(host)? == 0, "the endpoint stays");
    let again = json!({"PoolID": made.pool, "Address": made.address, "Options": null});
    call(host, "IpamDriver.RequestAddress", &again)?;
    for (method, body) in [
        ("NetworkDriver.Leave", join()),
        ("NetworkDriver.DeleteEndpoint", join()),
        ("IpamDriver.ReleasePool", json!({"PoolID": made.pool})),
        ("NetworkDriver.DeleteNetwork", json!({"NetworkID": NETWORK})),
    ] {
        call(host, method, &body)?;
        call(host, method, &body)?;
    }
    eventually(SOON, "no interface is left", || {
        let links = host.sh("ip -o link")?;
        ensure!(!links.contains("wfp"), "{links}");
        Ok(())
    })?;
    // The cluster's network is not Docker's to remove.
    host.weft("network inspect app")?.ok()?;
    lab.finish();
    Ok(())
}

#[test]
fn empty_cut_and_wrong_bodies_are_refused_and_nothing_comes_of_them() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    for method in [
        "NetworkDriver.CreateNetwork",
        "NetworkDriver.DeleteNetwork",
        "NetworkDriver.CreateEndpoint",
        "NetworkDriver.DeleteEndpoint",
        "NetworkDriver.EndpointOperInfo",
        "NetworkDriver.Join",
        "NetworkDriver.Leave",
        "NetworkDriver.ProgramExternalConnectivity",
        "NetworkDriver.RevokeExternalConnectivity",
        "IpamDriver.RequestPool",
        "IpamDriver.ReleasePool",
        "IpamDriver.RequestAddress",
        "IpamDriver.ReleaseAddress",
    ] {
        for body in ["", "{}", "{\"NetworkID\":\"4d4a", "[1]", "null"] {
            refused(host, method, body, &[method])?;
        }
    }
    ensure!(plugin_call(host, "NetworkDriver.NoSuchMethod", "{}")?.status == 404, "no 404");
    refused(host, "NetworkDriver.AllocateNetwork", "{}", &["--scope swarm"])?;
    for method in ["NetworkDriver.DiscoverNew", "NetworkDriver.DiscoverDelete"] {
        let peer =
            json!({"DiscoveryType": 1, "DiscoveryData": {"Address": "10.99.0.12", "Self": false}});
        call(host, method, &peer)?;
    }
    let gateways = call(host, "NetworkDriver.GwAllocCheck", &json!({"Options": {}}))?;
    ensure!(gateways == json!({"SkipIPv4": false, "SkipIPv6": false}), "{gateways}");

    let network = |data: Value, generic: Value| {
        json!({
            "NetworkID": NETWORK,
            "Options": {"com.docker.network.generic": generic},
            "IPv4Data": [data], "IPv6Data": [],
        })
        .to_string()
    };
    let create = "NetworkDriver.CreateNetwork";
    let foreign =
        json!({"AddressSpace": "LocalDefault", "Gateway": "10.92.0.1/24", "Pool": "10.92.0.0/24"});
    refused(host, create, &network(foreign, json!({})), &["10.92.0.0/24", "--ipam-driver weft"])?;
    let unknown =
        json!({"AddressSpace": "weft", "Gateway": "10.92.0.1/24", "Pool": "10.92.0.0/24"});
    refused(host, create, &network(unknown, json!({})), &["10.92.0.0/24"])?;
    refused(
        host,
        "NetworkDriver.Join",
        &join().to_string(),
        &["4d4a39a0dace", "docker network rm"],
    )?;
    ensure!(networks(host)? == 0, "a network came of it");

    // Docker asks for ever while an answer does not please it.
    let any =
        json!({"AddressSpace": "weft", "Pool": "", "SubPool": "", "Options": {}, "V6": false});
    let mut pools = BTreeMap::new();
    for _ in 0..64 {
        let given = call(host, "IpamDriver.RequestPool", &any)?;
        ensure!(
            pools.insert(given["Pool"].to_string(), given["PoolID"].clone()).is_none(),
            "{given} twice"
        );
    }
    refused(host, "IpamDriver.RequestPool", &any.to_string(), &["64", "--subnet"])?;
    for pool in pools.values() {
        call(host, "IpamDriver.ReleasePool", &json!({"PoolID": pool}))?;
    }
    call(host, "IpamDriver.RequestPool", &any)?;
    lab.finish();
    Ok(())
}

#[test]
fn a_network_that_differs_from_the_clusters_is_refused_on_every_host() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.60.0.0/24 --gateway 10.60.0.254 --internal")?;
    let host = lab.host(2);
    let create = |subnet: &str, options: Value| -> anyhow::Result<String> {
        let pool = json!({"AddressSpace": "weft", "Pool": subnet, "SubPool": "", "Options": {}, "V6": false});
        let given = call(host, "IpamDriver.RequestPool", &pool)?;
        let data = json!({"AddressSpace": "weft", "Pool": given["Pool"]});
        Ok(json!({"NetworkID": NETWORK, "Options": options, "IPv4Data": [data], "IPv6Data": []})
            .to_string())
    };
    let app = json!({"weft.network": "app"});
    let open = json!({"com.docker.network.generic": app});
    let internal = json!({"com.docker.network.generic": app, "com.docker.network.internal": true});
    let typo = json!({"com.docker.network.generic": {"weft.netwrok": "app"}});
    let method = "NetworkDriver.CreateNetwork";
    refused(
        host,
        method,
        &create("10.61.0.0/24", internal.clone())?,
        &["app", "--subnet 10.60.0.0/24"],
    )?;
    refused(host, method, &create("10.60.0.0/24", open)?, &["app", "--internal"])?;
    refused(host, method, &create("10.60.0.0/24", typo)?, &["weft.netwrok", "weft.network"])?;
    // Without a subnet of its own it takes what is there.
    let body = create("", internal)?;
    ensure!(body.contains("10.60.0.0/24"), "{body}");
    call(host, method, &serde_json::from_str(&body)?)?;
    lab.finish();
    Ok(())
}

#[test]
fn a_docker_that_does_not_answer_delays_a_container_by_little() -> anyhow::Result<()> {
    let lab = Lab::cluster(1)?;
    let host = lab.host(1);
    // Takes connections and says nothing.
    let namespace = host.namespace()?;
    let process = namespace.ancestors().nth(2).context("no process")?;
    let silent = UnixListener::bind(process.join("root/run/docker.sock"))?;
    make(host)?;
    let start = Instant::now();
    call(host, "NetworkDriver.Join", &join())?;
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(10), "{took:?}");
    drop(silent);
    lab.finish();
    Ok(())
}

/// Two hosts that do not hear each other create a network of one name; so may two that do, in the
/// same moment.
#[test]
fn a_network_created_on_two_hosts_at_once_becomes_one() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.partition(&[1], &[2])?;
    let mut pools = Vec::new();
    for host in lab.hosts() {
        pools.push(make_network(host)?);
    }
    lab.heal()?;
    for host in lab.hosts() {
        eventually(Duration::from_secs(20), "both networks are known", || {
            let networks = networks(host)?;
            ensure!(networks == 2, "{networks}");
            Ok(())
        })?;
    }
    let mut addresses = Vec::new();
    for (host, pool) in lab.hosts().iter().zip(&pools) {
        addresses.push(eventually(SOON, "an address", || request_address(host, pool))?);
    }
    ensure!(addresses[0] != addresses[1], "{addresses:?}");
    for host in lab.hosts() {
        eventually(SOON, "one network is left", || {
            let networks = networks(host)?;
            ensure!(networks == 1, "{networks}");
            Ok(())
        })?;
    }
    lab.finish();
    Ok(())
}

/// How many networks there are, but for those that are predefined.
fn networks(host: &Host) -> anyhow::Result<usize> {
    let networks = host.weft_json("network ls")?;
    Ok(networks.as_array().into_iter().flatten().filter(|one| one["id"].is_string()).count())
}
