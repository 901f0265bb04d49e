//! What others see of an encrypted network: nothing.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use weft_testbed::{
    Capture, Container, Lab, Marker, Pair, Question, Recording, Stop, bulk, eventually, query,
    transfer,
};

const SOON: Duration = Duration::from_secs(20);
const SEALED_PORT: u16 = 6791;

#[test]
fn nothing_of_an_encrypted_network_crosses_in_the_clear_whatever_becomes_of_its_agents()
-> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    for host in lab.hosts() {
        host.configure("sealed_rekey_bytes = 2000000\n")?;
    }
    // From before the first agent of the cluster starts.
    let capture = everything(&lab, "first")?;
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24 --subnet fd5e:a1ed::/64")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    let Pair { one, two, far, .. } = &pair;
    speak(one, two, "secret")?;
    speak(two, one, "secret")?;

    // Keys are replaced under traffic.
    let rekeys = || anyhow::Ok(lab.host(1).metrics()?.sum("weft_sealed_rekeys_total", &[]));
    let before = rekeys()?;
    bulk(one, two, *far, 12_000_000)?;
    let taken = rekeys()? - before;
    ensure!(taken >= 3.0, "{taken} new keys in 12 megabytes");
    speak(one, two, "secret")?;

    for how in [Stop::Gracefully, Stop::Killed] {
        lab.host(1).stop_agent(how)?;
        for (from, to) in [(one, two), (two, one)] {
            let spoken = speak_within(Duration::from_millis(500), from, to, "secret");
            ensure!(spoken.is_err(), "{how:?}: traffic without an agent");
        }
        lab.host(1).start_agent()?;
        pair.reach_each_other()?;
        speak(one, two, "secret")?;
    }
    for host in lab.hosts() {
        host.sh("nft flush ruleset")?;
    }
    speak(one, two, "secret")?;
    speak(two, one, "secret")?;

    let recording = capture.record()?;
    let sealed = recording.datagrams(SEALED_PORT).len();
    ensure!(sealed > 100, "{sealed} sealed packets crossed: something else carried the traffic");
    holds_none(&recording, one, two, "secret")?;
    the_same_is_seen_on_a_plain_network(&lab)?;
    lab.finish();
    Ok(())
}

#[test]
fn nothing_of_an_encrypted_network_crosses_an_ipv6_underlay_in_the_clear() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).underlay_v6().build()?;
    let capture = everything(&lab, "v6")?;
    lab.form_cluster()?;
    let secret =
        lab.create_network("secret --encrypted --subnet 10.213.77.0/24 --subnet fd5e:a1ed::/64")?;
    ensure!(secret.mtu_bytes == 1398, "1500 less 102 of sealing over IPv6: {secret:?}");
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    let Pair { one, two, far, .. } = &pair;
    speak(one, two, "secret")?;
    speak(two, one, "secret")?;
    bulk(one, two, *far, 5_000_000)?;

    let recording = capture.record()?;
    let sealed = recording.datagrams(SEALED_PORT).len();
    ensure!(sealed > 50, "{sealed} sealed packets crossed: something else carried the traffic");
    holds_none(&recording, one, two, "secret")?;
    lab.finish();
    Ok(())
}

