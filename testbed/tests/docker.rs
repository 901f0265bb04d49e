//! Real daemons of Docker, an agent beside each.

use std::{net::IpAddr, time::Duration};

use anyhow::ensure;
use weft_testbed::{Docker, Lab, Stop, eventually};

const SOON: Duration = Duration::from_secs(5);
const CREATE: &str = "network create -d weft --ipam-driver weft";

/// Hosts in one cluster, each with an agent that was there before the daemon.
fn engines(hosts: u8) -> anyhow::Result<(Lab, Vec<Docker>)> {
    let lab = Lab::cluster(hosts)?;
    let dockers = (1..=hosts).map(|index| Docker::start(&lab, index)).collect::<Result<_, _>>()?;
    Ok((lab, dockers))
}

/// Waits until `container` resolves `name` to just `expected`.
fn resolves(
    docker: &Docker,
    container: &str,
    name: &str,
    expected: &[IpAddr],
) -> anyhow::Result<()> {
    let mut expected = expected.to_vec();
    expected.sort();
    let what = format!("{container} on {} finds {name}", docker.host().name());
    eventually(SOON, &what, || {
        let found = docker.resolve(container, name)?;
        ensure!(found == expected, "{found:?}, not {expected:?}");
        Ok(())
    })
}

fn does_not_resolve(docker: &Docker, container: &str, name: &str) -> anyhow::Result<()> {
    match docker.resolve(container, name) {
        Ok(found) => anyhow::bail!("{container} finds {name}: {found:?}"),
        Err(_) => Ok(()),
    }
}

/// Docker's own exercise: of four containers, three are on one network and one of these on a second
/// one with the fourth.
#[test]
fn names_reach_as_far_as_their_network_on_one_host_and_across_two() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.docker(&format!("{CREATE} alpine-net"))?;
        docker.docker(&format!("{CREATE} --subnet 10.77.0.0/24 other-net"))?;
    }
    one.container("alpine1", "--network alpine-net")?;
    two.container("alpine2", "--network alpine-net --network-alias second")?;
    two.container("alpine3", "--network other-net --ip 10.77.0.33")?;
    one.container("alpine4", "--network alpine-net --mac-address 02:42:0a:00:00:44")?;
    one.docker("network connect --alias both other-net alpine4")?;

    let [a1, a4] = ["alpine1", "alpine4"].map(|name| one.address(name, "alpine-net"));
    let (a1, a4, a2) = (a1?, a4?, two.address("alpine2", "alpine-net")?);
    let (a3, b4) = (two.address("alpine3", "other-net")?, one.address("alpine4", "other-net")?);
    ensure!(a3.to_string() == "10.77.0.33", "{a3}");
    resolves(one, "alpine1", "alpine2", &[a2])?;
    resolves(one, "alpine1", "second", &[a2])?;
    resolves(one, "alpine1", "alpine4", &[a4])?;
    resolves(two, "alpine2", "alpine1", &[a1])?;
    resolves(two, "alpine2", "alpine4.alpine-net", &[a4])?;
    resolves(two, "alpine3", "alpine4", &[b4])?;
    resolves(two, "alpine3", "both", &[b4])?;
    resolves(one, "alpine4", "alpine3", &[a3])?;
    resolves(one, "alpine4", "alpine1", &[a1])?;
    for (docker, container, target) in [
        (one, "alpine1", "alpine2"),
        (one, "alpine1", "alpine4"),
        (two, "alpine2", "alpine1"),
        (two, "alpine3", "both"),
        (one, "alpine4", "alpine3"),
        (one, "alpine4", "alpine2"),
    ] {
        docker.ping(container, target)?;
    }
    for (docker, container, name) in
        [(one, "alpine1", "alpine3"), (two, "alpine2", "alpine3"), (two, "alpine3", "alpine1")]
    {
        does_not_resolve(docker, container, name)?;
    }
    ensure!(one.ping("alpine1", &a3.to_string()).is_err(), "networks are not apart");
    let mac = one.sh("alpine4", "ip link show eth0")?;
    ensure!(mac.contains("02:42:0a:00:00:44"), "{mac}");

    // Live: the interface and the names go, and the rest stays.
    one.docker("network disconnect other-net alpine4")?;
    eventually(SOON, "both is gone", || does_not_resolve(two, "alpine3", "both"))?;
    resolves(one, "alpine4", "alpine1", &[a1])?;
    ensure!(one.ping("alpine4", &a3.to_string()).is_err(), "still connected");
    one.ping("alpine4", "alpine2")?;

    // A name follows its container.
    two.docker("rename alpine2 renamed")?;
    resolves(one, "alpine1", "renamed", &[a2])?;
    eventually(SOON, "the old name is gone", || does_not_resolve(one, "alpine1", "alpine2"))?;

    for (docker, names) in [(one, "alpine1 alpine4"), (two, "renamed alpine3")] {
        docker.docker(&format!("rm -f {names}"))?;
        docker.docker("network rm alpine-net other-net")?;
        leaves_nothing(docker)?;
    }
    lab.finish();
    Ok(())
}

