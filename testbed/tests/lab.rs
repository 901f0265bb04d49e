//! The testbed keeps its own promises; no agent takes part.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::unix::process::ExitStatusExt as _,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use weft_testbed::{
    Capture, Datagram, Flow, Forger, Lab, PingStream, Pinger, Sequence, Wire, baseline::Baseline,
    bulk, eventually, sweep, throughput, transfer,
};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn hosts_reach_each_other_until_cut_partitioned_or_powered_off() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).build()?;
    let ping = |from: u8, to: u8| {
        let target = lab.host(to).address().to_string();
        lab.host(from).exec(&["ping", "-n", "-c1", "-W1", &target])?.ok()
    };
    ping(1, 2)?;
    ping(2, 3)?;

    lab.cut(3)?;
    ensure!(ping(1, 3).is_err() && ping(1, 2).is_ok(), "the cut of h3 cuts h3 alone");
    lab.mend(3)?;
    eventually(SOON, "h3 is back", || ping(1, 3))?;

    lab.partition(&[1], &[2, 3])?;
    ensure!(ping(1, 2).is_err() && ping(3, 1).is_err() && ping(2, 3).is_ok(), "1 | 2 3");
    lab.heal()?;
    ping(1, 2)?;

    lab.lose(1, 100)?;
    ensure!(ping(1, 2).is_err(), "all is lost");
    lab.heal()?;

    lab.host(2).sh("echo kept >/var/lib/weft/file; echo gone >/run/file")?;
    lab.host(2).power_off();
    ensure!(ping(1, 2).is_err() && lab.host(2).namespace().is_err(), "h2 is off");
    lab.power_on(2)?;
    eventually(SOON, "h2 is back", || ping(1, 2))?;
    ensure!(lab.host(2).sh("cat /var/lib/weft/file")? == "kept", "a disk outlives the power");
    lab.host(2).sh("test ! -e /run/file")?;
    lab.finish();
    Ok(())
}

#[test]
fn a_host_sees_its_own_links_and_reaps_its_orphans() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(1).mtu(1, 1400).build()?;
    let host = lab.host(1);
    ensure!(host.sh("hostname")? == "h1", "a host has its name");
    ensure!(host.sh("ls /sys/class/net | sort | xargs")? == "eth0 lo", "a host has its links");
    ensure!(host.sh("cat /sys/class/net/eth0/mtu")? == "1400", "a host has its MTU");
    host.sh("sh -c '(exit 3) & exit 0'")?;
    eventually(SOON, "no zombie is left", || {
        let states = host.sh("ps -e -o stat=")?;
        ensure!(!states.contains('Z'), "{states}");
        Ok(())
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn an_ipv6_underlay_has_no_ipv4_address() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).underlay_v6().build()?;
    let other = lab.host(2).address().to_string();
    lab.host(1).exec(&["ping", "-n", "-c1", "-W1", &other])?.ok()?;
    ensure!(lab.host(1).sh("ip -4 -o address show eth0")?.is_empty(), "eth0 has IPv4");
    lab.finish();
    Ok(())
}

#[test]
fn the_hand_made_overlay_carries_ping_tcp_and_nothing_in_the_clear() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    let file = lab.dir().join("underlay.pcap");
    let capture =
        Capture::start(&lab.underlay_namespace(), "p1", "ip and not udp port 4789", file)?;
    let made = Baseline::build(&lab, 1450)?;

    let round = Pinger::open(&made.one, made.address_of_other)?.echo(1, SOON)?;
    ensure!(round.is_some(), "a raw echo is answered");
    transfer(&made.one, &made.other, made.address_of_other, 1 << 20)?;
    let pings = PingStream::start(&made.one, made.address_of_other, Duration::from_millis(1))?;
    let flow =
        Flow::start(&made.one, &made.other, made.address_of_other, Duration::from_millis(2))?;
    let measured = throughput(&made.one, &made.other, made.address_of_other, 1)?;
    let (pings, flow) = (pings.stop()?, flow.stop()?);
    ensure!(measured.gigabits_per_second > 0.1, "{measured:?}");
    ensure!(pings.sent > 500 && pings.lost() == 0, "{pings:?}");
    ensure!(flow.sent_blocks > 200 && flow.sent_blocks == flow.received_blocks, "{flow:?}");

    let numbers = Sequence::start(
        &made.one,
        &made.other,
        made.address_of_other,
        100,
        Duration::from_millis(1),
    )?;
    bulk(&made.one, &made.other, made.address_of_other, 100_000_001)?;
    let numbers = numbers.stop()?;
    ensure!(numbers.sent > 50 && numbers.lost() == 0, "{numbers:?}");
    ensure!(numbers.arrived.twice == 0 && numbers.arrived.late == 0, "{numbers:?}");

    let clear = capture.stop("")?;
    ensure!(clear.is_empty(), "{clear:?}");
    lab.finish();
    Ok(())
}

