//! Hosts that cannot take part in an encrypted network: it fails closed there, and says so.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_testbed::{Capture, Lab, Marker, Pair, SealingView, Stop, eventually};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_host_without_a_tun_device_carries_plain_networks_and_refuses_encrypted_ones()
-> anyhow::Result<()> {
    let lab = Lab::builder().hosts(2).build()?;
    lab.host(2).sh("mount -t tmpfs tmpfs /dev/net")?;
    lab.form_cluster()?;
    lab.create_network("open --subnet 10.214.77.0/24")?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    Pair::attach(&lab, "open", "otter")?;

    let walrus = lab.host(2).container("walrus")?;
    walrus.try_attach("secret", "")?.refused(1, &["secret", "/dev/net/tun", "module `tun`"])?;
    let reason = SealingView::read(lab.host(2))?.reason().context("no reason in the status")?;
    ensure!(reason.contains("/dev/net/tun"), "{reason}");
    ensure!(lab.host(2).log_tail(200).contains("/dev/net/tun"), "no word in the log");
    let available = lab.host(2).metrics()?.sum("weft_sealed_available", &[]);
    ensure!(available == 0.0, "the metric says {available}");
    lab.finish();
    Ok(())
}

#[test]
fn a_peer_without_encryption_is_not_reached_and_all_are_told() -> anyhow::Result<()> {
    let lab = Lab::builder().hosts(3).build()?;
    lab.host(2).configure("encryption = false\n")?;
    let file = lab.dir().join("closed.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p2", "", file)?;
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;

    let one = lab.host(1).container("walrus-one")?;
    let three = lab.host(3).container("walrus-three")?;
    one.attach("secret", "")?;
    three.attach("secret", "")?;
    one.reaches("walrus-three", SOON)?;

    let two = lab.host(2).container("walrus-two")?;
    two.try_attach("secret", "")?.refused(1, &["secret", "encryption"])?;
    let reason = SealingView::read(lab.host(2))?.reason().context("no reason in the status")?;
    ensure!(reason.contains("encryption"), "{reason}");
    eventually(SOON, "h1 says why it does not reach h2", || {
        let fault = SealingView::read(lab.host(1))?.peer("h2")?.fault.unwrap_or_default();
        ensure!(fault.contains("h2") && fault.contains("takes no part"), "{fault:?}");
        Ok(())
    })?;
    let sealed = capture.record()?.datagrams(6791);
    ensure!(sealed.is_empty(), "{} sealed packets went to or from h2", sealed.len());
    let available = lab.host(2).metrics()?.sum("weft_sealed_available", &[]);
    ensure!(available == 0.0, "the metric says {available}");
    lab.finish();
    Ok(())
}

#[test]
fn a_network_whose_host_gives_up_encryption_fails_closed_there() -> anyhow::Result<()> {
    let lab = Lab::cluster(2)?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;
    let file = lab.dir().join("closed.pcap");
    let capture = Capture::start(&lab.underlay_namespace(), "p2", "", file)?;

    lab.host(2).stop_agent(Stop::Gracefully)?;
    lab.host(2).configure("encryption = false\n")?;
    lab.host(2).start_agent()?;
    lab.wait_all_alive(SOON)?;
    eventually(SOON, "h2 says that the network is not carried", || {
        let view = SealingView::read(lab.host(2))?;
        let fault = view.network("secret")?.err().context("it says that all is well")?;
        ensure!(fault.contains("encryption"), "{fault}");
        let findings = view.findings().join("\n");
        ensure!(findings.contains("secret") && findings.contains("closed"), "{findings}");
        let carried = lab.host(2).metrics()?.sum("weft_sealed_network_carried", &[]);
        ensure!(carried == 0.0, "the metric says {carried}");
        Ok(())
    })?;
    ensure!(lab.host(2).log_tail(200).contains("encryption"), "no word in the log of h2");
    eventually(SOON, "h1 says that its network does not reach h2", || {
        let findings = SealingView::read(lab.host(1))?.findings().join("\n");
        ensure!(findings.contains("secret") && findings.contains("h2"), "{findings}");
        Ok(())
    })?;

    let refused = |reason: &str| {
        let metrics = lab.host(1).metrics()?;
        anyhow::Ok(metrics.sum("weft_sealed_drops_total", &[&format!("reason=\"{reason}\"")]))
    };
    let before = refused("no-offer")?;
    for (from, to) in [(&pair.one, pair.far), (&pair.two, pair.near)] {
        ensure!(from.ping(&to.to_string()).is_err(), "{} still reaches {to}", from.name());
    }
    let after = refused("no-offer")?;
    ensure!(after > before, "{before} drops for want of an offer, then {after}");
    let recording = capture.record()?;
    for marker in Marker::between(&pair.one.on("secret")?, &pair.two.on("secret")?)? {
        marker.absent_from(&recording)?;
    }

    // All is well again when encryption is.
    lab.host(2).stop_agent(Stop::Gracefully)?;
    lab.host(2).configure("")?;
    lab.host(2).start_agent()?;
    pair.reach_each_other()?;
    lab.finish();
    Ok(())
}
