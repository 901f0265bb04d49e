//! Checks of services by what podman itself finds of its containers.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use weft_testbed::{Engine as _, Host, Lab, Podman, eventually};

const PLAIN: &str = include_str!("../../deploy/cni/weft.conflist");
const SOON: Duration = Duration::from_secs(20);
/// Without systemd podman has no clock of its own for its checks: weft asks at its own.
const CHECK: &str = "--health-interval disable --health-cmd";

/// Debian's podman of this system, whose containers are attached as podman's driver leaves them.
#[test]
fn podmans_own_check_of_a_container_decides() -> anyhow::Result<()> {
    let lab = lab()?;
    lab.create_network("db --subnet 10.41.0.0/24")?;
    let db = PLAIN.replace("\"app\"", "\"db\"");
    let podman = Podman::start(&lab, 1, &[("db.conflist", &db)])?;
    podman.install()?;
    for (name, options) in [("bare", String::new()), ("web", format!("{CHECK} /check"))] {
        podman.container(name, &format!("--network db {options}"))?;
        let found = podman.run(&format!("inspect -f {{{{.Id}}}}/{{{{.State.Pid}}}} {name}"))?;
        let (id, pid) = found.trim().split_once('/').context("no id")?;
        let labels = format!("--label weft.engine=podman --label weft.engine.container={id}");
        let options = format!("--network app --name {name} --service web {labels}");
        lab.host(1).weft(&format!("attach {pid} {options}"))?.ok()?;
    }
    decides(&lab, &podman)
}

/// Podman 5 of Debian 13, from a tree beside this system: `make test-engines-next`.
#[test]
#[ignore = "needs WEFT_ENGINES_TREE, which `make test-engines-next` makes"]
fn netavarks_containers_are_checked_by_podman() -> anyhow::Result<()> {
    let tree = std::env::var_os("WEFT_ENGINES_TREE").context("WEFT_ENGINES_TREE is not set")?;
    let lab = lab()?;
    let podman = Podman::start_in(&PathBuf::from(tree), &lab, 1)?;
    podman.install()?;
    podman.run("network create -d weft app")?;
    podman.container("web", &format!("--network app {CHECK} /check"))?;
    podman.container("bare", "--network app --network-alias web")?;
    decides(&lab, &podman)
}

fn lab() -> anyhow::Result<Lab> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let check = "--check engine --check-interval 300ms --check-rise 1 --check-fall 1";
    lab.host(2).weft(&format!("service create web --network app --vip none {check}"))?.ok()?;
    Ok(lab)
}

/// Both hosts follow what the check of `web` finds; `bare` has none, and gets nothing.
fn decides(lab: &Lab, podman: &Podman) -> anyhow::Result<()> {
    for host in lab.hosts() {
        is(host, "web", "unhealthy", "ended with")?;
        is(host, "bare", "unhealthy", "no defined healthcheck")?;
    }
    let script =
        |status| format!("printf '#!/bin/sh\\nexit {status}\\n' >/check; chmod 755 /check");
    for (status, state) in [(0, "ready"), (1, "unhealthy"), (0, "ready")] {
        podman.sh("web", &script(status))?;
        for host in lab.hosts() {
            is(host, "web", state, "")?;
        }
    }
    podman.run("pause web")?;
    is(lab.host(2), "web", "unhealthy", "")?;
    podman.run("unpause web")?;
    is(lab.host(2), "web", "ready", "")
}

/// Waits until `host` sees a backend in `state`, for a reason with `words` in it.
fn is(host: &Host, name: &str, state: &str, words: &str) -> anyhow::Result<()> {
    eventually(SOON, &format!("{} sees {name} {state}", host.name()), || {
        let found = host.weft_json("service inspect web")?;
        let backends = found[0]["backends"].as_array().context("no backends")?;
        let backend = backends.iter().find(|backend| backend["name"] == name);
        let backend = backend.with_context(|| format!("no {name}: {found}"))?;
        let reason = backend.get("reason").and_then(Value::as_str).unwrap_or_default();
        ensure!(backend["state"] == state && reason.contains(words), "{backend}");
        Ok::<_, anyhow::Error>(())
    })
}
