//! What `deploy/examples` tells people to do, done as it stands there. `deploy/deps.sh web` installs
//! the programs.

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use weft_testbed::{Host, Lab, eventually};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn the_web_example_answers_on_each_of_three_hosts_from_all_of_them() -> anyhow::Result<()> {
    let readme = fs::read_to_string(example("web/README.md"))?;
    let blocks = blocks(&readme);
    let [once, each, dig] = &blocks[..] else { anyhow::bail!("{} blocks", blocks.len()) };
    let lab = Lab::cluster(3)?;
    for host in lab.hosts() {
        // What a host of its own has, and these three have together.
        host.sh("mkdir -p /var/lib/nginx
             for dir in /var/www/html /var/log/nginx; do mount -t tmpfs tmpfs $dir; done
             hostname >/var/www/html/index.html")?;
    }
    lab.host(1).sh(once)?;
    for host in lab.hosts() {
        eventually(SOON, "the host knows the network", || host.weft("network inspect app")?.ok())?;
        host.sh(each)?;
    }
    let all: BTreeSet<String> = ["h1", "h2", "h3"].map(str::to_owned).into();
    for host in lab.hosts() {
        for from in lab.hosts() {
            let url = format!("http://{}:8080/", host.address());
            eventually(SOON, &format!("{url} answers {} from all", from.name()), || {
                let seen = (0..20).map(|_| get(from, &url)).collect::<anyhow::Result<_>>();
                let seen: BTreeSet<String> = seen?;
                ensure!(seen == all, "{seen:?}");
                Ok::<_, anyhow::Error>(())
            })?;
        }
    }

    let client = lab.host(2).container("client")?;
    client.attach("app", "")?;
    let targets = eventually(SOON, "the records name three ports", || {
        let said = client.sh(dig)?;
        let answers = said.lines().filter(|line| !line.starts_with(';') && line.contains("SRV"));
        let targets: Vec<String> =
            answers.filter_map(|line| line.split_whitespace().last()).map(str::to_owned).collect();
        ensure!(targets.len() == 3, "{said}");
        ensure!(said.lines().filter(|line| line.contains("SRV\t0 1 80 ")).count() == 3, "{said}");
        Ok::<_, anyhow::Error>(targets)
    })?;
    let own: BTreeSet<IpAddr> = client.resolve("tasks.web")?.into_iter().collect();
    let named = targets.iter().map(|name| client.resolve(name));
    let named: Vec<Vec<IpAddr>> = named.collect::<anyhow::Result<_>>()?;
    ensure!(own.len() == 3 && named.into_iter().flatten().collect::<BTreeSet<_>>() == own);
    let vips = client.resolve("web")?;
    ensure!(vips.len() == 1 && !own.contains(&vips[0]), "{vips:?}");

    lab.host(3).weft("drain web-h3 --stop")?.ok()?;
    let rest: BTreeSet<String> = ["h1", "h2"].map(str::to_owned).into();
    for _ in 0..20 {
        let name = get(lab.host(3), &format!("http://{}:8080/", lab.host(3).address()))?;
        ensure!(rest.contains(&name), "{name}");
    }
    lab.finish();
    Ok(())
}

/// Traefik is in no package: what can be said without it is that its files are of the form that its
/// documentation gives, and name what the web example makes.
#[test]
fn the_traefik_example_is_of_the_documented_form() -> anyhow::Result<()> {
    let main = paths(&fs::read_to_string(example("traefik/traefik.yml"))?);
    ensure!(
        main == ["entryPoints.web.address=:8082", "providers.file.filename=dynamic.yml"],
        "{main:?}"
    );
    let dynamic = paths(&fs::read_to_string(example("traefik/dynamic.yml"))?);
    let expected = [
        "http.routers.web.entryPoints.-=web",
        "http.routers.web.rule=PathPrefix(`/`)",
        "http.routers.web.service=web",
        "http.services.web.loadBalancer.servers.-.url=http://web.app.weft.internal",
    ];
    ensure!(dynamic == expected, "{dynamic:?}");
    Ok(())
}

/// The scripts of a text, in order: what stands between lines of three backticks.
fn blocks(text: &str) -> Vec<String> {
    text.split("```").skip(1).step_by(2).map(|block| block.trim().to_owned()).collect()
}

/// `KEY.KEY=VALUE` for each value of the YAML that examples use: maps and lists by indentation.
fn paths(yaml: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut above: Vec<(usize, String)> = Vec::new();
    let lines =
        yaml.lines().filter(|line| !line.trim().is_empty() && !line.trim().starts_with('#'));
    for line in lines {
        let depth = line.len() - line.trim_start().len();
        above.retain(|(other, _)| *other < depth);
        let mut text = line.trim();
        if let Some(item) = text.strip_prefix("- ") {
            above.push((depth, "-".into()));
            text = item;
        }
        let prefix: String = above.iter().map(|(_, key)| format!("{key}.")).collect();
        match text.split_once(": ").or_else(|| text.strip_suffix(':').map(|key| (key, ""))) {
            Some((key, "")) => above.push((depth, key.to_owned())),
            Some((key, value)) => found.push(format!("{prefix}{key}={}", value.trim_matches('"'))),
            None => found.push(format!("{}={text}", prefix.trim_end_matches('.'))),
        }
    }
    found
}

fn get(from: &Host, url: &str) -> anyhow::Result<String> {
    let address = url.strip_prefix("http://").and_then(|rest| rest.strip_suffix('/'));
    let (ip, port) = address.and_then(|at| at.split_once(':')).context("no address")?;
    let ask = format!(
        "exec 3<>/dev/tcp/{ip}/{port}
         printf 'GET / HTTP/1.0\\r\\nHost: web\\r\\n\\r\\n' >&3; cat <&3"
    );
    let answer = from.exec(&["timeout", "2", "bash", "-ec", &ask])?.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    ensure!(head.contains(" 200 "), "{answer}");
    Ok(body.trim().to_owned())
}

fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(path)
}
