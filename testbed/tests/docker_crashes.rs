//! Daemons, agents and hosts that end before they should, with Docker's containers on them.

use std::{net::IpAddr, thread, time::Duration};

use anyhow::ensure;
use weft_testbed::{Docker, Engine as _, PingStream, Stop, eventually};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn what_a_killed_daemon_lost_is_collected_and_its_containers_come_back() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("app")?;
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

#[test]
fn containers_that_outlive_their_daemon_keep_their_names() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(1)?;
    let [docker] = &dockers[..] else { unreachable!() };
    docker.stop_daemon("TERM")?;
    docker.start_daemon(&["--live-restore"])?;
    docker.create_network("app")?;
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

#[test]
fn a_host_that_lost_its_power_comes_back_with_its_containers() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("app")?;
    }
    one.container("web", "--network app --network-alias www --restart always")?;
    one.container("gone", "--network app")?;
    two.container("client", "--network app")?;
    two.finds("client", "www", &[one.address("web", "app")?])?;

    lab.host(1).power_off();
    eventually(SOON, "its names are withheld", || two.misses("client", "www"))?;
    lab.power_on(1)?;
    lab.host(1).start_agent()?;
    one.start_daemon(&[])?;
    let web = eventually(SOON, "web runs", || one.address("web", "app"))?;
    two.finds("client", "www", &[web])?;
    two.ping("client", "web")?;
    two.misses("client", "gone")?;
    lab.finish();
    Ok(())
}

#[test]
fn without_its_agent_a_host_has_dockers_own_names_at_once() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("app")?;
    }
    one.container("web", "--network app")?;
    one.container("near", "--network app --network-alias neighbour")?;
    two.container("far", "--network app")?;
    let (near, far) = (one.address("near", "app")?, two.address("far", "app")?);
    for how in [Stop::Killed, Stop::Gracefully] {
        one.finds("web", "far", &[far])?;
        lab.host(1).stop_agent(how)?;
        // The rules went with the process: there is nothing to wait for.
        for name in ["near", "neighbour"] {
            let found = one.resolve("web", name)?;
            ensure!(found == [near], "{name} is {found:?}");
        }
        one.misses("web", "far")?;
        let rules = one.sandbox_sh("web", "nft list tables")?;
        ensure!(!rules.contains("weft_dns"), "{rules}");
        lab.host(1).start_agent()?;
    }
    one.finds("web", "far", &[far])?;
    let rules = one.sandbox_sh("web", "nft list tables")?;
    ensure!(rules.contains("weft_dns"), "{rules}");
    lab.finish();
    Ok(())
}

#[test]
fn a_daemon_that_is_restarted_has_its_networks_and_gives_its_containers_back() -> anyhow::Result<()>
{
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("--subnet 10.40.0.0/24 app")?;
    }
    one.container("web", "--network app --network-alias www --restart always --ip 10.40.0.77")?;
    one.container("gone", "--network app")?;
    two.container("client", "--network app")?;
    let web: IpAddr = "10.40.0.77".parse()?;
    two.finds("client", "www", &[web])?;
    one.stop_daemon("TERM")?;
    for name in ["www", "gone"] {
        two.loses("client", name)?;
    }
    one.start_daemon(&[])?;
    two.finds("client", "www", &[web])?;
    eventually(SOON, "web answers", || two.ping("client", "web"))?;
    two.misses("client", "gone")?;
    one.run("start gone")?;
    two.finds("client", "gone", &[one.address("gone", "app")?])?;
    lab.finish();
    Ok(())
}

#[test]
fn docker_waits_for_an_agent_that_comes_back_and_packets_never_do() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("app")?;
    }
    one.container("web", "--network app")?;
    two.container("client", "--network app")?;
    let web = one.address("web", "app")?;
    eventually(SOON, "web is reached", || two.ping("client", "web"))?;
    let pings = PingStream::start(&two.process("client")?, web, Duration::from_millis(5))?;
    let host = one.host();
    for (how, name) in [(Stop::Killed, "late1"), (Stop::Gracefully, "late2")] {
        host.stop_agent(how)?;
        let sockets = host.sh("ls /run/docker/plugins")?;
        let left = sockets.lines().any(|name| name == "weft.sock");
        ensure!(left == matches!(how, Stop::Killed), "after {how:?}: {sockets}");
        let vain = || one.log_tail(1000).matches("Unable to connect to plugin").count();
        let before = vain();
        // Docker has asked in vain when the agent comes.
        thread::scope(|scope| -> anyhow::Result<()> {
            let started = scope.spawn(|| one.container(name, "--network app"));
            eventually(SOON, "Docker asks", || {
                ensure!(vain() > before, "not yet");
                Ok(())
            })?;
            host.start_agent()?;
            started.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        two.finds("client", name, &[one.address(name, "app")?])?;
        two.ping("client", name)?;
    }
    let summary = pings.stop()?;
    ensure!(summary.lost() == 0, "{summary:?}");

    // For longer Docker does not wait. Nothing is left of what it gave up.
    host.stop_agent(Stop::Killed)?;
    one.try_run("run --name never --network app weft-test true")?.refused(125, &["weft"])?;
    host.start_agent()?;
    one.run("rm -f never web late1 late2")?;
    one.leaves_nothing()?;
    one.container("again", "--network app")?;
    two.finds("client", "again", &[one.address("again", "app")?])?;
    lab.finish();
    Ok(())
}

#[test]
fn a_host_without_its_cable_is_withheld_and_is_back_with_it() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("app")?;
        docker.container(docker.host().name(), "--network app --network-alias all")?;
    }
    let (h1, h2) = (one.address("h1", "app")?, two.address("h2", "app")?);
    one.finds("h1", "all", &[h1, h2])?;
    two.finds("h2", "all", &[h1, h2])?;
    lab.cut(1)?;
    eventually(Duration::from_secs(7), "the other host is withheld", || {
        ensure!(one.resolve("h1", "all")? == [h1], "h1 still has h2");
        ensure!(two.resolve("h2", "all")? == [h2], "h2 still has h1");
        Ok(())
    })?;
    lab.mend(1)?;
    one.finds("h1", "all", &[h1, h2])?;
    two.finds("h2", "all", &[h1, h2])?;
    two.ping("h2", "h1")?;
    lab.finish();
    Ok(())
}