#[test]
fn a_forged_datagram_arrives_in_the_name_it_was_given() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    let receiver = lab.host(1).inside(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    receiver.set_read_timeout(Some(SOON))?;
    let file = lab.dir().join("forged.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p1", "udp", file)?;
    let destination = (lab.host(1).address(), receiver.local_addr()?.port()).into();
    let source = (lab.host(2).address(), 4711).into();
    let forged = Datagram { source, destination, payload: b"not of h2".to_vec() };
    Forger::open(&lab)?.send(&forged)?;
    let mut buffer = [0; 32];
    let (length, from) = receiver.recv_from(&mut buffer)?;
    ensure!(from == source && buffer[..length] == forged.payload, "{length} bytes of {from}");
    ensure!(capture.record()?.datagrams(4711) == [forged], "the capture has another one");
    lab.finish();
    Ok(())
}

#[test]
fn super_packets_cross_a_plain_wire_and_not_one_that_segments() -> anyhow::Result<()> {
    for (wire, direct) in [(Wire::Plain, true), (Wire::Segmenting, true), (Wire::Segmenting, false)]
    {
        let lab = Lab::builder().hosts(2).wire(wire);
        let lab = if direct { lab.direct() } else { lab }.build()?;
        let (here, there) = (lab.host(1), lab.host(2));
        let file = lab.dir().join("large.pcap");
        let sent = "ether src 02:99:00:00:00:01 and greater 1515";
        let capture = Capture::start(&here.namespace()?, "eth0", sent, file)?;
        let listener = there.inside(|| Ok(TcpListener::bind("0.0.0.0:0")?))?;
        let target = (there.address(), listener.local_addr()?.port());
        let mut client = here.inside(|| Ok(TcpStream::connect(target)?))?;
        let (mut server, _) = listener.accept()?;
        let sender = thread::spawn(move || client.write_all(&vec![7; 4 << 20]));
        server.read_to_end(&mut Vec::new())?;
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        let large = capture.stop("")?.len();
        ensure!((large > 0) == (wire == Wire::Plain), "{wire:?}: {large} super-packets");
        lab.finish();
    }
    Ok(())
}

