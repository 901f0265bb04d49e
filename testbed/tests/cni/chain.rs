//! The plugin beside others in one list.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::eventually;

use crate::{
    SOON,
    call::{cluster, in_namespace, own, run},
};

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
