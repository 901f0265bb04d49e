//! Real daemons of Docker, an agent beside each.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::ensure;
use weft_testbed::{Docker, Engine as _, Host, Lab, Stop, eventually, in_network_namespace};

const SOON: Duration = Duration::from_secs(5);
const CREATE: &str = "network create -d weft --ipam-driver weft";

/// Hosts in one cluster, each with an agent that was there before the daemon.
fn engines(hosts: u8) -> anyhow::Result<(Lab, Vec<Docker>)> {
    let lab = Lab::cluster(hosts)?;
    let dockers = (1..=hosts).map(|index| Docker::start(&lab, index)).collect::<Result<_, _>>()?;
    Ok((lab, dockers))
}

/// The exercise of Docker's documentation: of four containers, three are on one network and one of
/// these on a second one with the fourth.
#[test]
fn names_reach_as_far_as_their_network_on_one_host_and_across_three() -> anyhow::Result<()> {
    let (lab, dockers) = engines(3)?;
    let [one, two, three] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.run(&format!("{CREATE} alpine-net"))?;
        docker.run(&format!("{CREATE} --subnet 10.77.0.0/24 other-net"))?;
    }
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
fn replicas_of_a_scaled_service_are_found_from_anywhere() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.run(&format!("{CREATE} -o weft.network=shop shop_default"))?;
        docker.run(&format!("{CREATE} blog_default"))?;
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
        docker.finds(client, "web", &web)?;
        docker.finds(client, "web.shop", &web)?;
        docker.finds(client, "tasks.web", &web)?;
        docker.finds(client, "db", &db)?;
    }
    two.misses("blog_web_1", "db")?;
    two.finds("blog_web_1", "web", &[two.address("blog_web_1", "blog_default")?])?;

    one.run("kill shop_web_1")?;
    two.finds("shop_web_4", "web", &web[1..])?;
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
        docker.run(&format!("{CREATE} app"))?;
    }
    one.container("web", "--network app --restart always")?;
    one.container("gone", "--network app")?;
    two.container("client", "--network app")?;
    two.ping("client", "web")?;

    one.stop_daemon("KILL")?;
    one.start_daemon(&[])?;
    eventually(Duration::from_secs(20), "web is back", || two.ping("client", "web"))?;
    eventually(Duration::from_secs(20), "gone is gone", || two.misses("client", "gone"))?;
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
    one.finds("web", "client", &[two.address("client", "app")?])?;
    one.container("late", "--network app")?;
    two.ping("client", "late")?;
    lab.host(1).stop_agent(Stop::Gracefully)?;
    // Docker's own resolver has the sandbox again.
    ensure!(one.resolve("web", "late")?.len() == 1, "no resolver is left");
    lab.host(1).start_agent()?;
    one.finds("web", "client", &[two.address("client", "app")?])?;
    lab.finish();
    Ok(())
}

