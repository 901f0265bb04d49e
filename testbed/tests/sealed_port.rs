//! The data port and those who have no business there.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::ensure;
use weft_testbed::{Capture, Datagram, Forger, Host, Lab, Pair, Wire, eventually, pace, transfer};

const PORT: u16 = 6791;

#[test]
fn what_is_not_sealed_for_a_host_is_dropped_and_counted_and_never_answered() -> anyhow::Result<()> {
    // Packets of the size that they have on a wire: a super-packet could not be sent again whole.
    let lab = Lab::builder().hosts(3).wire(Wire::Segmenting).build()?;
    lab.form_cluster()?;
    lab.create_network("secret --encrypted --subnet 10.213.77.0/24")?;
    let pair = Pair::attach(&lab, "secret", "walrus")?;

    let file = lab.dir().join("real.pcap");
    let real = Capture::start(&lab.underlay_namespace(), "p1", "udp", file)?;
    transfer(&pair.one, &pair.two, pair.far, 100_000)?;
    transfer(&pair.two, &pair.one, pair.near, 100_000)?;
    let real = real.record()?.datagrams(PORT);
    let of = |host: &Host| {
        let from = host.address();
        real.iter().filter(|d| d.source.ip() == from).cloned().collect::<Vec<_>>()
    };
    let (sent, received) = (of(lab.host(1)), of(lab.host(2)));
    ensure!(sent.len() > 60 && received.len() > 60, "{} and {}", sent.len(), received.len());

    let file = lab.dir().join("answers.pcap");
    let answers = Capture::start(&lab.underlay_namespace(), "p1", "", file)?;
    let forger = Forger::open(&lab)?;
    let [first, second, third] = [1, 2, 3].map(|index| data_port(lab.host(index)));
    let router = SocketAddr::new(lab.router(), PORT);
    let mut sent_in_all = 0;
    for (what, datagrams) in [
        ("random bytes", random(router, first)),
        ("random bytes in the name of h2", random(second, first)),
        ("cut packets", cut(&received)),
        ("packets with a flipped bit", flipped(&received)),
        ("replayed packets", received.clone()),
        ("replayed packets in the name of h3", readdressed(&received, third, first)),
        ("reflected packets", readdressed(&sent, second, first)),
        ("packets for another host", readdressed(&sent, first, third)),
    ] {
        let victim = if datagrams[0].destination == third { lab.host(3) } else { lab.host(1) };
        dropped_and_counted(&forger, victim, what, &datagrams)?;
        sent_in_all += datagrams.len();
    }

    // Whoever is not known gets no word at all, and nobody gets more than he sends.
    let answers = answers.record()?;
    let all = answers.datagrams(PORT);
    let to_router: Vec<_> = all.iter().filter(|d| d.destination.ip() == router.ip()).collect();
    ensure!(to_router.is_empty(), "h1 answers strangers: {to_router:?}");
    let outgoing = all.iter().filter(|d| d.source.ip() == first.ip()).count();
    ensure!(outgoing * 10 < sent_in_all, "{outgoing} packets for {sent_in_all} forged ones");

    for host in lab.hosts() {
        host.weft("status")?.ok()?;
    }
    transfer(&pair.one, &pair.two, pair.far, 1_000_000)?;
    transfer(&pair.two, &pair.one, pair.near, 1_000_000)?;
    lab.finish();
    Ok(())
}

/// Sends what must not be let in, and waits until each has been counted as a drop.
fn dropped_and_counted(
    forger: &Forger,
    victim: &Host,
    what: &str,
    datagrams: &[Datagram],
) -> anyhow::Result<()> {
    let before = refused(victim)?;
    for datagram in datagrams {
        forger.send(datagram)?;
        // No faster than a receive buffer holds: what it loses is not the agent's to count.
        pace(Duration::from_micros(200));
    }
    let sent = datagrams.len() as f64;
    eventually(Duration::from_secs(20), &format!("{what}: {sent} drops are counted"), || {
        let counted = refused(victim)? - before;
        ensure!(counted == sent, "{counted} of {sent} are counted");
        Ok(())
    })
}

/// Drops of packets that could not be opened.
fn refused(host: &Host) -> anyhow::Result<f64> {
    let metrics = host.metrics()?;
    let reasons = ["replay", "auth", "unknown-peer", "no-key", "malformed", "epoch", "expired"];
    let drops = |reason| metrics.sum("weft_sealed_drops_total", &[&format!("reason=\"{reason}\"")]);
    Ok(reasons.into_iter().map(drops).sum())
}

fn random(source: SocketAddr, destination: SocketAddr) -> Vec<Datagram> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut byte = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    let lengths = [1, 8, 15, 16, 17, 31, 32, 39, 40, 41, 64, 300, 1400, 1472];
    let all = lengths.iter().cycle().take(280);
    all.enumerate()
        .map(|(count, &length)| {
            let mut payload: Vec<u8> = (0..length).map(|_| byte()).collect();
            // Half of them begin as a sealed packet does: version 1, with each of the suites.
            if count % 2 == 0 {
                payload[0] = 0x11 + (count / 2 % 3) as u8;
            }
            Datagram { source, destination, payload }
        })
        .collect()
}

/// One packet cut at each of its lengths, down to none.
fn cut(packets: &[Datagram]) -> Vec<Datagram> {
    let longest = packets.iter().max_by_key(|d| d.payload.len()).into_iter();
    longest
        .flat_map(|d| (0..d.payload.len()).map(|length| with(d, d.payload[..length].to_vec())))
        .collect()
}

/// Each packet with one bit flipped: of its header at first, then all over.
fn flipped(packets: &[Datagram]) -> Vec<Datagram> {
    let flip = |(count, datagram): (usize, &Datagram)| {
        let mut payload = datagram.payload.clone();
        let bits = payload.len() * 8;
        let bit = if count < 128 { count } else { count * 7919 } % bits;
        payload[bit / 8] ^= 1 << (bit % 8);
        with(datagram, payload)
    };
    packets.iter().cycle().take(400).enumerate().map(flip).collect()
}

fn readdressed(packets: &[Datagram], from: SocketAddr, to: SocketAddr) -> Vec<Datagram> {
    let packets = packets.iter().take(200);
    packets.map(|d| Datagram { source: from, destination: to, ..d.clone() }).collect()
}

fn with(datagram: &Datagram, payload: Vec<u8>) -> Datagram {
    Datagram { payload, ..datagram.clone() }
}

fn data_port(host: &Host) -> SocketAddr {
    let address: IpAddr = host.address();
    SocketAddr::new(address, PORT)
}
