//! What containers see of their networks.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, ensure};
use weft_testbed::{
    Attachment, Capture, Container, Lab, NetworkView, Pinger, eventually, transfer,
};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn containers_reach_all_of_their_own_network_and_nothing_of_the_other() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    lab.create_network("db --subnet 10.41.0.0/24 --subnet fd00:41::/64")?;
    let app = three_on_each_host(&lab, "app")?;
    let db = three_on_each_host(&lab, "db")?;

    for network in [&app, &db] {
        for (from, to) in pairs(network) {
            reaches_by_name_and_address(from, to)?;
        }
    }

    let echoes = "icmp[icmptype] == icmp-echo or icmp6[icmp6type] == 128";
    for (inside, outside) in [(&app, &db), (&db, &app)] {
        let captures = captures(&lab, outside, echoes)?;
        for (from, to) in inside.iter().flat_map(|from| outside.iter().map(move |to| (from, to))) {
            let network = to.attachments().pop().context("it is attached")?.network;
            for name in [to.name().to_owned(), format!("{}.{network}", to.name())] {
                ensure!(from.resolve(&name).is_err(), "{} resolves {name}", from.name());
            }
        }
        let some = inside.iter().zip(outside).chain(inside.iter().zip(outside.iter().rev()));
        for (from, to) in some {
            for ip in to.attachments().iter().flat_map(Attachment::ips) {
                let answer = Pinger::open(from, ip)?.echo(1, Duration::from_millis(50))?;
                ensure!(answer.is_none(), "{} reaches {ip} of {}", from.name(), to.name());
            }
        }
        for (container, capture) in outside.iter().zip(captures) {
            let leaked = capture.stop("")?;
            ensure!(leaked.is_empty(), "{} got {leaked:#?}", container.name());
        }
    }
    lab.finish();
    Ok(())
}

#[test]
fn networks_with_the_same_subnet_do_not_meet() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("red --subnet 10.42.0.0/24")?;
    lab.create_network("blue --subnet 10.42.0.0/24")?;
    let (here, there) = (lab.host(1), lab.host(2));
    let red = [here.container("red1")?, there.container("red2")?];
    let blue = [here.container("blue1")?, there.container("blue2")?];
    for (network, [one, other]) in [("red", &red), ("blue", &blue)] {
        one.attach(network, "--ip 10.42.0.11")?;
        other.attach(network, "--ip 10.42.0.12")?;
    }

    let captures = captures(&lab, &blue, "icmp[icmptype] == icmp-echo")?;
    red[0].reaches("10.42.0.12", SOON)?;
    for capture in captures {
        let strays = capture.stop("")?;
        ensure!(strays.is_empty(), "blue got an echo of red: {strays:?}");
    }
    blue[0].reaches("10.42.0.12", SOON)?;
    lab.finish();
    Ok(())
}

#[test]
fn large_packets_pass_at_the_mtu_of_the_smallest_underlay() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).mtu(2, 1400).build()?;
    lab.form_cluster()?;
    let app = lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    ensure!(app.mtu_bytes == 1350, "1400 less 50 of VXLAN over IPv4: {app:?}");
    let containers = one_on_each_host(&lab, "app")?;
    for container in &containers {
        let mtu = container.sh("cat /sys/class/net/eth0/mtu || ip -o link show eth0")?;
        let links = container.sh("ip -o link show eth0")?;
        ensure!(links.contains("mtu 1350"), "{}: {mtu} {links}", container.name());
    }

    let file = lab.dir().join("underlay.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p1", "ip[6:2] & 0x3fff != 0", file)?;
    for (from, to) in
        pairs(&containers).filter(|(from, to)| from.name() == "c1" || to.name() == "c1")
    {
        for ip in to.on("app")?.ips() {
            from.reaches(&ip.to_string(), SOON)?;
            from.exec(&["ping", "-n", "-c2", "-i0.2", "-W2", "-s60000", &ip.to_string()])?.ok()?;
            transfer(from, to, ip, 5_000_000)?;
        }
    }
    // No host had to cut an outer packet in pieces.
    let fragments = capture.stop("")?;
    ensure!(fragments.is_empty(), "{} outer fragments: {:?}", fragments.len(), fragments.first());
    lab.finish();
    Ok(())
}

