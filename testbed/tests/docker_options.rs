//! What users of Docker give to `network create` and `run` means here what it means there.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use weft_testbed::{Docker, Engine as _, Host, eventually, in_network_namespace};

const SOON: Duration = Duration::from_secs(20);
const CREATE: &str = "network create -d weft --ipam-driver weft";

/// What `docker inspect` says of a container in `network`.
fn field(docker: &Docker, container: &str, network: &str, name: &str) -> anyhow::Result<String> {
    let template = format!("{{{{(index .NetworkSettings.Networks \"{network}\").{name}}}}}");
    docker.run_args(&["inspect", "-f", &template, container])
}

#[test]
fn what_differs_from_the_clusters_network_is_refused_with_what_to_give() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    one.create_network("--subnet 10.78.0.0/24 --ip-range 10.78.0.128/29 -o weft.network=app ours")?;
    one.create_network("--internal --subnet 10.79.0.0/24 inner")?;
    one.create_network("--ipv6 --subnet 10.80.0.0/24 --subnet fd00:80::/64 dual")?;
    for name in ["app", "inner", "dual"] {
        let inspect = format!("network inspect {name}");
        eventually(SOON, &format!("{name} is known"), || lab.host(2).weft(&inspect)?.ok())?;
    }
    for (options, words) in [
        ("-d weft bare", &["--ipam-driver weft"][..]),
        ("-o weft.network=app other --subnet 10.83.0.0/24", &["10.78.0.0/24"]),
        ("-o weft.network=app other --subnet 10.78.0.0/24 --gateway 10.78.0.9", &["10.78.0.1"]),
        (
            "-o weft.network=app other --subnet 10.78.0.0/24 --ip-range 10.78.0.64/29",
            &["--ip-range 10.78.0.128/29"],
        ),
        (
            "-o weft.network=app other --subnet 10.78.0.0/24 --aux-address nas=10.78.0.130",
            &["10.78.0.130", "--aux-address"],
        ),
        ("-o weft.network=app --internal other", &["without --internal"]),
        ("-o weft.network=inner open", &["with --internal"]),
        ("-o weft.network=dual other", &["--ipv6 --subnet fd00:80::/64"]),
        ("-o weft.network=app -o encrypted other", &["encrypted"]),
        ("-o weft.colour=red other", &["weft.colour=red", "weft.network"]),
    ] {
        let create = if options.starts_with("-d") { "network create" } else { CREATE };
        two.refuses(&format!("{create} {options}"), words)?;
    }

    // Docker does not tell the driver a network's name: what does not fit is seen a moment later.
    lab.create_network("other --subnet 10.86.0.0/24")?;
    two.create_network("--subnet 10.87.0.0/24 other")?;
    eventually(SOON, "the status says so", || {
        let status = lab.host(2).weft("status")?.ok()?;
        ensure!(status.contains("--subnet 10.86.0.0/24"), "{status}");
        Ok(())
    })?;
    two.refuses("run --rm --network other weft-test true", &["--subnet 10.86.0.0/24"])?;
    two.run("network rm other")?;
    let status = lab.host(2).weft("status")?.ok()?;
    ensure!(!status.contains("10.86.0.0/24"), "{status}");
    lab.finish();
    Ok(())
}

