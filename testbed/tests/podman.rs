//! Real podmans with the CNI plugin, an agent beside each.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, ensure};
use weft_testbed::{Engine as _, Lab, Podman, eventually};

const SOON: Duration = Duration::from_secs(20);
const PLAIN: &str = include_str!("../../deploy/cni/weft.conflist");
const PORTS: &str = include_str!("../../deploy/cni/weft-ports.conflist");

fn podmans(hosts: u8) -> anyhow::Result<(Lab, Vec<Podman>)> {
    let lab = Lab::cluster(hosts)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    lab.create_network("db --subnet 10.41.0.0/24")?;
    let db = PLAIN.replace("\"app\"", "\"db\"");
    let conflists = [("app.conflist", PLAIN), ("db.conflist", &db), ("app-ports.conflist", PORTS)];
    let podmans = (1..=hosts)
        .map(|index| Podman::start(&lab, index, &conflists))
        .collect::<Result<_, _>>()?;
    Ok((lab, podmans))
}

fn resolves(podman: &Podman, container: &str, name: &str) -> anyhow::Result<IpAddr> {
    let what = format!("{container} on {} finds {name}", podman.host().name());
    let found = eventually(SOON, &what, || podman.resolve(container, name))?;
    found.first().copied().context("no address")
}

/// Waits until a web server answers at a port of the first host, to each host.
fn answers(lab: &Lab, port: u16) -> anyhow::Result<()> {
    let ask = format!(
        "exec 3<>/dev/tcp/10.99.0.11/{port}
         printf 'GET /nsswitch.conf HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    );
    for from in lab.hosts() {
        eventually(SOON, &format!("port {port} answers to {}", from.name()), || {
            let said = from.exec(&["timeout", "1", "bash", "-ec", &ask])?.ok()?;
            ensure!(said.contains("200 OK"), "{said}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn podmans_containers_find_and_reach_each_other_across_hosts() -> anyhow::Result<()> {
    let (lab, podmans) = podmans(2)?;
    let [one, two] = &podmans[..] else { unreachable!() };
    one.container("c1", "--network app --network-alias first")?;
    two.container("c2", "--network app --ip 10.40.0.77 --mac-address 02:11:22:33:44:55")?;
    two.container("d1", "--network db")?;

    let c2: IpAddr = "10.40.0.77".parse()?;
    ensure!(resolves(one, "c1", "c2")? == c2, "c2 has another address");
    for name in ["c1", "first", "c1.app"] {
        resolves(two, "c2", name)?;
    }
    one.ping("c1", "c2")?;
    two.ping("c2", "first")?;
    one.loses("c1", "d1")?;
    let mac = two.sh("c2", "ip link show eth0")?;
    ensure!(mac.contains("02:11:22:33:44:55"), "{mac}");

    // Live, with an alias.
    two.run("network connect --alias late db c2")?;
    resolves(two, "d1", "late")?;
    two.ping("d1", "c2")?;
    two.ping("c2", "d1")?;
    let routes = two.sh("c2", "ip route")?;
    ensure!(routes.contains("10.41.0.0/24 dev eth1"), "{routes}");
    two.run("network disconnect db c2")?;
    two.loses("d1", "late")?;
    one.ping("c1", "c2")?;

    // Again under the same name.
    one.run("restart -t 0 c1")?;
    resolves(two, "c2", "c1")?;
    eventually(SOON, "c1 answers after its restart", || two.ping("c2", "c1"))?;

    // What cannot be done is said, and leaves nothing.
    for (options, word) in [
        ("--network app -p 8099:80/sctp", "80/sctp"),
        ("--network app --ip 10.40.0.77", "10.40.0.77"),
        ("--network app --mac-address 02:11:22:33:44:55", "02:11:22:33:44:55"),
    ] {
        one.try_container("bad", options, "true")?.refused(126, &[word])?;
        one.run("rm -f bad")?;
    }

    one.run("rm -f -t 0 c1")?;
    two.loses("c2", "c1")?;
    two.run("rm -f -t 0 c2 d1")?;
    for podman in [one, two] {
        podman.leaves_nothing()?;
    }
    lab.finish();
    Ok(())
}

#[test]
fn a_published_port_and_a_name_lead_to_one_container() -> anyhow::Result<()> {
    let (lab, podmans) = podmans(2)?;
    let [one, two] = &podmans[..] else { unreachable!() };
    let serve = "busybox httpd -f -p 80 -h /etc";
    one.try_container("web", "--network app-ports -p 8088:80", serve)?.ok()?;
    one.try_container("direct", "--network app -p 8089:80", serve)?.ok()?;
    two.container("client", "--network app")?;
    for port in [8088, 8089] {
        answers(&lab, port)?;
    }
    one.try_container("late", "--network app -p 8089:80", "true")?
        .refused(126, &["8089", "container direct of network app"])?;
    one.run("rm -f late")?;
    one.run("restart -t 0 direct")?;
    answers(&lab, 8089)?;
    resolves(two, "client", "web")?;
    two.ping("client", "web")?;
    resolves(one, "web", "client")?;
    one.run("rm -f -t 0 web direct")?;
    two.loses("client", "web")?;
    one.try_container("late", "--network app -p 8089:80", serve)?.ok()?;
    answers(&lab, 8089)?;
    one.run("rm -f -t 0 late")?;
    two.run("rm -f -t 0 client")?;
    one.leaves_nothing()?;
    lab.finish();
    Ok(())
}

/// Podman 5 of Debian 13, from a tree beside this system: `make test-engines-next`.
#[test]
#[ignore = "needs WEFT_ENGINES_TREE, which `make test-engines-next` makes"]
fn netavarks_containers_find_and_reach_each_other_across_hosts() -> anyhow::Result<()> {
    let tree = std::env::var_os("WEFT_ENGINES_TREE").context("WEFT_ENGINES_TREE is not set")?;
    let tree = std::path::PathBuf::from(tree);
    let lab = Lab::cluster(2)?;
    let (one, two) = (Podman::start_in(&tree, &lab, 1)?, Podman::start_in(&tree, &lab, 2)?);
    // Without a subnet weft gives out the addresses; with one podman does, on each host by itself.
    for (podman, range) in [(&one, "10.93.0.64/26"), (&two, "10.93.0.128/26")] {
        podman.run("network create -d weft app")?;
        podman.run(&format!(
            "network create -d weft --subnet 10.93.0.0/24 --ip-range {range} -o weft.network=shop shop"
        ))?;
    }
    one.container("c1", "--network app --network-alias first")?;
    two.container("c2", "--network app --mac-address 02:11:22:33:44:55")?;
    for name in ["c1", "first", "c1.app"] {
        resolves(&two, "c2", name)?;
    }
    one.ping("c1", "c2")?;
    two.ping("c2", "first")?;
    let mac = two.sh("c2", "ip link show eth0")?;
    ensure!(mac.contains("02:11:22:33:44:55"), "{mac}");

    one.container("s1", "--network shop --ip 10.93.0.66")?;
    two.container("s2", "--network shop")?;
    ensure!(resolves(&two, "s2", "s1")?.to_string() == "10.93.0.66", "s1 has another address");
    two.ping("s2", "s1")?;
    one.loses("c1", "s1")?;
    two.run("network connect --alias late shop c2")?;
    resolves(&one, "s1", "late")?;
    one.ping("s1", "c2")?;
    two.run("network disconnect shop c2")?;
    one.loses("s1", "late")?;
    two.ping("c2", "c1")?;
    one.run("restart -t 0 c1")?;
    eventually(SOON, "c1 answers after its restart", || two.ping("c2", "c1"))?;

    for (options, word) in [
        ("--network app -p 8099:80", "ports=here"),
        ("--network app --mac-address 02:11:22:33:44:55", "02:11:22:33:44:55"),
    ] {
        one.try_container("bad", options, "true")?.refused(126, &[word])?;
        one.run("rm -f bad")?;
    }
    // Ports are published by whom the network's options say.
    one.run("network create -d weft -o weft.network=app -o ports=here open")?;
    let serve = "busybox httpd -f -p 80 -h /etc";
    one.try_container("web", "--network open -p 8088:80", serve)?.ok()?;
    answers(&lab, 8088)?;
    one.try_container("bad", "--network open -p 8088:80", "true")?
        .refused(126, &["8088", "container web of network app"])?;
    one.run("rm -f -t 0 bad web")?;
    one.try_container("web", "--network open -p 8088:80", serve)?.ok()?;
    answers(&lab, 8088)?;
    one.run("rm -f -t 0 web")?;

    one.run("rm -f -t 0 c1 s1")?;
    two.loses("c2", "c1")?;
    two.run("rm -f -t 0 c2 s2")?;
    for podman in [&one, &two] {
        podman.leaves_nothing()?;
    }
    lab.finish();
    Ok(())
}
