//! Docker in swarm mode, with the plugin that it runs itself.

use std::{fs, net::IpAddr, time::Duration};

use anyhow::ensure;
use weft_testbed::{Docker, Engine as _, IMAGE, Lab, eventually};

const SOON: Duration = Duration::from_secs(20);
/// For what swarm does by its own pace.
const PATIENCE: Duration = Duration::from_secs(30);

/// In a swarm Docker gives out addresses and names; the packets go by weft.
#[test]
fn a_network_of_a_swarm_reaches_all_its_nodes() -> anyhow::Result<()> {
    let (lab, dockers) = swarm(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
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

/// A swarm, of which each node has the plugin; the first manages it.
fn swarm(hosts: u8) -> anyhow::Result<(Lab, Vec<Docker>)> {
    let (lab, dockers) = Docker::on_cluster(hosts)?;
    let plugin = dockers[0].build_plugin()?;
    for docker in &dockers {
        docker.run(&format!("plugin create weft-swarm {plugin}"))?;
        docker.run("plugin enable weft-swarm")?;
    }
    let manager = dockers[0].host().address();
    dockers[0].run(&format!("swarm init --advertise-addr {manager}"))?;
    let token = dockers[0].run("swarm join-token -q worker")?;
    for docker in &dockers[1..] {
        let own = docker.host().address();
        docker.run(&format!("swarm join --advertise-addr {own} --token {token} {manager}:2377"))?;
    }
    Ok((lab, dockers))
}

/// Whatever the mode, and although this kernel may have no IPVS for virtual addresses.
#[test]
fn services_and_stacks_of_a_swarm_are_found_with_all_their_tasks() -> anyhow::Result<()> {
    let (lab, dockers) = swarm(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    one.run("network create -d weft-swarm:latest --attachable --subnet 10.85.0.0/24 far")?;
    one.container("near-client", "--network far")?;
    two.container("far-client", "--network far")?;
    for mode in ["vip", "dnsrr"] {
        let options = format!("--name {mode} --endpoint-mode {mode} --replicas 4 --network far");
        one.run(&format!(
            "service create --detach --init --no-resolve-image {options} {IMAGE} sleep 1000000"
        ))?;
    }
    let stack = lab.dir().join("stack.yaml");
    fs::write(&stack, STACK)?;
    one.run(&format!("stack deploy --resolve-image never -c {} shop", stack.display()))?;

    for (service, network, replicas) in
        [("vip", "far", 4), ("dnsrr", "far", 4), ("shop_web", "far", 2), ("shop_db", "far", 1)]
    {
        let tasks = tasks(&dockers, service, network, replicas)?;
        let name = service.trim_start_matches("shop_");
        for (docker, client) in [(one, "near-client"), (two, "far-client")] {
            for name in [name, service, &format!("tasks.{service}")] {
                docker.finds(client, name, &tasks)?;
            }
            for task in &tasks {
                let what = format!("{client} reaches {task} of {service}");
                eventually(SOON, &what, || docker.ping(client, &task.to_string()))?;
            }
        }
    }
    // A port of each task's own host.
    let publish = "--publish mode=host,published=8093,target=80";
    one.run(&format!(
        "service create --detach --init --no-resolve-image --name port --mode global --network far {publish} {IMAGE} httpd -f -p 80 -h /etc"
    ))?;
    for asked in &dockers {
        let page = format!("wget -qO- http://{}:8093/nsswitch.conf", asked.host().address());
        eventually(PATIENCE, "the port answers", || two.sh("far-client", &page))?;
    }

    let vip = tasks(&dockers, "vip", "far", 4)?;
    one.run("service scale --detach vip=2")?;
    let fewer = tasks(&dockers, "vip", "far", 2)?;
    ensure!(fewer.iter().all(|task| vip.contains(task)), "{fewer:?} of {vip:?}");
    two.finds("far-client", "vip", &fewer)?;

    one.run("stack rm shop")?;
    one.run("service rm vip dnsrr port")?;
    one.run("rm -f near-client")?;
    two.run("rm -f far-client")?;
    eventually(PATIENCE, "the network can be removed", || one.run("network rm far"))?;
    for docker in &dockers {
        eventually(PATIENCE, "the tasks go", || docker.leaves_nothing())?;
    }
    lab.finish();
    Ok(())
}

const STACK: &str = "
version: '3.7'
services:
  web: {image: weft-test, command: sleep 1000000, init: true, deploy: {replicas: 2}}
  db: {image: weft-test, command: sleep 1000000, init: true}
networks: {default: {name: far, external: true}}
";

/// The addresses in `network` of a service's tasks, when there are `replicas` that run.
fn tasks(
    dockers: &[Docker],
    service: &str,
    network: &str,
    replicas: usize,
) -> anyhow::Result<Vec<IpAddr>> {
    eventually(PATIENCE, &format!("{service} has {replicas} tasks"), || {
        let mut found = Vec::new();
        for docker in dockers {
            let filter = format!("label=com.docker.swarm.service.name={service}");
            let listed = docker.run_args(&["ps", "--filter", &filter, "--format", "{{.Names}}"])?;
            for name in listed.lines() {
                found.push(docker.address(name, network)?);
            }
        }
        ensure!(found.len() == replicas, "{found:?}");
        Ok(found)
    })
}