#[test]
fn addresses_come_from_the_range_and_never_from_what_is_reserved() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    let span = "--subnet 10.78.0.0/24 --gateway 10.78.0.254 --ip-range 10.78.0.128/29";
    let aux = "--aux-address nas=10.78.0.129 --aux-address printer=10.78.0.9";
    let mtu = "-o com.docker.network.driver.mtu=1300";
    for docker in &dockers {
        docker.create_network(&format!("{span} {aux} {mtu} app"))?;
    }
    // The range has seven addresses for containers of all hosts, and no eighth.
    let mut left: BTreeSet<IpAddr> =
        [128, 130, 131, 132, 133, 134, 135].map(|n| IpAddr::from([10, 78, 0, n])).into();
    for n in 0..7 {
        let docker = &dockers[n % 2];
        let name = format!("c{n}");
        docker.container(&name, "--network app")?;
        let ip = docker.address(&name, "app")?;
        ensure!(left.remove(&ip), "{name} has {ip}; {left:?} were left");
    }
    two.refuses("run --rm --network app weft-test true", &["app", "no free address"])?;
    for reserved in ["10.78.0.129", "10.78.0.9"] {
        for docker in &dockers {
            let line = format!("run --rm --network app --ip {reserved} weft-test true");
            docker.refuses(&line, &[reserved])?;
        }
    }
    // By number they come from the whole subnet.
    two.container("outside", "--network app --ip 10.78.0.77")?;
    one.finds("c0", "outside", &[IpAddr::from([10, 78, 0, 77])])?;
    one.ping("c0", "c1")?;
    one.ping("c0", "outside")?;
    let link = one.sh("c0", "ip -o link show eth0")?;
    ensure!(link.contains("mtu 1300"), "{link}");
    let template = "{{(index .IPAM.Config 0).Gateway}}";
    let gateway = one.run_args(&["network", "inspect", "app", "--format", template])?;
    ensure!(gateway == "10.78.0.254", "{gateway}");
    one.ping("c0", &gateway)?;
    one.refuses("network rm app", &["endpoint"])?;
    lab.finish();
    Ok(())
}

/// Docker asks for another subnet, without an end, while what it gets overlaps a route of its host.
#[test]
fn a_subnet_that_the_host_routes_elsewhere_ends_in_another_or_in_an_error() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    lab.create_network("app --subnet 10.40.0.0/24")?;
    // Docker is offered the only network of the cluster, and finds its subnet in use here.
    one.host().sh("ip route add 10.40.0.0/24 dev eth0")?;
    let ran = one.try_run(&format!("{CREATE} app"))?;
    ensure!(ran.code == 0 && ran.took < Duration::from_secs(5), "{ran}");
    two.create_network("app")?;
    for docker in &dockers {
        let name = docker.host().name();
        docker.container(name, "--network app")?;
        // Whatever Docker shows of the network, addresses are those of the cluster's.
        let address = docker.address(name, "app")?.to_string();
        ensure!(address.starts_with("10.40.0."), "{address}");
    }
    two.finds("h2", "h1", &[one.address("h1", "app")?])?;
    eventually(SOON, "the other host is reached", || two.ping("h2", "h1"))?;

    // Where every address leads elsewhere there is nothing to offer.
    one.host().sh("ip route add 10.0.0.0/8 dev eth0")?;
    let ran = one.try_run(&format!("{CREATE} more"))?;
    ensure!(ran.took < Duration::from_secs(10), "{ran}");
    ran.refused(1, &["Give --subnet"])?;
    one.create_network("--subnet 100.100.0.0/24 more")?;
    one.container("web", "--network more")?;
    lab.finish();
    Ok(())
}

