//! Calls that are cut off, come twice, or find no agent.

use anyhow::ensure;
use serde_json::json;
use weft_testbed::{Stop, eventually};

use crate::{
    SOON,
    call::{Call, cluster, conf, in_namespace, own},
};

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
