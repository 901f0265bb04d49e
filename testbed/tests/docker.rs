//! Real daemons of Docker, an agent beside each.

use std::time::Duration;

use weft_testbed::{Docker, Lab, eventually};

const SOON: Duration = Duration::from_secs(5);
const NETWORK: &str = "network create -d weft --ipam-driver weft";

/// Hosts in one cluster, each with an agent that was there before the daemon.
fn engines(hosts: u8) -> anyhow::Result<(Lab, Vec<Docker>)> {
    let lab = Lab::cluster(hosts)?;
    let dockers = (1..=hosts).map(|index| Docker::start(&lab, index)).collect::<Result<_, _>>()?;
    Ok((lab, dockers))
}

#[test]
fn containers_of_two_hosts_find_each_other_by_name() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.docker(&format!("{NETWORK} app"))?;
    }
    one.container("web", "--network app")?;
    two.container("client", "--network app --network-alias ca")?;
    let (web, client) = (one.address("web", "app")?, two.address("client", "app")?);
    two.ping("client", &web.to_string())?;
    one.ping("web", &client.to_string())?;
    eventually(SOON, "client is found", || {
        let found = lab.host(1).weft_json("resolve client")?;
        anyhow::ensure!(found.to_string().contains(&client.to_string()), "{found}");
        lab.host(1).weft("resolve ca")?.ok()
    })?;
    lab.finish();
    Ok(())
}