#[test]
fn a_router_before_a_host_lets_in_answers_alone_and_changes_ports() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).behind_nat(2, Duration::from_secs(30)).build()?;
    let (open, hidden) = (lab.host(1), lab.host(2));
    ensure!(hidden.address().to_string() == "192.168.2.2", "{}", hidden.address());
    hidden.exec(&["ping", "-n", "-c1", "-W1", &open.address().to_string()])?.ok()?;

    let seen = open.inside(|| Ok(UdpSocket::bind("0.0.0.0:7000")?))?;
    let asks = hidden.inside(|| Ok(UdpSocket::bind("0.0.0.0:7000")?))?;
    asks.send_to(b"question", (open.address(), 7000))?;
    seen.set_read_timeout(Some(SOON))?;
    asks.set_read_timeout(Some(SOON))?;
    let mut buffer = [0; 16];
    let (_, from) = seen.recv_from(&mut buffer)?;
    ensure!(from.ip().to_string() == "10.99.0.12" && from.port() >= 40000, "from {from}");
    seen.send_to(b"answer", from)?;
    ensure!(asks.recv(&mut buffer)? == b"answer".len(), "an answer comes back");

    // From another port, and to the port that the host has: nobody asked for it.
    let stranger = open.inside(|| Ok(UdpSocket::bind("0.0.0.0:7001")?))?;
    stranger.send_to(b"stranger", from)?;
    seen.send_to(b"stranger", ("10.99.0.12", 7000))?;
    seen.send_to(b"last", from)?;
    let length = asks.recv(&mut buffer)?;
    ensure!(&buffer[..length] == b"last", "{:?} came in", &buffer[..length]);

    hidden.power_off();
    lab.power_on(2)?;
    eventually(SOON, "h2 is back behind its router", || {
        hidden.exec(&["ping", "-n", "-c1", "-W1", &open.address().to_string()])?.ok()
    })?;
    lab.finish();
    Ok(())
}

#[test]
fn a_narrow_path_swallows_large_packets_both_ways_and_nothing_else() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).build()?;
    let ping = |from: u8, to: u8, payload: &str| {
        let target = lab.host(to).address().to_string();
        let argv = ["ping", "-n", "-c1", "-W1", "-M", "do", "-s", payload, &target];
        lab.host(from).exec(&argv)?.ok()
    };
    ping(1, 2, "1400")?;
    lab.narrow(2, Some(1400))?;
    for (from, to) in [(1, 2), (2, 1), (3, 2)] {
        // 28 bytes of headers on top.
        ping(from, to, "1372")?;
        ensure!(ping(from, to, "1373").is_err(), "h{from} to h{to}: 1401 bytes pass");
    }
    ping(1, 3, "1400")?;
    lab.narrow(2, None)?;
    ping(1, 2, "1400")?;
    lab.finish();
    Ok(())
}

#[test]
fn a_lab_leaves_nothing_behind() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    let container = lab.host(1).container("c")?;
    let dir = lab.dir().to_owned();
    let namespace = container.namespace()?;
    ensure!(dir.exists() && namespace.exists(), "the lab stands");
    lab.finish();
    ensure!(!dir.exists() && !namespace.exists(), "the lab is gone");
    drop(container);
    Ok(())
}

#[test]
fn sweeping_takes_labs_of_dead_processes_and_nothing_else() -> anyhow::Result<()> {
    // In a directory of its own: elsewhere there may be a lab that somebody kept.
    let outer = Lab::builder().hosts(1).build()?;
    let below = outer.dir().join("labs");
    std::fs::create_dir(&below)?;
    let living = Lab::builder().hosts(1).below(below.clone()).build()?;

    let mut owner = Command::new("true").spawn()?;
    owner.wait()?;
    let mut holder = Command::new("tail").args(["-f", "/dev/null"]).spawn()?;
    let mut stranger = Command::new("tail").args(["-f", "/dev/null"]).spawn()?;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", holder.id()))?;
    let start = stat.split(' ').nth(21).context("a process has a start time")?;
    let dead = below.join(format!("weft-lab-{}-1", owner.id()));
    std::fs::create_dir(&dead)?;
    // The stranger has the id of a holder that ended long ago, as its start time tells.
    let holders = format!("{} {start}\n{} 1", holder.id(), stranger.id());
    std::fs::write(dead.join("holders"), holders)?;

    let swept = sweep(&below);
    let spared = stranger.try_wait()?.is_none();
    stranger.kill()?;
    stranger.wait()?;
    let taken = eventually(SOON, "the holder has ended", || holder.try_wait()?.context("it runs"));
    holder.kill()?;
    holder.wait()?;
    ensure!(swept? == [dead.clone()] && !dead.exists(), "not exactly the dead lab was swept");
    ensure!(taken?.signal() == Some(9) && spared, "not exactly the holder was ended");
    living.host(1).sh("true").context("a living lab was swept")?;
    living.finish();
    outer.finish();
    Ok(())
}
