//! What established flows notice of new keys and of an agent that is gone for a moment.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::ensure;
use weft_testbed::{
    Bulk, Capture, Flow, Host, Lab, Pair, PingStream, Sequence, Stop, bulk, eventually, pace,
};

/// Of the first lane.
const PORT: u16 = 6791;
const MILLISECOND: Duration = Duration::from_millis(1);

/// What TCP carries across new keys: `WEFT_SEALED_BYTES`, or enough for four of them.
const BYTES: u64 = 450_000_000;
const REKEY_BYTES: u64 = 100_000_000;

#[test]
fn a_stream_across_new_keys_arrives_whole_and_loses_nothing_to_them() -> anyhow::Result<()> {
    let bytes = match std::env::var("WEFT_SEALED_BYTES") {
        Ok(text) => text.parse()?,
        Err(_) => BYTES,
    };
    let lab = Lab::builder().hosts(2).build()?;
    let rekey = |bytes| lab.hosts().iter().try_for_each(|host| configure(host, bytes));
    rekey(u64::MAX / 4)?;
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;

    let (without, none) = measured(&lab, &pair, bytes)?;
    ensure!(none <= 1, "{none} new keys in {bytes} bytes, with no limit");
    rekey(REKEY_BYTES)?;
    // One that still ran would try the keys of a session that the others know no more.
    lab.hosts().iter().try_for_each(|host| host.stop_agent(Stop::Gracefully))?;
    lab.hosts().iter().try_for_each(|host| host.start_agent())?;
    lab.wait_all_alive(Duration::from_secs(60))?;
    pair.reach_each_other()?;
    let (with, keys) = measured(&lab, &pair, bytes)?;
    ensure!(keys >= bytes / REKEY_BYTES - 1, "{keys} new keys in {bytes} bytes");
    for (what, run) in [("one key", without), ("new keys", with)] {
        let (rate, retransmits) = (run.gigabits_per_second(bytes), run.retransmits);
        report(&format!("{bytes} bytes with {what}: {rate:.2} Gbit/s, {retransmits} retransmits"));
    }
    report(&format!("new keys on the way: {keys}"));
    lab.finish();
    Ok(())
}

#[test]
fn datagrams_across_new_keys_arrive_once_and_in_order() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    for host in lab.hosts() {
        configure(host, 1_000_000)?;
    }
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    let before = rekeys(lab.host(1))?;
    let there = Sequence::start(&pair.one, &pair.two, pair.far, 1200, MILLISECOND / 4)?;
    let back = Sequence::start(&pair.two, &pair.one, pair.near, 100, MILLISECOND)?;
    eventually(Duration::from_secs(60), "ten new keys were taken", || {
        let taken = rekeys(lab.host(1))? - before;
        ensure!(taken >= 10, "{taken} new keys");
        Ok(())
    })?;
    for (direction, numbers) in [("there", there.stop()?), ("back", back.stop()?)] {
        let arrived = numbers.arrived;
        ensure!(numbers.lost() == 0, "{direction}: {numbers:?}");
        ensure!(arrived.twice == 0 && arrived.late == 0, "{direction}: {numbers:?}");
    }
    lab.finish();
    Ok(())
}

#[test]
fn flows_spread_over_lanes_stay_in_order_and_hosts_may_differ_in_lanes() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    for (index, lanes) in [(1, 4), (2, 3)] {
        lab.host(index).configure(&format!("sealed_lanes = {lanes}\n"))?;
    }
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    let file = lab.dir().join("lanes.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p1", "udp", file)?;
    let flows: Vec<Sequence> = (0..8)
        .map(|_| Sequence::start(&pair.one, &pair.two, pair.far, 200, MILLISECOND))
        .chain((0..8).map(|_| Sequence::start(&pair.two, &pair.one, pair.near, 200, MILLISECOND)))
        .collect::<anyhow::Result<_>>()?;
    bulk(&pair.one, &pair.two, pair.far, 10_000_000)?;
    bulk(&pair.two, &pair.one, pair.near, 10_000_000)?;
    for flow in flows {
        let numbers = flow.stop()?;
        ensure!(numbers.sent > 10 && numbers.lost() == 0, "{numbers:?}");
        ensure!(numbers.arrived.twice == 0 && numbers.arrived.late == 0, "{numbers:?}");
    }
    let recording = capture.record()?;
    for (host, lanes) in [(1, 4), (2, 3)] {
        let address = lab.host(host).address();
        let ports: BTreeSet<u16> = (PORT..PORT + 8)
            .filter(|&port| {
                let datagrams = recording.datagrams(port);
                datagrams.iter().any(|d| d.source == SocketAddr::new(address, port))
            })
            .collect();
        let own = PORT..PORT + lanes;
        ensure!(ports.len() > 1 && ports.iter().all(|port| own.contains(port)), "{ports:?}");
    }
    lab.finish();
    Ok(())
}