#[test]
fn chosen_addresses_of_both_families_are_given_or_refused_with_who_has_them() -> anyhow::Result<()>
{
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("--ipv6 --subnet 10.80.0.0/24 --subnet fd00:80::/64 dual")?;
        docker.create_network("--subnet 10.81.0.0/24 app")?;
    }
    let (v4, v6): (IpAddr, IpAddr) = ("10.80.0.77".parse()?, "fd00:80::77".parse()?);
    one.container("both", &format!("--network dual --ip {v4} --ip6 {v6}"))?;
    two.container("any", "--network dual")?;
    two.container("six", "--network dual --ip6 fd00:80::1234")?;
    let any: IpAddr = field(two, "any", "dual", "GlobalIPv6Address")?.parse()?;
    ensure!(any.to_string().starts_with("fd00:80::"), "{any}");
    two.finds("any", "both", &[v4, v6])?;
    one.finds("both", "any", &[two.address("any", "dual")?, any])?;
    for address in [v4.to_string(), v6.to_string()] {
        eventually(SOON, &format!("{address} is reached"), || two.ping("any", &address))?;
    }
    for address in [any.to_string(), "fd00:80::1234".into()] {
        eventually(SOON, &format!("{address} is reached"), || one.ping("both", &address))?;
    }
    for address in [format!("--ip {v4}"), format!("--ip6 {v6}")] {
        for docker in &dockers {
            let line = format!("run --rm --network dual {address} weft-test true");
            docker.refuses(&line, &["both"])?;
        }
    }
    // A restart keeps what was chosen; a container that runs joins with a choice, too.
    one.run("restart -t 0 both")?;
    two.finds("any", "both", &[v4, v6])?;
    two.container("late", "--network app")?;
    two.run("network connect --ip 10.80.0.99 --ip6 fd00:80::99 dual late")?;
    one.finds("both", "late", &["10.80.0.99".parse()?, "fd00:80::99".parse()?])?;
    eventually(SOON, "late is reached", || one.ping("both", "fd00:80::99"))?;
    // What was given back is free again.
    one.run("rm -f both")?;
    eventually(SOON, "the address is free again", || {
        two.run(&format!("run --rm --network dual --ip6 {v6} weft-test true"))
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn docker_publishes_ports_and_leads_out_unless_wefts_gateway_is_asked_for() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("--subnet 10.78.0.0/24 app")?;
        docker.create_network("--subnet 10.81.0.0/24 -o weft.gateway=true out")?;
    }
    one.container("web", "--network app -p 8090:80")?;
    let serve = "mkdir -p /www && echo hello >/www/x && httpd -f -p 80 -h /www";
    one.run_args(&["exec", "-d", "web", "sh", "-c", serve])?;
    let published = SocketAddr::new(one.host().address(), 8090);
    for from in [two.host(), one.host()] {
        eventually(SOON, &format!("the port answers to {}", from.name()), || {
            let said = fetch(from, published)?;
            ensure!(said.contains("hello"), "{said}");
            Ok(())
        })?;
    }
    let router = lab.router().to_string();
    one.ping("web", &router)?;
    one.container("o1", "--network out")?;
    two.container("o2", "--network out")?;
    let routes = one.sh("o1", "ip route")?;
    let through_weft = routes.contains("default via 10.81.0.1 dev eth0");
    ensure!(through_weft && !routes.contains("eth1"), "{routes}");
    one.ping("o1", &router)?;
    one.ping("o1", "o2")?;
    lab.finish();
    Ok(())
}

#[test]
fn an_internal_network_leads_to_its_hosts_and_nowhere_else() -> anyhow::Result<()> {
    let (lab, dockers) = Docker::on_cluster(2)?;
    let [one, two] = &dockers[..] else { unreachable!() };
    for docker in &dockers {
        docker.create_network("--internal --subnet 10.79.0.0/24 inner")?;
        docker.create_network("--subnet 10.82.0.0/24 -o encrypted sealed")?;
        let host = docker.host().name();
        docker.container(&format!("i-{host}"), "--network inner")?;
        docker.container(&format!("s-{host}"), "--network sealed")?;
    }
    one.ping("i-h1", "i-h2")?;
    two.ping("i-h2", "i-h1")?;
    let routes = one.sh("i-h1", "ip route")?;
    ensure!(!routes.contains("default"), "{routes}");
    for beyond in [lab.router(), two.host().address()] {
        ensure!(one.ping("i-h1", &beyond.to_string()).is_err(), "it leads to {beyond}");
    }
    eventually(SOON, "the sealed network carries", || one.ping("s-h1", "s-h2"))?;
    let sealed = lab.host(1).weft_json("network inspect sealed")?;
    let encrypted = sealed.pointer("/0/Weft/encrypted").context("no word of encryption")?;
    ensure!(encrypted == true, "{sealed}");
    lab.finish();
    Ok(())
}

/// Fetches a page from within a host.
fn fetch(host: &Host, server: SocketAddr) -> anyhow::Result<String> {
    in_network_namespace(&host.namespace()?, || {
        let mut stream = TcpStream::connect_timeout(&server, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"GET /x HTTP/1.0\r\n\r\n")?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said)
    })
}
