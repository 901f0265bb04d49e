use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use weft_model::Suite;
use weft_seal::{DropReason, Forwarding, Offload, OffloadState, OffloadSwitches};

use crate::{
    lab::{
        Host, Lab, Options, Underlay, eventually, forwarding, inner_v4, inner_v6, network, node,
    },
    namespace::Namespace,
    stream,
};

/// Sizes around what headers, segments and fragments begin and end with.
const SIZES: [usize; 12] = [1, 17, 63, 64, 100, 1300, 1370, 1371, 1472, 4000, 20_000, 60_000];

fn everything_crosses(options: Options) {
    let lab = Lab::new(options);
    let [one, two] = [lab.host(1), lab.host(2)];
    one.reaches(2);
    for address in [inner_v4(2), inner_v6(2)] {
        for bytes in [0, 56, 1300] {
            assert!(one.container.pings(&address, bytes), "{address} {bytes}");
        }
        stream::tcp(&one.container, &two.container, &address, 16 << 20);
        stream::udp(&one.container, &two.container, &address, &SIZES);
    }
    stream::tcp(&two.container, &one.container, &inner_v4(1), 16 << 20);

    let counters = one.counters();
    assert!(counters.networks[&network()].sealed_bytes > 32 << 20, "{counters:#?}");
    assert!(counters.networks[&network()].opened_bytes > 16 << 20, "{counters:#?}");
    for host in lab.hosts.into_values() {
        host.stop();
    }
}

#[test]
fn everything_crosses_an_ipv4_underlay() {
    everything_crosses(Options::default());
}

#[test]
fn everything_crosses_an_ipv6_underlay() {
    everything_crosses(Options { underlay: Underlay::V6, ..Options::default() });
}

#[test]
fn everything_crosses_by_one_lane_and_by_four() {
    everything_crosses(Options { lanes: 1, ..Options::default() });
    everything_crosses(Options { lanes: 4, ..Options::default() });
}

#[test]
fn everything_crosses_without_any_offload() {
    everything_crosses(Options { offloads: OffloadSwitches::ALL_OFF, ..Options::default() });
}

#[test]
fn everything_crosses_without_each_offload() {
    for off in Offload::ALL {
        let mut offloads = OffloadSwitches::ALL_ON;
        match off {
            Offload::TapTso => offloads.tap_tso = false,
            Offload::TapUso => offloads.tap_uso = false,
            Offload::UdpSegment => offloads.udp_segment = false,
            Offload::UdpGro => offloads.udp_gro = false,
        }
        everything_crosses(Options { offloads, ..Options::default() });
    }
}

#[test]
fn offloads_are_used_and_a_switch_turns_each_off() {
    for switches in [OffloadSwitches::ALL_ON, OffloadSwitches::ALL_OFF] {
        let lab = Lab::new(Options { offloads: switches, ..Options::default() });
        let [one, two] = [lab.host(1), lab.host(2)];
        stream::tcp(&one.container, &two.container, &inner_v4(2), 32 << 20);

        let status = |host: &Host| {
            let status = host.tunnel.status();
            let wanted = eventually(Duration::from_secs(30), || {
                let shown = status.borrow().clone();
                let used = shown.offloads.iter().any(|offload| offload.used > 0);
                (used == switches.tap_tso).then_some(shown)
            });
            wanted.unwrap_or_else(|| panic!("{:#?}", status.borrow().offloads)).offloads.clone()
        };
        for (host, offload) in [
            (one, Offload::TapTso),
            (one, Offload::UdpSegment),
            (two, Offload::UdpGro),
            (two, Offload::TapTso),
        ] {
            let all = status(host);
            let one = all.iter().find(|status| status.offload == offload).unwrap();
            match switches.allows(offload) {
                true => assert!(one.state.is_on() && one.used > 0, "{one:?}"),
                false => assert_eq!((&one.state, one.used), (&OffloadState::Off, 0)),
            }
        }
    }
}

