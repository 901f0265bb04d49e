//! Real daemons of Docker, an agent beside each.

use std::time::Duration;

use anyhow::ensure;
use weft_testbed::{Docker, Engine as _, Lab, eventually};

const SOON: Duration = Duration::from_secs(20);

/// The exercise of Docker's documentation: of four containers, three are on one network and one of
/// these on a second one with the fourth.
#[test]
fn names_reach_as_far_as_their_network_on_one_host_and_across_three() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(3)?;
    let [one, two, three] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("alpine-net")?;
        docker.create_network("--subnet 10.77.0.0/24 other-net")?;
    }
    // What Docker does to bridges in the host's own namespace does not reach weft's.
    let guarded = "iptables -S FORWARD; cat /proc/sys/net/bridge/bridge-nf-call-iptables";
    let guarded = one.host().sh(guarded)?;
    ensure!(guarded.contains("-P FORWARD DROP") && guarded.ends_with('1'), "{guarded}");
    for placed in [[one; 4], [one, two, two, three], [three, one, two, one]] {
        tell_networks_apart(&lab, placed)?;
    }
    lab.finish();
    Ok(())
}

/// Takes the exercise through with a container on each of the hosts `placed`.
fn tell_networks_apart(lab: &Lab, placed: [&Docker; 4]) -> anyhow::Result<()> {
    let [one, two, three, four] = placed;
    one.container("alpine1", "--network alpine-net")?;
    two.container("alpine2", "--network alpine-net --network-alias second")?;
    three.container("alpine3", "--network other-net --ip 10.77.0.33")?;
    four.container("alpine4", "--network alpine-net --mac-address 02:42:0a:00:00:44")?;
    four.run("network connect --alias both other-net alpine4")?;

    let (a1, a2) = (one.address("alpine1", "alpine-net")?, two.address("alpine2", "alpine-net")?);
    let (a3, a4) = (three.address("alpine3", "other-net")?, four.address("alpine4", "alpine-net")?);
    let b4 = four.address("alpine4", "other-net")?;
    ensure!(a3.to_string() == "10.77.0.33", "{a3}");
    let router = lab.router().to_string();
    for (docker, container, names) in [
        (one, "alpine1", &[("alpine2", a2), ("second", a2), ("alpine4", a4)][..]),
        (two, "alpine2", &[("alpine1", a1), ("alpine4.alpine-net", a4)]),
        (three, "alpine3", &[("alpine4", b4), ("both", b4)]),
        (four, "alpine4", &[("alpine1", a1), ("alpine2", a2), ("alpine3", a3)]),
    ] {
        for (name, address) in names {
            docker.finds(container, name, &[*address])?;
            docker.ping(container, name)?;
        }
        // Each has a way out.
        docker.ping(container, &router)?;
    }
    for (docker, container, name) in
        [(one, "alpine1", "alpine3"), (two, "alpine2", "alpine3"), (three, "alpine3", "alpine1")]
    {
        docker.misses(container, name)?;
    }
    ensure!(one.ping("alpine1", &a3.to_string()).is_err(), "networks are not apart");
    ensure!(three.ping("alpine3", &a1.to_string()).is_err(), "networks are not apart");
    let mac = four.sh("alpine4", "ip link show eth0")?;
    ensure!(mac.contains("02:42:0a:00:00:44"), "{mac}");

    // Live: the interface and the names go, and the rest stays.
    four.run("network disconnect other-net alpine4")?;
    three.loses("alpine3", "both")?;
    four.finds("alpine4", "alpine1", &[a1])?;
    ensure!(four.ping("alpine4", &a3.to_string()).is_err(), "still connected");
    four.ping("alpine4", "alpine2")?;

    // A name follows its container.
    two.run("rename alpine2 renamed")?;
    one.finds("alpine1", "renamed", &[a2])?;
    one.loses("alpine1", "alpine2")?;

    for (docker, name) in placed.into_iter().zip(["alpine1", "renamed", "alpine3", "alpine4"]) {
        docker.run(&format!("rm -f {name}"))?;
    }
    placed.into_iter().try_for_each(|docker| docker.leaves_nothing())
}

#[test]
fn a_name_goes_with_its_container_and_comes_back_with_it() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("app")?;
    }
    one.container("web", "--network app --network-alias www")?;
    two.container("client", "--network app")?;
    for ends in ["stop -t 0 web", "kill web"] {
        two.finds("client", "www", &[one.address("web", "app")?])?;
        one.run(ends)?;
        for name in ["web", "www"] {
            two.loses("client", name)?;
        }
        one.leaves_nothing()?;
        one.run("start web")?;
        two.finds("client", "web", &[one.address("web", "app")?])?;
        two.ping("client", "www")?;
    }
    one.run("restart -t 0 web")?;
    two.finds("client", "www", &[one.address("web", "app")?])?;
    two.ping("client", "web")?;
    // A container that ends by itself is none that was stopped.
    one.run("run --rm --name once --network app weft-test true")?;
    two.loses("client", "once")?;
    lab.finish();
    Ok(())
}

#[test]
fn one_command_makes_a_network_in_every_docker_and_one_removes_it() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    lab.host(1).weft("docker network create app --subnet 10.84.0.0/24 --internal")?.ok()?;
    one.container("web", "--network app")?;
    eventually(SOON, "the other host has it", || two.run("network inspect app"))?;
    let shown = two.run("network inspect app")?;
    ensure!(shown.contains("10.84.0.0/24") && shown.contains("\"Internal\": true"), "{shown}");
    two.container("client", "--network app")?;
    two.ping("client", "web")?;
    lab.host(2).weft("network rm app")?.refused(1, &["web on h1", "client on h2"])?;
    for (docker, name) in [(one, "web"), (two, "client")] {
        docker.run(&format!("rm -f {name}"))?;
    }
    eventually(SOON, "no container is left", || lab.host(2).weft("network rm app")?.ok())?;
    for docker in &dockers {
        eventually(SOON, "Docker has it no more", || {
            let networks = docker.run("network ls --format {{.Name}}")?;
            ensure!(!networks.lines().any(|name| name == "app"), "{networks}");
            Ok(())
        })?;
    }
    lab.finish();
    Ok(())
}
