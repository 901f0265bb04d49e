//! Networks that the plugin makes, and which of them leads out.

use anyhow::{Context as _, ensure};
use serde_json::json;
use weft_testbed::eventually;

use crate::{
    SOON,
    call::{Call, cluster, conf, in_namespace},
};

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

/// Whoever says so has the default route, and not whoever comes first.
#[test]
fn the_default_route_leads_through_the_network_of_the_highest_priority() -> anyhow::Result<()> {
    let lab = cluster(1)?;
    let host = lab.host(1);
    host.sh("ip netns add a")?;
    for n in 1..=4 {
        lab.create_network(&format!("net{n} --subnet 10.5{n}.0.0/24"))?;
    }
    let mut confs: Vec<_> = (1..=4).map(|n| conf("1.0.0", &format!("net{n}"))).collect();
    confs[1]["isDefaultGateway"] = json!(true);
    confs[2]["isDefaultGateway"] = json!(true);
    confs[3]["gatewayPriority"] = json!(7);
    let leads = |n: u8| {
        let route = format!("default via 10.5{n}.0.1 dev eth{n}");
        eventually(SOON, &route, || {
            let routes = in_namespace(host, "a", "ip route")?;
            ensure!(routes.contains(&route) && routes.matches("default").count() == 1, "{routes}");
            Ok(())
        })
    };
    let add = |n: usize| Call::new(host, "ADD", &confs[n - 1], "a").ifname(IFNAMES[n - 1]);
    let via = |n: u8| json!([{"dst": "0.0.0.0/0", "gw": format!("10.5{n}.0.1")}]);
    ensure!(add(1).ok()?["routes"] == via(1), "the first does not lead out");
    leads(1)?;
    let second = add(2).ok()?;
    ensure!(second["routes"] == via(2), "{second}");
    leads(2)?;
    add(3).refused(100, "gatewayPriority")?;
    leads(2)?;
    let fourth = add(4).ok()?;
    ensure!(fourth["routes"] == via(4), "{fourth}");
    leads(4)?;
    for (n, left) in [(4, 2), (2, 1)] {
        Call::new(host, "DEL", &confs[n - 1], "a").ifname(IFNAMES[n - 1]).ok()?;
        leads(left)?;
    }
    lab.finish();
    Ok(())
}

const IFNAMES: [&str; 4] = ["eth1", "eth2", "eth3", "eth4"];
