//! Health and draining of Docker's containers.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_testbed::{Docker, Engine as _, Host, IMAGE, api_call, eventually};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn docker_tells_of_health_and_of_the_end() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in [one, two] {
        docker.create_network("app")?;
    }
    let check = json!({"probe": "engine", "interval": 1000, "timeout": 1000, "rise": 1, "fall": 1});
    let body = json!({"name": "web", "network": "app", "check": check}).to_string();
    let answer = api_call(lab.host(1), "POST", "/v1/services", &body)?;
    ensure!(answer.status == 201, "{answer:?}");

    start(one, "web", &["--health-cmd", "test -e /ok"])?;
    start(two, "bare", &[])?;
    is(lab.host(1), "web", "unhealthy", "unhealthy")?;
    is(lab.host(1), "bare", "unhealthy", "no health check")?;
    for (act, state) in [("touch", "ready"), ("rm", "unhealthy"), ("touch", "ready")] {
        one.run_args(&["exec", "web", act, "/ok"])?;
        is(lab.host(2), "web", state, "")?;
    }

    lab.host(1).weft("drain web --stop")?.ok()?;
    let state = one.run_args(&["inspect", "-f", "{{.State.Running}}", "web"])?;
    ensure!(state == "false", "{state}");
    // What Docker is about to stop gets nothing new; this one goes on all the same.
    two.run_args(&["kill", "-s", "TERM", "bare"])?;
    is(lab.host(1), "bare", "draining", "")?;
    let id = two.run_args(&["inspect", "-f", "{{.Id}}", "bare"])?;
    lab.host(2).weft(&format!("drain {} --undo", &id[..12]))?.ok()?;
    is(lab.host(1), "bare", "unhealthy", "")?;
    lab.finish();
    Ok(())
}

fn start(docker: &Docker, name: &str, options: &[&str]) -> anyhow::Result<()> {
    let run = ["run", "-d", "--name", name, "--network", "app", "--label", "weft.service=web"];
    let often = match options {
        [] => &[][..],
        _ => &["--health-interval", "500ms", "--health-retries", "1"],
    };
    let end = ["--stop-timeout", "1", IMAGE, "sleep", "1000"];
    docker.run_args(&[&run[..], options, often, &end].concat()).map(drop)
}

/// Waits until `host` sees a backend in `state`, for a reason with `words` in it.
fn is(host: &Host, name: &str, state: &str, words: &str) -> anyhow::Result<()> {
    eventually(SOON, &format!("{} sees {name} {state}", host.name()), || {
        let answer = api_call(host, "GET", "/v1/services/web?network=app", "")?;
        let backends = answer.body["backends"].as_array().context("backends")?;
        let backend = backends.iter().find(|backend| backend["name"] == name);
        let backend = backend.with_context(|| format!("no {name}: {}", answer.body))?;
        let reason = backend.get("reason").and_then(Value::as_str).unwrap_or_default();
        ensure!(backend["state"] == state && reason.contains(words), "{backend}");
        Ok(())
    })
}