#[test]
fn an_encrypted_network_has_no_vxlan_and_lives_beside_a_plain_one() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    let secret = lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    ensure!(secret.mtu_bytes == 1418, "1500 less 82 of sealing over IPv4: {secret:?}");
    let Pair { one, two, .. } = &Pair::attach(&lab, "secret", "walrus")?;
    let three = lab.host(3).container("walrus-three")?;
    three.attach("secret", "")?;
    for (from, to) in [(one, two), (two, &three), (&three, one)] {
        from.reaches(to.name(), SOON)?;
    }
    for host in lab.hosts() {
        let links = secret.sh(host, "ip -d -o link show")?;
        ensure!(!links.contains("vxlan"), "{} has VXLAN: {links}", host.name());
        ensure!(links.contains("tap0"), "{} has no TAP: {links}", host.name());
        let sockets = host.sh("ss -ulnH 'sport = 4789'")?;
        ensure!(sockets.is_empty(), "{} listens to VXLAN: {sockets}", host.name());
    }

    let open = lab.create_network("open --subnet 10.213.77.0/24")?;
    let Pair { one: four, two: five, .. } = &Pair::attach(&lab, "open", "otter")?;
    four.reaches(five.name(), SOON)?;
    ensure!(open.sh(lab.host(1), "ip -d -o link show")?.contains("vxlan"), "open has no VXLAN");
    // The same subnet, and neither sees the other.
    one.reaches(two.name(), SOON)?;
    ensure!(four.resolve(two.name()).is_err(), "{} resolves {}", four.name(), two.name());
    ensure!(one.resolve(five.name()).is_err(), "{} resolves {}", one.name(), five.name());
    lab.finish();
    Ok(())
}