/// What users of Docker give to `network create` and `run` means here what it means there.
#[test]
fn options_of_docker_mean_what_they_say() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    let span = "--subnet 10.78.0.0/24 --gateway 10.78.0.254 --ip-range 10.78.0.128/29";
    let aux = "--aux-address nas=10.78.0.129 -o com.docker.network.driver.mtu=1300";
    for docker in &dockers {
        docker.run(&format!("{CREATE} {span} {aux} -o weft.network=app ours"))?;
        docker.run(&format!("{CREATE} --internal --subnet 10.79.0.0/24 inner"))?;
        docker.run(&format!("{CREATE} --ipv6 --subnet 10.80.0.0/24 --subnet fd00:80::/64 dual"))?;
        docker.run(&format!("{CREATE} --subnet 10.81.0.0/24 -o weft.gateway=true out"))?;
        docker.run(&format!("{CREATE} --subnet 10.82.0.0/24 -o encrypted sealed"))?;
    }
    let refused = |docker: &Docker, line: &str, words: &[&str]| -> anyhow::Result<()> {
        let ran = docker.try_run(line)?;
        ensure!(ran.code != 0, "{ran}");
        for word in words {
            ensure!(ran.stderr.contains(word), "the error lacks {word:?}: {ran}");
        }
        Ok(())
    };
    refused(two, "network create -d weft bare", &["--ipam-driver weft"])?;
    refused(
        two,
        &format!("{CREATE} -o weft.network=app other --subnet 10.83.0.0/24"),
        &["10.78.0.0/24"],
    )?;
    refused(two, &format!("{CREATE} -o weft.network=inner open"), &["--internal"])?;

    // Docker does not tell the driver a network's name: what does not fit is seen a moment later.
    lab.create_network("other --subnet 10.86.0.0/24")?;
    two.run(&format!("{CREATE} --subnet 10.87.0.0/24 other"))?;
    eventually(SOON, "the status says so", || {
        let status = lab.host(2).weft("status")?.ok()?;
        ensure!(status.contains("--subnet 10.86.0.0/24"), "{status}");
        Ok(())
    })?;
    refused(two, "run --rm --network other weft-test true", &["--subnet 10.86.0.0/24"])?;
    two.run("network rm other")?;
    let status = lab.host(2).weft("status")?.ok()?;
    ensure!(!status.contains("10.86.0.0/24"), "{status}");

    // Range, reserved address, gateway and MTU.
    for docker in &dockers {
        let name = format!("a-{}", docker.host().name());
        docker.container(&name, "--network ours -p 8090:80")?;
        let ip = docker.address(&name, "ours")?.to_string();
        let last: u8 = ip.strip_prefix("10.78.0.").and_then(|n| n.parse().ok()).unwrap_or(0);
        ensure!((128..136).contains(&last) && last != 129, "{ip}");
        let link = docker.sh(&name, "ip -o link show eth0")?;
        ensure!(link.contains("mtu 1300"), "{link}");
    }
    one.ping("a-h1", "a-h2")?;
    refused(one, "run --rm --network ours --ip 10.78.0.129 weft-test true", &["10.78.0.129"])?;
    refused(
        two,
        &format!("run --rm --network ours --ip {} weft-test true", one.address("a-h1", "ours")?),
        &["a-h1"],
    )?;
    refused(one, "network rm ours", &["endpoint"])?;

    // Docker publishes ports and leads out, unless weft's gateway is asked for.
    one.run_args(&[
        "exec",
        "-d",
        "a-h1",
        "sh",
        "-c",
        "mkdir -p /www && echo hello >/www/x && httpd -f -p 80 -h /www",
    ])?;
    let published = SocketAddr::new(one.host().address(), 8090);
    eventually(SOON, "the port answers", || {
        let said = fetch(two.host(), published)?;
        ensure!(said.contains("hello"), "{said}");
        Ok(())
    })?;
    let router = lab.router().to_string();
    one.ping("a-h1", &router)?;
    one.container("o1", "--network out")?;
    let routes = one.sh("o1", "ip route")?;
    ensure!(
        routes.contains("default via 10.81.0.1 dev eth0") && !routes.contains("eth1"),
        "{routes}"
    );
    one.ping("o1", &router)?;
    refused(one, "run --rm --network out -p 8091:80 weft-test true", &["80", "weft.gateway"])?;

    // An internal network leads nowhere, and both families reach the other host.
    for (docker, name) in [(one, "i1"), (two, "i2")] {
        docker.container(name, "--network inner")?;
        docker.container(&name.replace('i', "d"), "--network dual")?;
        docker.container(&name.replace('i', "s"), "--network sealed")?;
    }
    one.ping("i1", "i2")?;
    ensure!(one.ping("i1", &router).is_err(), "an internal network leads out");
    let template = "{{.NetworkSettings.Networks.dual.GlobalIPv6Address}}";
    let v6 = two.run_args(&["inspect", "-f", template, "d2"])?;
    ensure!(v6.starts_with("fd00:80::"), "{v6}");
    eventually(SOON, "IPv6 reaches the other host", || one.ping("d1", &v6))?;
    let mut both = vec![two.address("d2", "dual")?, v6.parse()?];
    both.sort();
    one.finds("d1", "d2", &both)?;
    eventually(SOON, "the sealed network carries", || one.ping("s1", "s2"))?;
    lab.finish();
    Ok(())
}

#[test]
fn one_command_makes_a_network_in_every_docker_and_one_removes_it() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
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

#[test]
fn containers_that_outlive_their_daemon_keep_their_names() -> anyhow::Result<()> {
    let (lab, dockers) = engines(1)?;
    let [docker] = &dockers[..] else { unreachable!() };
    docker.stop_daemon("TERM")?;
    docker.start_daemon(&["--live-restore"])?;
    docker.run(&format!("{CREATE} app"))?;
    docker.container("web", "--network app --network-alias www")?;
    let web = docker.address("web", "app")?.to_string();
    let is_named = |name: &str| {
        eventually(SOON, name, || {
            let found = lab.host(1).weft_json(&format!("resolve {name}"))?;
            ensure!(found.to_string().contains(&web), "{found}");
            Ok(())
        })
    };
    is_named("www")?;
    docker.stop_daemon("KILL")?;
    lab.host(1).stop_agent(Stop::Killed)?;
    lab.host(1).start_agent()?;
    is_named("www")?;
    docker.start_daemon(&["--live-restore"])?;
    docker.container("second", "--network app")?;
    docker.ping("second", "www")?;
    docker.ping("web", "second")?;
    docker.run("rm -f web second")?;
    docker.leaves_nothing()?;
    lab.finish();
    Ok(())
}

/// In a swarm Docker gives out addresses and names; the packets go by weft.
#[test]
fn a_network_of_a_swarm_reaches_all_its_nodes() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
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

/// Fetches a page from within a host.
fn fetch(host: &Host, server: SocketAddr) -> anyhow::Result<String> {
    in_network_namespace(&host.namespace()?, || {
        let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET /x HTTP/1.0\r\n\r\n")?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said)
    })
}

#[test]
fn a_host_that_lost_its_power_comes_back_with_its_containers() -> anyhow::Result<()> {
    let (lab, dockers) = engines(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.run(&format!("{CREATE} app"))?;
    }
    one.container("web", "--network app --network-alias www --restart always")?;
    one.container("gone", "--network app")?;
    two.container("client", "--network app")?;
    two.finds("client", "www", &[one.address("web", "app")?])?;

    lab.host(1).power_off();
    eventually(Duration::from_secs(7), "its names are withheld", || two.misses("client", "www"))?;
    lab.power_on(1)?;
    lab.host(1).start_agent()?;
    one.start_daemon(&[])?;
    let web = eventually(Duration::from_secs(10), "web runs", || one.address("web", "app"))?;
    two.finds("client", "www", &[web])?;
    two.ping("client", "web")?;
    two.misses("client", "gone")?;
    lab.finish();
    Ok(())
}