#[test]
fn a_tap_that_is_made_again_carries_on() {
    let lab = Lab::new(Options::default());
    let [one, two] = [lab.host(1), lab.host(2)];
    one.reaches(2);
    let broken = one.tunnel.broken();
    assert!(broken.borrow().is_empty());

    one.network.ip("link del tap0");
    let told =
        eventually(Duration::from_secs(30), || broken.borrow().contains(&network()).then_some(()));
    assert!(told.is_some(), "nobody says that the TAP has gone");

    one.carry(2);
    assert!(broken.borrow().is_empty());
    one.reaches(2);
    stream::tcp(&two.container, &one.container, &inner_v4(1), 4 << 20);
}

#[test]
fn a_tap_outlives_its_tunnel_and_serves_the_next_one() {
    let lab = Lab::new(Options::default());
    let first = lab.host(1);
    let before = index(&first.network);
    first.carry(2);
    first.carry(2);
    assert_eq!(index(&first.network), before, "the TAP was made anew");
    first.reaches(2);
}

#[test]
fn a_dropped_network_carries_nothing() {
    let lab = Lab::new(Options::default());
    let one = lab.host(1);
    one.reaches(2);
    one.tunnel.drop_network(network());
    assert!(!one.container.pings(&inner_v4(2), 56));
    one.carry(2);
    one.reaches(2);
}

#[test]
fn multicast_reaches_the_hosts_of_the_flood_list_and_no_other() {
    let lab = Lab::new(Options { hosts: 3, ..Options::default() });
    let forwarding = |flood: &[u8]| {
        let flood = flood.iter().map(|number| node(*number)).collect();
        Arc::new(Forwarding { flood, ..forwarding(1, 3) })
    };
    assert!(lab.host(1).tunnel.forward(forwarding(&[2])));
    let receivers = [2, 3].map(|number| {
        lab.host(number).container.run(|| {
            let socket = UdpSocket::bind("239.1.1.1:4242").unwrap();
            let own = inner_v4(number).parse().unwrap();
            socket.join_multicast_v4(&Ipv4Addr::new(239, 1, 1, 1), &own).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        })
    });
    let sender = lab.host(1).container.run(|| {
        let socket = UdpSocket::bind((inner_v4(1), 0)).unwrap();
        socket.set_multicast_ttl_v4(2).unwrap();
        socket
    });
    let received = |receiver: &UdpSocket| receiver.recv(&mut [0; 100]).is_ok().then_some(());
    let hears = |receiver: &UdpSocket| {
        let heard = eventually(Duration::from_secs(30), || {
            lab.host(1).container.run(|| sender.send_to(b"all", "239.1.1.1:4242")).ok()?;
            received(receiver)
        });
        heard.is_some()
    };
    assert!(hears(&receivers[0]));
    assert!(received(&receivers[1]).is_none());
    assert!(lab.host(1).tunnel.forward(forwarding(&[3])));
    assert!(hears(&receivers[1]));

    assert!(lab.host(1).tunnel.forward(forwarding(&[])));
    let before = lab.host(1).counters().total.dropped(DropReason::Unanswerable);
    sender.send_to(b"all", "239.1.1.1:4242").unwrap();
    lab.host(1).until_counted(|c| c.total.dropped(DropReason::Unanswerable) > before);
}

#[test]
fn a_neighbour_that_nobody_has_is_not_asked_for_on_the_underlay() {
    let lab = Lab::new(Options::default());
    let before = lab.host(1).counters().networks[&network()].clone();
    assert!(!lab.host(1).container.pings("10.77.0.99", 56));
    assert!(!lab.host(1).container.pings("fd77::99", 56));
    let after = lab.host(1).counters().networks[&network()].clone();
    assert_eq!(after.sealed_packets, before.sealed_packets);
    assert!(
        after.dropped(DropReason::Unanswerable) >= before.dropped(DropReason::Unanswerable) + 2
    );
}

fn index(network: &Namespace) -> String {
    let shown = network.command("ip", "-o link show tap0");
    let text = String::from_utf8(shown.stdout).unwrap();
    text.split(':').next().unwrap().to_owned()
}

#[test]
fn a_session_uses_what_the_sender_likes_best() {
    let lab = Lab::new(Options::default());
    let status = lab.host(1).status(2).unwrap();
    assert_eq!(status.suite, Some(Suite::Aes128Gcm));
    assert_eq!(status.path_mtu, Some(1500));
}
