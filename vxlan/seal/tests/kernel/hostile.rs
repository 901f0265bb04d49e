use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use weft_seal::DropReason;

use crate::{
    capture::{Capture, udp_payload},
    lab::{Lab, Options, PORT, Underlay, eventually, inner_v4},
    namespace::Namespace,
    stream::Content,
};

/// A socket of somebody on the switch who is no member.
fn outsider(lab: &Lab) -> UdpSocket {
    lab.switch.ip("addr add 192.0.2.99/24 dev br0");
    let socket = lab.switch.run(|| UdpSocket::bind("192.0.2.99:0").unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    socket
}

/// Sealed packets as they crossed.
fn sealed(lab: &Lab, during: impl FnOnce()) -> Vec<Vec<u8>> {
    let capture = Capture::of(&lab.host(2).namespace);
    during();
    let ports = [PORT, PORT + 1];
    let payload = |frame: &Vec<u8>| {
        ports.iter().find_map(|port| udp_payload(frame, *port)).map(<[u8]>::to_vec)
    };
    let found = eventually(Duration::from_secs(30), || {
        let packets: Vec<_> = capture.frames().iter().filter_map(payload).collect();
        (packets.len() > 4).then_some(packets)
    });
    found.expect("sealed packets cross")
}

#[test]
fn garbage_is_counted_and_answered_by_nothing() {
    let lab = Lab::new(Options::default());
    let outsider = outsider(&lab);
    let target = |port| SocketAddr::new(lab.address(2), port);
    let before = lab.host(2).counters();
    let mut bytes = Content::seeded(3).chunks(1 << 20).flatten();
    for size in (0..200).chain([1000, 1472]) {
        let garbage: Vec<u8> = bytes.by_ref().take(size).collect();
        outsider.send_to(&garbage, target(PORT)).unwrap();
        let mut plausible = garbage.clone();
        if let Some(kind) = plausible.first_mut() {
            *kind = 0x11;
        }
        if let Some(lane) = plausible.get_mut(1) {
            *lane = [0, 1, 255][size % 3];
        }
        outsider.send_to(&plausible, target(PORT + 1)).unwrap();
    }
    let counters = lab.host(2).until_counted(|counters| {
        counters.total.dropped(DropReason::Malformed)
            >= before.total.dropped(DropReason::Malformed) + 200
            && counters.total.dropped(DropReason::UnknownPeer)
                > before.total.dropped(DropReason::UnknownPeer) + 100
    });
    // What the containers' own kernels ask for meanwhile is no answer to garbage.
    let carried = |counters: &weft_seal::Counters| -> Vec<_> {
        let networks = counters.networks.iter();
        networks.map(|(&id, t)| (id, t.opened_packets, t.sealed_packets)).collect()
    };
    assert_eq!(carried(&counters), carried(&before));
    assert!(outsider.recv(&mut [0; 2000]).is_err(), "garbage was answered");
    lab.host(1).reaches(2);
}

#[test]
fn replays_and_flipped_bits_are_counted_and_answered_by_nothing() {
    let lab = Lab::new(Options::default());
    let packets = sealed(&lab, || {
        for _ in 0..5 {
            lab.host(1).reaches(2);
        }
    });
    let outsider = outsider(&lab);
    let carried = lab.host(2).counters().networks.clone();
    for packet in &packets {
        for port in [PORT, PORT + 1] {
            outsider.send_to(packet, SocketAddr::new(lab.address(2), port)).unwrap();
        }
    }
    let replayed = 2 * packets.len() as u64;
    let dropped = |counters: &weft_seal::Counters| {
        counters.total.dropped(DropReason::Replay) + counters.total.dropped(DropReason::UnknownPeer)
    };
    let counters = lab.host(2).until_counted(|counters| dropped(counters) >= replayed);
    assert!(counters.total.dropped(DropReason::Replay) >= 5, "{counters:#?}");

    // A counter that was not seen yet, so that only the AEAD can tell.
    for (index, packet) in packets.iter().enumerate() {
        for place in [0, 1, 2, 4, 8, 16, packet.len() / 2, packet.len() - 1] {
            let mut forged = packet.clone();
            forged[10] ^= 1;
            forged[place] ^= 1 << (index % 8);
            let address = SocketAddr::new(lab.address(2), PORT + (index % 2) as u16);
            outsider.send_to(&forged, address).unwrap();
            forged.truncate(place);
            outsider.send_to(&forged, address).unwrap();
        }
    }
    let counters =
        lab.host(2).until_counted(|counters| counters.total.dropped(DropReason::Auth) > 10);
    assert_eq!(
        counters.networks.values().map(|t| t.opened_packets).sum::<u64>(),
        carried.values().map(|t| t.opened_packets).sum::<u64>(),
    );
    assert!(outsider.recv(&mut [0; 2000]).is_err(), "a forged packet was answered");
    lab.host(1).reaches(2);
    let warnings = lab.host(2).tunnel.status().borrow().warnings.join("; ");
    assert!(!warnings.contains("thread"), "{warnings}");
}

#[test]
fn a_station_cannot_speak_for_another() {
    let lab = Lab::new(Options { hosts: 3, underlay: Underlay::V4, ..Options::default() });
    let liar = &lab.host(1).container;
    // The address that container 3 has, from container 1's own MAC.
    liar.ip("addr add 10.77.0.3/32 dev eth0");
    liar.command("ping", "-c 3 -i 0.2 -W 1 -I 10.77.0.3 10.77.0.2");
    lab.host(2).until_counted(|counters| counters.total.dropped(DropReason::Spoofed) >= 3);

    // And its MAC.
    set_mac(liar, "02:00:00:00:00:03");
    let before = lab.host(2).counters().total.dropped(DropReason::Spoofed);
    liar.command("ping", &format!("-c 3 -i 0.2 -W 1 {}", inner_v4(2)));
    lab.host(2).until_counted(|counters| counters.total.dropped(DropReason::Spoofed) >= before + 3);
}

fn set_mac(container: &Namespace, mac: &str) {
    container.ip(&format!("link set eth0 address {mac}"));
}