/// No endpoint, interface or namespace of weft's is left on a host without containers.
fn leaves_nothing(docker: &Docker) -> anyhow::Result<()> {
    let host = docker.host();
    eventually(SOON, &format!("nothing is left on {}", host.name()), || {
        let endpoints = host.weft_json("ps")?;
        let name = host.name();
        let own = endpoints.as_array().into_iter().flatten().filter(|e| e["node"] == name).count();
        let links = host.sh("ip -o link")?;
        let namespaces = host.sh("ls /run/netns")?;
        ensure!(
            own == 0 && !links.contains("wfp") && namespaces.is_empty(),
            "{endpoints} {links} {namespaces}"
        );
        Ok(())
    })
}

#[test]
fn replicas_of_a_scaled_service_are_found_from_anywhere() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.docker(&format!("{CREATE} -o weft.network=shop shop_default"))?;
        docker.docker(&format!("{CREATE} blog_default"))?;
    }
    let (mut web, mut db) = (Vec::new(), Vec::new());
    for (docker, name, service, found) in
        [(one, "shop_web_1", "web", &mut web), (one, "shop_db_1", "db", &mut db)]
    {
        docker.container(name, &compose("shop", service))?;
        found.push(docker.address(name, "shop_default")?);
    }
    for (docker, name) in [(one, "shop_web_2"), (two, "shop_web_3"), (two, "shop_web_4")] {
        docker.container(name, &compose("shop", "web"))?;
        web.push(docker.address(name, "shop_default")?);
    }
    two.container("blog_web_1", &compose("blog", "web"))?;
    for (docker, client) in [(one, "shop_db_1"), (two, "shop_web_4")] {
        resolves(docker, client, "web", &web)?;
        resolves(docker, client, "web.shop", &web)?;
        resolves(docker, client, "tasks.web", &web)?;
        resolves(docker, client, "db", &db)?;
    }
    does_not_resolve(two, "blog_web_1", "db")?;
    resolves(two, "blog_web_1", "web", &[two.address("blog_web_1", "blog_default")?])?;

    one.docker("kill shop_web_1")?;
    resolves(two, "shop_web_4", "web", &web[1..])?;
    lab.finish();
    Ok(())
}

/// What compose gives a container.
fn compose(project: &str, service: &str) -> String {
    format!(
        "--network {project}_default --network-alias {service} --label com.docker.compose.project={project} --label com.docker.compose.service={service}"
    )
}

#[test]
fn what_a_killed_daemon_lost_is_collected_and_its_containers_come_back() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.docker(&format!("{CREATE} app"))?;
    }
    one.container("web", "--network app --restart always")?;
    one.container("gone", "--network app")?;
    two.container("client", "--network app")?;
    two.ping("client", "web")?;

    one.stop_daemon("KILL")?;
    one.start_daemon(&[])?;
    eventually(Duration::from_secs(20), "web is back", || two.ping("client", "web"))?;
    eventually(Duration::from_secs(20), "gone is gone", || {
        does_not_resolve(two, "client", "gone")
    })?;
    eventually(SOON, "one endpoint is left", || {
        let endpoints = lab.host(1).weft_json("ps")?;
        let own = endpoints.as_array().into_iter().flatten().filter(|e| e["node"] == "h1").count();
        ensure!(own == 1, "{endpoints}");
        Ok(())
    })?;

    // The agent too: containers go on, and what Docker asks for meanwhile is done afterwards.
    lab.host(1).stop_agent(Stop::Killed)?;
    two.ping("client", &one.address("web", "app")?.to_string())?;
    lab.host(1).start_agent()?;
    resolves(one, "web", "client", &[two.address("client", "app")?])?;
    one.container("late", "--network app")?;
    two.ping("client", "late")?;
    lab.host(1).stop_agent(Stop::Gracefully)?;
    // Docker's own resolver has the sandbox again.
    ensure!(one.resolve("web", "late")?.len() == 1, "no resolver is left");
    lab.host(1).start_agent()?;
    resolves(one, "web", "client", &[two.address("client", "app")?])?;
    lab.finish();
    Ok(())
}
