//! The program compose on real daemons, with the example of `deploy/examples/compose`.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::ensure;
use weft_testbed::{Docker, Engine as _, IMAGE, Lab};

const SHOP: &str = include_str!("../../deploy/examples/compose/compose.yaml");

/// The networks of a project's file, for a network that is there already.
const EXTERNAL: &str = "networks: {default: {name: blog, external: true}}";

/// A container of a project.
struct Replica<'a> {
    docker: &'a Docker,
    name: String,
    service: String,
    address: IpAddr,
}

#[test]
fn every_replica_is_found_by_its_service_on_all_hosts_and_in_no_other_project() -> anyhow::Result<()>
{
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    let shop = project(&lab, "shop", SHOP)?;
    one.compose("shop", &shop, "up -d --scale web=2 --scale api=1")?;
    two.compose("shop", &shop, "up -d --scale web=3 --scale api=2 --scale db=0")?;
    lab.host(1).weft("docker network create blog")?.ok()?;
    let own_network = SHOP.split("networks:").next().unwrap_or_default();
    let blog = project(&lab, "blog", &format!("{own_network}\n{EXTERNAL}\n"))?;
    for docker in &dockers {
        docker.compose("blog", &blog, "up -d web")?;
    }

    let shops = replicas(&dockers, "shop", "shop_default")?;
    let of_shop = by_service(&shops);
    let count = |service: &str| of_shop.get(service).map_or(0, Vec::len);
    ensure!([count("web"), count("api"), count("db")] == [5, 3, 1], "{of_shop:?}");
    let blogs = replicas(&dockers, "blog", "blog")?;
    for Replica { docker, name, .. } in &shops {
        for (service, addresses) in &of_shop {
            docker.finds(name, service, addresses)?;
        }
        docker.finds(name, "web.shop", &of_shop["web"])?;
        docker.finds(name, "tasks.api", &of_shop["api"])?;
        docker.finds(name, "db.shop_default", &of_shop["db"])?;
    }
    // Each replica answers for itself, whoever asks it.
    for asker in shops.iter().filter(|replica| replica.service != "web") {
        for web in shops.iter().filter(|replica| replica.service == "web") {
            let page = format!("wget -qO- http://{}/", web.address);
            let said = asker.docker.sh(&asker.name, &page)?;
            ensure!(said == web.docker.sh(&web.name, "hostname")?, "{} is {said}", web.name);
        }
    }
    // Both hosts count from one: a name that several have is answered with all of them.
    let first: Vec<_> =
        shops.iter().filter(|r| r.name == shops[0].name).map(|r| r.address).collect();
    ensure!(first.len() == 2, "{} is a name of one host", shops[0].name);
    for docker in &dockers {
        docker.finds(&shops[0].name, &shops[0].name, &first)?;
    }

    // The other project has a service of the same name, and nothing of this one.
    let of_blog = by_service(&blogs);
    ensure!(of_blog["web"].len() == 2, "{of_blog:?}");
    for Replica { docker, name, .. } in &blogs {
        docker.finds(name, "web", &of_blog["web"])?;
        for other in ["db", "api", "web.shop", "tasks.api", &shops[0].name] {
            docker.misses(name, other)?;
        }
        let reached = docker.ping(name, &of_shop["web"][0].to_string());
        ensure!(reached.is_err(), "{name} reaches the other project");
    }
    one.misses(&shops[0].name, "web.blog")?;

    // What was killed or scaled down is answered no more.
    two.compose("shop", &shop, "up -d --scale web=1 --scale api=2 --scale db=0")?;
    one.run(&format!("kill {}", shops[0].name))?;
    let shops = replicas(&dockers, "shop", "shop_default")?;
    let of_shop = by_service(&shops);
    ensure!(of_shop["web"].len() == 2, "{of_shop:?}");
    for Replica { docker, name, .. } in &shops {
        docker.finds(name, "web", &of_shop["web"])?;
    }

    for docker in &dockers {
        docker.compose("shop", &shop, "down")?;
        docker.compose("blog", &blog, "down")?;
        docker.leaves_nothing()?;
        let networks = docker.run("network ls --format {{.Name}}")?;
        ensure!(!networks.contains("shop_default"), "{networks}");
    }
    lab.finish();
    Ok(())
}

/// Writes the files of a project: `compose`, with the image that the daemons have.
fn project(lab: &Lab, name: &str, compose: &str) -> anyhow::Result<PathBuf> {
    let dir: PathBuf = Path::new(lab.dir()).join(name);
    fs::create_dir(&dir)?;
    fs::write(dir.join("compose.yaml"), compose)?;
    let images = ["web", "api", "db"].map(|service| format!("{service}: {{image: {IMAGE}}}"));
    fs::write(dir.join("override.yaml"), format!("services: {{{}}}\n", images.join(", ")))?;
    Ok(dir)
}

fn replicas<'a>(
    dockers: &'a [Docker],
    project: &str,
    network: &str,
) -> anyhow::Result<Vec<Replica<'a>>> {
    let mut found = Vec::new();
    for docker in dockers {
        let listed = docker.run_args(&[
            "ps",
            "--filter",
            &format!("label=com.docker.compose.project={project}"),
            "--format",
            "{{.Names}} {{.Label \"com.docker.compose.service\"}}",
        ])?;
        for (name, service) in listed.lines().filter_map(|line| line.split_once(' ')) {
            let (name, service) = (name.to_owned(), service.to_owned());
            let address = docker.address(&name, network)?;
            found.push(Replica { docker, name, service, address });
        }
    }
    // The one whose name both hosts have.
    found.sort_by_key(|replica| !(replica.service == "web" && replica.name.ends_with('1')));
    Ok(found)
}

fn by_service(replicas: &[Replica<'_>]) -> BTreeMap<String, Vec<IpAddr>> {
    let mut services: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for replica in replicas {
        services.entry(replica.service.clone()).or_default().push(replica.address);
    }
    services
}