#[test]
fn packets_of_every_size_and_groups_cross_an_encrypted_network() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).mtu(2, 1400).build()?;
    lab.form_cluster()?;
    let secret = lab.create_network(
        "secret --encrypted --subnet 10.213.77.0/24 --subnet fd5e:a1ed::/64 --opt multicast=true",
    )?;
    ensure!(secret.mtu_bytes == 1318, "1400 less 82 of sealing over IPv4: {secret:?}");
    let Pair { one, two, .. } = &Pair::attach(&lab, "secret", "walrus")?;
    let file = lab.dir().join("fragments.pcap");
    let fragments = Capture::start(&lab.underlay_namespace(), "p1", "ip[6:2] & 0x3fff != 0", file)?;
    for (from, to) in [(one, two), (two, one)] {
        for ip in to.on("secret")?.ips() {
            transfer(from, to, ip, 3_000_000)?;
            let receiver = to.inside(|| Ok(UdpSocket::bind(SocketAddr::new(ip, 0))?))?;
            receiver.set_read_timeout(Some(SOON))?;
            let unspecified = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let sender = from.inside(|| Ok(UdpSocket::bind(unspecified)?))?;
            sender.connect(receiver.local_addr()?)?;
            let mut buffer = vec![0; 65536];
            for length in [0, 1, 17, 1269, 1270, 1271, 1290, 1291, 4000, 60000] {
                let payload: Vec<u8> = (0..length).map(|at| (at * 7 + length) as u8).collect();
                sender.send(&payload)?;
                let received = receiver.recv(&mut buffer).with_context(|| {
                    format!("{length} bytes of {} do not arrive at {ip}", from.name())
                })?;
                ensure!(buffer[..received] == payload, "{length} bytes arrive as {received}");
            }
        }
    }
    let cut = fragments.stop("")?;
    ensure!(cut.is_empty(), "{} sealed packets were cut: {:?}", cut.len(), cut.first());

    let group: Ipv4Addr = "239.77.1.2".parse()?;
    let member = two.inside(|| Ok(UdpSocket::bind((group, 0))?))?;
    let own = two.on("secret")?.ip4.context("no IPv4")?;
    member.join_multicast_v4(&group, &own)?;
    member.set_read_timeout(Some(Duration::from_millis(200)))?;
    // By the source address the kernel knows the interface.
    let from = one.on("secret")?.ip4.context("no IPv4")?;
    let speaker = one.inside(|| Ok(UdpSocket::bind((from, 0))?))?;
    let target = SocketAddr::new(group.into(), member.local_addr()?.port());
    eventually(SOON, "a group hears what is said to it", || {
        speaker.send_to(DATAGRAM, target)?;
        let mut buffer = [0; 64];
        let length = member.recv(&mut buffer)?;
        ensure!(&buffer[..length] == DATAGRAM, "{:?}", &buffer[..length]);
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

/// The control: what `holds_none` looks for is there to be found when it crosses in the clear.
fn the_same_is_seen_on_a_plain_network(lab: &Lab) -> anyhow::Result<()> {
    lab.create_network("open --subnet 10.214.77.0/24 --subnet fd5e:c1ea::/64")?;
    let Pair { one, two, .. } = &Pair::attach(lab, "open", "otter")?;
    let capture = everything(lab, "control")?;
    speak(one, two, "open")?;
    speak(two, one, "open")?;
    let recording = capture.record()?;
    for marker in markers(one, two, "open")? {
        ensure!(marker.found_in(&recording) > 0, "a plain network does not show {marker}");
    }
    Ok(())
}

fn holds_none(
    recording: &Recording,
    one: &Container,
    two: &Container,
    network: &str,
) -> anyhow::Result<()> {
    markers(one, two, network)?.iter().try_for_each(|marker| marker.absent_from(recording))
}

fn markers(one: &Container, two: &Container, network: &str) -> anyhow::Result<Vec<Marker>> {
    let payloads = [("ICMP", ECHO), ("TCP", STREAM), ("UDP", DATAGRAM)];
    let payloads = payloads.map(|(of, bytes)| Marker::new(format!("the payload of {of}"), bytes));
    let mut markers = Marker::between(&one.on(network)?, &two.on(network)?)?;
    markers.extend(payloads);
    Ok(markers)
}

/// Sends what [`markers`] names from one container to the other: echoes, a stream, datagrams of
/// both families, and a DNS question.
///
/// # Errors
///
/// An echo or the stream did not get there.
fn speak(from: &Container, to: &Container, network: &str) -> anyhow::Result<()> {
    speak_within(SOON, from, to, network)
}

fn speak_within(
    patience: Duration,
    from: &Container,
    to: &Container,
    network: &str,
) -> anyhow::Result<()> {
    let pattern: String = ECHO.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut done = Ok(());
    for ip in to.on(network)?.ips() {
        let target = ip.to_string();
        let wait = format!("-W{}", patience.as_secs_f64());
        let ping = ["ping", "-n", "-c2", "-i0.2", &wait, "-s200", "-p", &pattern, &target];
        let (echoed, streamed) = (from.exec(&ping)?.ok().map(drop), stream(from, to, ip, patience));
        done = done.and(echoed).and(streamed);
        let unspecified = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = from.inside(|| Ok(UdpSocket::bind(unspecified)?))?;
        for _ in 0..5 {
            // Nobody listens: the answer is an error of the socket, or none.
            let _ = socket.send_to(&DATAGRAM.repeat(4), SocketAddr::new(ip, 9));
        }
        let asker = from.inside(|| Ok(UdpSocket::bind(unspecified)?))?;
        asker.connect(SocketAddr::new(ip, 53))?;
        let name = format!("{}.{}.example", from.name(), to.name());
        let _ = query(&asker, &name, Question::A, Duration::from_millis(20));
    }
    done
}

fn stream(from: &Container, to: &Container, ip: IpAddr, patience: Duration) -> anyhow::Result<()> {
    let listener = to.inside(|| Ok(TcpListener::bind(SocketAddr::new(ip, 0))?))?;
    let target = listener.local_addr()?;
    let mut client = from
        .inside(|| Ok(TcpStream::connect_timeout(&target, patience)?))
        .with_context(|| format!("no connection to {target}"))?;
    let (mut server, _) = listener.accept()?;
    client.write_all(&STREAM.repeat(500))?;
    drop(client);
    server.set_read_timeout(Some(SOON))?;
    let mut received = Vec::new();
    server.read_to_end(&mut received)?;
    ensure!(received.len() == STREAM.len() * 500, "{} bytes arrived", received.len());
    Ok(())
}

/// Every packet of the first host, of whatever protocol.
fn everything(lab: &Lab, name: &str) -> anyhow::Result<Capture> {
    let file = lab.dir().join(format!("{name}.pcap"));
    Capture::start(&lab.underlay_namespace(), "p1", "", file)
}

const ECHO: &[u8] = b"walrus-echo-6c21";
const STREAM: &[u8] = b"walrus-stream-94ce1b07d3";
const DATAGRAM: &[u8] = b"walrus-datagram-e2770a5f";