#[test]
fn running_containers_follow_the_mtu_of_a_host_that_joins_later() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).mtu(3, 1400).build()?;
    lab.form_cluster_of(2)?;
    let first = lab.host(1);
    first.weft("network create app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?.ok()?;
    let one = first.container("c1")?;
    let two = lab.host(2).container("c2")?;
    for container in [&one, &two] {
        let attached = container.attach("app", "")?;
        ensure!(attached.mtu_bytes == 1450, "1500 less 50 of VXLAN over IPv4: {attached:?}");
    }
    one.reaches("c2", SOON)?;

    lab.join(3)?;
    for container in [&one, &two] {
        eventually(SOON, &format!("{} has the new MTU", container.name()), || {
            let link = container.sh("ip -o link show eth0")?;
            ensure!(link.contains("mtu 1350 "), "{link}");
            Ok(())
        })?;
    }
    let three = lab.host(3).container("c3")?;
    let attached = three.attach("app", "")?;
    ensure!(attached.mtu_bytes == 1350, "1400 less 50 of VXLAN over IPv4: {attached:?}");
    for (from, to) in [(&one, &three), (&three, &two), (&two, &one)] {
        from.reaches(to.name(), SOON)?;
        for ip in to.on("app")?.ips() {
            from.exec(&["ping", "-n", "-c1", "-W2", "-s60000", &ip.to_string()])?.ok()?;
            transfer(from, to, ip, 1_000_000)?;
        }
    }
    lab.finish();
    Ok(())
}

#[test]
fn standard_tools_read_what_weft_made() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    let app = lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    ensure!(app.mtu_bytes == 1450, "1500 less 50 of VXLAN over IPv4: {app:?}");
    let containers = one_on_each_host(&lab, "app")?;
    let [one, two, _] = &containers[..] else { anyhow::bail!("three containers") };
    let (near, far) = (one.on("app")?, two.on("app")?);
    let (near_ip, far_ip) = (near.ip4.context("no IPv4")?, far.ip4.context("no IPv4")?);
    one.reaches(&far_ip.to_string(), SOON)?;

    let file = lab.dir().join("vxlan.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p1", "udp port 4789", file)?;
    one.ping(&far_ip.to_string())?;
    let decoded = capture.stop("")?.join("\n");
    for word in [
        format!("vni {}", app.vni),
        "10.99.0.12.4789: VXLAN".to_owned(),
        format!("{near_ip} > {far_ip}: ICMP echo request"),
        format!("{far_ip} > {near_ip}: ICMP echo reply"),
    ] {
        ensure!(decoded.contains(&word), "tcpdump lacks {word:?}:\n{decoded}");
    }

    let host = lab.host(1);
    let fdb = app.sh(host, "bridge fdb show dev vx0")?;
    ensure!(has_line(&fdb, &[&far.mac, "dst 10.99.0.12", "self"]), "{fdb}");
    let neighbours = app.sh(host, "ip neigh show dev vx0")?;
    for ip in far.ips() {
        let line = [&format!("{ip} lladdr {}", far.mac), "PERMANENT"];
        ensure!(has_line(&neighbours, &line), "{neighbours}");
    }
    let link = app.sh(host, "ip -d link show vx0")?;
    for word in [&format!("vxlan id {}", app.vni), "nolearning", "proxy", "dstport 4789"] {
        ensure!(link.contains(word), "vx0 lacks {word:?}: {link}");
    }
    let rules = host.sh("nft list ruleset")?;
    ensure!(rules.contains("weft"), "{rules}");
    lab.finish();
    Ok(())
}

#[test]
fn an_ipv6_underlay_carries_both_families() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).underlay_v6().build()?;
    lab.form_cluster()?;
    let app = lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    ensure!(app.mtu_bytes == 1430, "1500 less 70 of VXLAN over IPv6: {app:?}");
    let containers = one_on_each_host(&lab, "app")?;
    for (from, to) in pairs(&containers) {
        reaches_by_name_and_address(from, to)?;
    }
    let [one, two, _] = &containers[..] else { anyhow::bail!("three containers") };
    for ip in two.on("app")?.ips() {
        transfer(one, two, ip, 5_000_000)?;
        one.exec(&["ping", "-n", "-c1", "-W2", "-s60000", &ip.to_string()])?.ok()?;
    }
    lab.finish();
    Ok(())
}