#[test]
fn a_stream_survives_a_restart_of_its_agent_and_a_kill() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    for how in [Stop::Gracefully, Stop::Killed] {
        let there = Flow::start(&pair.one, &pair.two, pair.far, MILLISECOND * 2)?;
        let back = Flow::start(&pair.two, &pair.one, pair.near, MILLISECOND * 2)?;
        let echoes = PingStream::start(&pair.two, pair.near, MILLISECOND * 5)?;
        pair.one.ping(&pair.far.to_string())?;
        lab.host(1).stop_agent(how)?;
        lab.host(1).start_agent()?;
        pair.reach_each_other()?;
        let (there, back, echoes) = (there.stop()?, back.stop()?, echoes.stop()?);
        for flow in [there, back] {
            ensure!(flow.sent_blocks == flow.received_blocks, "{how:?}: {flow:?}");
            ensure!(flow.longest_gap < Duration::from_secs(20), "{how:?}: {flow:?}");
        }
        let seconds = |span: Duration| span.as_secs_f64();
        report(&format!(
            "{how:?} and started again: a stream pauses {:.3} s and {:.3} s, echoes {:.3} s",
            seconds(there.longest_gap),
            seconds(back.longest_gap),
            seconds(echoes.longest_gap),
        ));
    }
    lab.finish();
    Ok(())
}

/// Sends `bytes`, and returns what became of them and how many new keys were taken on the way.
fn measured(lab: &Lab, pair: &Pair, bytes: u64) -> anyhow::Result<(Bulk, u64)> {
    // Two that have just met may have keys that only one of them knows.
    let mut before = None;
    let refused = eventually(Duration::from_secs(60), "nothing is refused any more", || {
        let now = refused(lab)?;
        pace(Duration::from_secs(2));
        ensure!(before.replace(now.clone()).as_ref() == Some(&now), "{now:?}");
        Ok(now)
    })?;
    let keys = rekeys(lab.host(1))?;
    let run = bulk(&pair.one, &pair.two, pair.far, bytes)?;
    // What a new key loses is a packet that cannot be opened.
    let after = self::refused(lab)?;
    ensure!(after == refused, "packets could not be opened: {refused:?}, then {after:?}");
    Ok((run, rekeys(lab.host(1))? - keys))
}

/// Drops for want of the right key, a line for each host.
fn refused(lab: &Lab) -> anyhow::Result<Vec<f64>> {
    let drops = |host: &Host, reason: &str| {
        let label = format!("reason=\"{reason}\"");
        Ok::<_, anyhow::Error>(host.metrics()?.sum("weft_sealed_drops_total", &[&label]))
    };
    let mut all = Vec::new();
    for host in lab.hosts() {
        for reason in ["auth", "epoch", "no-key", "replay", "unknown-peer"] {
            all.push(drops(host, reason)?);
        }
    }
    Ok(all)
}

/// How often a host has taken a new key to seal with.
fn rekeys(host: &Host) -> anyhow::Result<u64> {
    Ok(host.metrics()?.sum("weft_sealed_rekeys_total", &[]) as u64)
}

fn configure(host: &std::sync::Arc<Host>, rekey_bytes: u64) -> anyhow::Result<()> {
    host.configure(&format!("sealed_rekey_bytes = {rekey_bytes}\n"))
}

#[expect(clippy::print_stdout, reason = "a figure that --nocapture shows")]
fn report(figure: &str) {
    println!("FIGURE {figure}");
}
