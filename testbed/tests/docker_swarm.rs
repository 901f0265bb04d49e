//! Docker in swarm mode, with the plugin that it runs itself.

use std::time::Duration;

use anyhow::ensure;
use weft_testbed::{Docker, Engine as _, eventually};

const SOON: Duration = Duration::from_secs(5);

/// In a swarm Docker gives out addresses and names; the packets go by weft.
#[test]
fn a_network_of_a_swarm_reaches_all_its_nodes() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    let plugin = one.build_plugin()?;
    for docker in &dockers {
        docker.run(&format!("plugin create weft-swarm {plugin}"))?;
        docker.run("plugin enable weft-swarm")?;
    }
    let address = one.host().address();
    one.run(&format!("swarm init --advertise-addr {address}"))?;
    let token = one.run("swarm join-token -q worker")?;
    let own = two.host().address();
    two.run(&format!("swarm join --advertise-addr {own} --token {token} {address}:2377"))?;
    one.run("network create -d weft-swarm:latest --attachable --subnet 10.85.0.0/24 far")?;
    one.container("web", "--network far --network-alias www")?;
    two.container("client", "--network far")?;
    two.finds("client", "www", &[one.address("web", "far")?])?;
    eventually(SOON, "web is reached", || two.ping("client", "web"))?;
    one.ping("web", "client")?;
    let shown = lab.host(2).weft("ps")?.ok()?;
    ensure!(shown.contains("web") && shown.contains("swarm-"), "{shown}");

    one.run("rm -f web")?;
    two.run("rm -f client")?;
    eventually(SOON, "the network can be removed", || one.run("network rm far"))?;
    eventually(SOON, "the cluster's network goes too", || {
        let networks = lab.host(2).weft("network ls")?.ok()?;
        ensure!(!networks.contains("swarm-"), "{networks}");
        Ok(())
    })?;
    for docker in &dockers {
        docker.leaves_nothing()?;
    }
    lab.finish();
    Ok(())
}