#[test]
fn egress_is_translated_and_an_internal_network_has_none() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    lab.create_network("vault --subnet 10.41.0.0/24 --internal")?;
    let open = lab.host(1).container("open")?;
    let closed = lab.host(1).container("closed")?;
    open.attach("app", "")?;
    closed.attach("vault", "")?;

    let router = lab.router().to_string();
    open.reaches(&router, SOON)?;
    let file = lab.dir().join("egress.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p1", "icmp", file)?;
    open.ping(&router)?;
    ensure!(closed.ping(&router).is_err(), "a container of an internal network reaches {router}");
    let seen = capture.stop("")?;
    let translated = seen.iter().filter(|line| line.contains("10.99.0.11 > 10.99.0.1: ICMP echo"));
    ensure!(translated.count() == 1 && seen.len() == 2, "{seen:#?}");
    lab.finish();
    Ok(())
}

#[test]
fn the_hosts_port_takes_vxlan_from_members_only() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    let app = lab.create_network("app --subnet 10.40.0.0/24")?;
    let victim = lab.host(1).container("victim")?;
    let outsider = lab.host(1).container("outsider")?;
    let victim_at = victim.attach("app", "")?;
    lab.create_network("other --subnet 10.41.0.0/24")?;
    outsider.attach("other", "")?;
    let ip = victim_at.ip4.context("no IPv4")?;

    // A hand-made VXLAN link whose frames carry the victim's VNI and MAC: in a container, and on
    // the underlay's router, which is no member.
    let file = lab.dir().join("victim.pcap");
    let capture = Capture::start(&victim.namespace()?, "eth0", "icmp or arp", file)?;
    let inject = format!(
        "ip link add bad type vxlan id {} dstport 4789 remote 10.99.0.11
         ip address add 10.40.0.250/24 dev bad
         ip link set bad up
         ip neigh replace {ip} lladdr {} dev bad
         ping -n -c2 -i0.2 -W1 {ip} && exit 1 || true
         ip link del bad",
        app.vni, victim_at.mac,
    );
    outsider.sh(&inject)?;
    lab.underlay_sh(&inject)?;
    let arrived = capture.stop(&format!("dst host {ip}"))?;
    ensure!(arrived.is_empty(), "injected frames arrived: {arrived:#?}");
    lab.finish();
    Ok(())
}

#[test]
fn a_container_of_two_networks_sees_both_and_keeps_the_default_route_it_has() -> anyhow::Result<()>
{
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    lab.create_network("db --subnet 10.41.0.0/24")?;
    let (here, there) = (lab.host(1), lab.host(2));
    let (web, keys) = (there.container("web")?, there.container("keys")?);
    web.attach("app", "")?;
    keys.attach("db", "")?;

    let both = here.container("both")?;
    both.attach("app", "")?;
    both.attach("db", "")?;
    for name in ["web", "keys", "web.app", "keys.db.weft.internal"] {
        both.reaches(name, SOON)?;
    }
    let routes = both.sh("ip route show default")?;
    ensure!(routes.trim() == "default via 10.40.0.1 dev eth0 proto static", "{routes}");

    let guest = here.container("guest")?;
    guest
        .sh("ip link add uplink type veth peer name far && ip addr add 192.0.2.1/24 dev uplink")?;
    guest.sh("ip link set uplink up && ip route add default via 192.0.2.254 dev uplink")?;
    guest.attach("app", "")?;
    guest.reaches("web", SOON)?;
    let routes = guest.sh("ip route show default")?;
    ensure!(routes.trim().starts_with("default via 192.0.2.254 dev uplink"), "{routes}");
    lab.finish();
    Ok(())
}

