//! Real containerds whose client calls the CNI plugin, an agent beside each.

use std::time::Duration;

use anyhow::ensure;
use weft_testbed::{Containerd, Lab, Stop, eventually};

const SOON: Duration = Duration::from_secs(20);
const CONFLIST: &str = include_str!("../../deploy/cni/weft.conflist");

#[test]
fn containerds_containers_find_and_reach_each_other_across_hosts() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let one = Containerd::start(&lab, 1, CONFLIST)?;
    let two = Containerd::start(&lab, 2, CONFLIST)?;
    let web = one.container("web", "10.40.0.1")?;
    let client = two.container("client", "10.40.0.1")?;
    // Containerd tells no name but its own for the container.
    client.reaches("default-web", SOON)?;
    web.reaches("default-client", SOON)?;
    web.reaches("default-client.app", SOON)?;
    let routes = web.sh("ip route")?;
    ensure!(routes.contains("default via 10.40.0.1 dev eth0"), "{routes}");
    web.ping(&lab.router().to_string())?;

    // A container that is removed is gone, whether its namespace is still there or not.
    one.remove("web")?;
    eventually(SOON, "the name is gone", || match client.resolve("default-web") {
        Ok(found) => anyhow::bail!("{found:?}"),
        Err(_) => Ok(()),
    })?;
    let again = one.container("web", "10.40.0.1")?;
    client.reaches("default-web", SOON)?;
    again.reaches("default-client", SOON)?;

    // Without an agent nothing is attached; what runs goes on.
    lab.host(1).stop_agent(Stop::Killed)?;
    let address = again.sh("ip -o -4 addr show eth0 | awk '{print $4}' | cut -d/ -f1")?;
    client.ping(&address)?;
    ensure!(one.container("late", "10.40.0.1").is_err(), "it was attached to nothing");
    // One that ends before the agent has looked at it is missed by nobody.
    lab.host(1).start_agent()?;
    one.remove("web")?;
    two.remove("client")?;
    for host in lab.hosts() {
        eventually(SOON, &format!("nothing is left on {}", host.name()), || {
            let endpoints = host.weft_json("ps")?;
            ensure!(endpoints.as_array().is_some_and(Vec::is_empty), "{endpoints}");
            Ok(())
        })?;
    }
    lab.finish();
    Ok(())
}
