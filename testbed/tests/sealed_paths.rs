//! Encrypted networks over paths that are not straight: a router that translates, no direct way,
//! a narrow place.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_testbed::{
    Capture, Flow, Host, Lab, Marker, Pair, SealingView, Wire, eventually, holds_for, transfer,
};

const SEALED_PORT: u16 = 6791;
const MILLISECOND: Duration = Duration::from_millis(1);

#[test]
fn a_host_behind_a_router_that_translates_is_reached_and_stays_reached() -> anyhow::Result<()> {
    let forgets = Duration::from_secs(25);
    let lab = Lab::builder().hosts(3).behind_nat(2, forgets).build()?;
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    path_is(lab.host(1), "h2", "observed")?;
    transfer(&pair.one, &pair.two, pair.far, 3_000_000)?;
    transfer(&pair.two, &pair.one, pair.near, 3_000_000)?;

    // Nothing is said inside for longer than the router remembers; the first word comes from
    // outside.
    holds_for(forgets + Duration::from_secs(5), "h2 is reached, though nobody speaks", || {
        let view = SealingView::read(lab.host(1))?.peer("h2")?;
        ensure!(view.path == "observed", "{view:?}");
        Ok(())
    })?;
    pair.one.ping(&pair.far.to_string()).context("the router has forgotten the path")?;
    lab.finish();
    Ok(())
}

#[test]
fn two_hosts_without_a_direct_path_meet_over_a_third_that_reads_nothing() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    path_is(lab.host(1), "h2", "direct")?;

    let there = Flow::start(&pair.one, &pair.two, pair.far, MILLISECOND * 2)?;
    let file = lab.dir().join("relay.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p3", "", file)?;
    lab.partition(&[1], &[2])?;
    for (host, peer) in [(1, "h2"), (2, "h1")] {
        path_is(lab.host(host), peer, "relay")?;
        let via = SealingView::read(lab.host(host))?.peer(peer)?.via;
        ensure!(via.as_deref() == Some("h3"), "by way of {via:?}");
    }
    pair.reach_each_other()?;
    transfer(&pair.one, &pair.two, pair.far, 1_000_000)?;
    let there = there.stop()?;
    ensure!(there.sent_blocks == there.received_blocks, "{there:?}");
    report("the direct path is gone: a stream pauses", there.longest_gap);

    let recording = capture.record()?;
    let relayed = recording.datagrams(SEALED_PORT).len();
    ensure!(relayed > 100, "{relayed} sealed packets crossed the relay");
    for marker in Marker::between(&pair.one.on("secret")?, &pair.two.on("secret")?)? {
        marker.absent_from(&recording)?;
    }

    lab.heal()?;
    path_is(lab.host(1), "h2", "direct")?;
    pair.reach_each_other()?;
    lab.finish();
    Ok(())
}

#[test]
fn two_hosts_that_never_had_a_direct_path_share_keys_all_the_same() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).build()?;
    lab.partition(&[2], &[3])?;
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let two = lab.host(2).container("walrus-two")?;
    let three = lab.host(3).container("walrus-three")?;
    let far = three.attach("secret", "")?.ip4.context("no IPv4")?;
    two.attach("secret", "")?;
    two.reaches(&far.to_string(), Duration::from_secs(30))?;
    transfer(&two, &three, far.into(), 1_000_000)?;
    lab.finish();
    Ok(())
}

#[test]
fn a_path_that_gets_narrow_is_found_out_and_told_to_senders() -> anyhow::Result<()> {
    // A super-packet has no size that could be too large for a path.
    let lab = Lab::builder().hosts(2).wire(Wire::Segmenting).build()?;
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24 --subnet fd5e:a1ed::/64")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    let far = pair.far.to_string();
    let far6 = pair.two.on("secret")?.ip6.context("no IPv6")?.to_string();
    // 28 bytes of headers on top: the MTU of the network.
    let large = |target: &str, payload: &str| {
        pair.one.exec(&["ping", "-n", "-c1", "-W1", "-M", "do", "-s", payload, target])
    };
    large(&far, "1390")?.ok()?;

    let flow = Flow::start(&pair.one, &pair.two, pair.far, MILLISECOND * 2)?;
    lab.narrow(2, Some(1400))?;
    eventually(Duration::from_secs(30), "h1 has found the narrow place", || {
        let mtu = SealingView::read(lab.host(1))?.peer("h2")?.path_mtu;
        ensure!(mtu.is_some_and(|mtu| (1280..=1400).contains(&mtu)), "the path has {mtu:?}");
        Ok(())
    })?;
    // Too large for the path: the sender's kernel is told so, with the size that fits.
    for (target, payload) in [(&far, "1390"), (&far6, "1370")] {
        let what = format!("{} hears that {payload} bytes are too many", pair.one.name());
        eventually(Duration::from_secs(20), &what, || {
            let ran = large(target, payload)?;
            let told = ["Frag needed", "Packet too big", "essage too long"];
            let said = format!("{}{}", ran.stdout, ran.stderr);
            ensure!(told.iter().any(|word| said.contains(word)), "{ran}");
            Ok(())
        })?;
    }
    transfer(&pair.one, &pair.two, pair.far, 3_000_000)?;
    transfer(&pair.two, &pair.one, pair.near, 3_000_000)?;
    transfer(&pair.one, &pair.two, far6.parse()?, 1_000_000)?;
    let flow = flow.stop()?;
    ensure!(flow.sent_blocks == flow.received_blocks, "{flow:?}");
    report("the path gets narrow: a stream pauses", flow.longest_gap);
    lab.finish();
    Ok(())
}

fn path_is(host: &Host, peer: &str, kind: &str) -> anyhow::Result<()> {
    let what = format!("{} reaches {peer} by a path that is {kind}", host.name());
    eventually(Duration::from_secs(30), &what, || {
        let view = SealingView::read(host)?.peer(peer)?;
        ensure!(view.path == kind && view.confirmed, "{view:?}");
        Ok(())
    })
}

#[expect(clippy::print_stdout, reason = "a figure that --nocapture shows")]
fn report(what: &str, took: Duration) {
    println!("FIGURE {what}: {:.3} s", took.as_secs_f64());
}