#[test]
fn a_container_has_its_name_aliases_and_id_and_its_address_has_the_name() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24 --subnet fd00:40::/64")?;
    let web = lab.host(1).container("web")?;
    let asker = lab.host(2).container("asker")?;
    asker.attach("app", "")?;
    let given = web.attach("app", "--alias www --alias static")?;
    let endpoints = lab.host(2).weft_json("ps")?;
    let endpoints = endpoints.as_array().context("a list")?;
    let shown = endpoints.iter().find(|endpoint| endpoint["name"] == "web").context("web")?;
    let id: String = shown["id"].as_str().context("an id")?.chars().take(12).collect();
    asker.reaches("web", SOON)?;

    let mut wanted: Vec<IpAddr> = given.ips().collect();
    wanted.sort();
    for label in ["web", "www", "static", &id] {
        for name in [label.to_owned(), format!("{label}.app"), format!("{label}.app.weft.internal")]
        {
            let mut found = asker.resolve(&name)?;
            found.sort();
            ensure!(found == wanted, "{name} resolves to {found:?}, not {wanted:?}");
        }
    }
    for ip in wanted {
        let found = asker.exec(&["getent", "hosts", &ip.to_string()])?.ok()?;
        ensure!(found.contains("web.app.weft.internal"), "{ip} resolves to {found}");
    }
    lab.finish();
    Ok(())
}

#[test]
fn a_command_of_weft_run_has_its_names_and_leaves_with_its_end() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let (here, there) = (lab.host(1), lab.host(2));
    let pid = here.weft("run --network app --name web --alias www -d -- sleep 600")?.ok()?;
    let web = Container::running(here, "web", pid.parse()?);
    there.weft("run --network app --name once -- ping -n -c1 -W2 www.app")?.ok()?;
    let exit = there.weft("run --network app --name twice -- sh -c false")?;
    ensure!(exit.code == 1, "the exit code of the command is that of weft run: {exit}");
    eventually(SOON, "what has ended is gone everywhere", || {
        let app = NetworkView::read(here, "app")?;
        ensure!(app.endpoints == ["web"], "{app:?}");
        Ok(())
    })?;
    web.kill();
    eventually(SOON, "what was killed is gone everywhere", || {
        let app = NetworkView::read(there, "app")?;
        ensure!(app.endpoints.is_empty(), "{app:?}");
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

fn reaches_by_name_and_address(from: &Container, to: &Container) -> anyhow::Result<()> {
    let attachment = to.attachments().pop().context("it is attached")?;
    from.reaches(to.name(), SOON)?;
    let v6 = ["ping", "-6", "-n", "-c1", "-W1", to.name()];
    from.exec(&v6)?.ok()?;
    for ip in attachment.ips() {
        let answer = Pinger::open(from, ip)?.echo(1, Duration::from_secs(1))?;
        ensure!(answer.is_some(), "{} does not reach {ip}", from.name());
    }
    let mut resolved = from.resolve(to.name())?;
    let mut given: Vec<IpAddr> = attachment.ips().collect();
    resolved.sort();
    given.sort();
    ensure!(resolved == given, "{} resolves {} to {resolved:?}", from.name(), to.name());
    Ok(())
}

fn three_on_each_host(lab: &Lab, network: &str) -> anyhow::Result<Vec<Container>> {
    let mut containers = Vec::new();
    for host in lab.hosts() {
        for number in 1..=3 {
            let container = host.container(&format!("{network}-{}-{number}", host.name()))?;
            container.attach(network, "")?;
            containers.push(container);
        }
    }
    Ok(containers)
}

/// `c1` on `h1`, and so on.
fn one_on_each_host(lab: &Lab, network: &str) -> anyhow::Result<Vec<Container>> {
    let mut containers = Vec::new();
    for (host, number) in lab.hosts().iter().zip(1..) {
        let container = host.container(&format!("c{number}"))?;
        container.attach(network, "")?;
        containers.push(container);
    }
    Ok(containers)
}

fn pairs(containers: &[Container]) -> impl Iterator<Item = (&Container, &Container)> {
    let pairs = containers.iter().flat_map(|from| containers.iter().map(move |to| (from, to)));
    pairs.filter(|(from, to)| from.name() != to.name())
}

/// One capture on the interface of each container.
fn captures(lab: &Lab, of: &[Container], filter: &str) -> anyhow::Result<Vec<Capture>> {
    let start = |container: &Container| {
        let file = lab.dir().join(format!("{}.pcap", container.name()));
        Capture::start(&container.namespace()?, "eth0", filter, file)
    };
    of.iter().map(start).collect()
}

fn has_line(text: &str, words: &[&str]) -> bool {
    text.lines().any(|line| words.iter().all(|word| line.contains(word)))
}
