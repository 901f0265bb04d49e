use std::{net::UdpSocket, sync::Arc, time::Duration};

use weft_seal::{DropReason, Forwarding, PathStatus};

use crate::{
    capture::Capture,
    lab::{
        Host, Lab, Options, Underlay, eventually, forwarding, inner_v4, inner_v6, mac, network,
        node,
    },
    namespace::Namespace,
    stream,
};

const MARKER: &[u8] = b"a marker that must not be seen in clear";

fn send_marker(lab: &Lab, times: usize) {
    lab.host(1).container.run(|| {
        for address in [inner_v4(2), inner_v6(2)] {
            let socket = UdpSocket::bind("[::]:0").unwrap();
            let mapped = match address.parse().unwrap() {
                std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                std::net::IpAddr::V6(v6) => v6,
            };
            for _ in 0..times {
                // Without a neighbour the kernel may refuse: nothing leaves then either.
                let _ = socket.send_to(MARKER, (mapped, 4242));
            }
        }
    });
}

fn contains(frame: &[u8], needle: &[u8]) -> bool {
    frame.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn without_a_session_nothing_leaves() {
    let lab = Lab::strangers(Options::default());
    let capture = Capture::of(&lab.host(1).namespace);
    send_marker(&lab, 100);
    lab.host(1).until_counted(|counters| counters.total.dropped(DropReason::NoKey) > 0);
    assert!(!lab.host(1).container.pings(&inner_v4(2), 56));

    for frame in capture.end() {
        let ours = crate::capture::udp_payload(&frame, crate::lab::PORT).is_some();
        assert!(!ours && !contains(&frame, MARKER), "{frame:02x?}");
    }
}

#[test]
fn a_peer_without_the_feature_gets_nothing_and_the_status_says_why() {
    let mut lab = Lab::strangers(Options::default());
    lab.acquaint();
    let mut members = (**lab.host(1).members.borrow()).clone();
    members.peers.get_mut(&node(2)).unwrap().offer = None;
    lab.host(1).members.send_replace(members.into());

    send_marker(&lab, 10);
    lab.host(1).until_counted(|counters| counters.total.dropped(DropReason::NoOffer) > 0);
    lab.host(1).until(2, |status| {
        let said = status.fault.as_deref().is_some_and(|fault| fault.contains("takes no part"));
        said && status.path == PathStatus::Down
    });
}

#[test]
fn no_marker_no_inner_address_and_no_inner_mac_is_seen_on_the_underlay() {
    for underlay in [Underlay::V4, Underlay::V6] {
        let lab = Lab::new(Options { underlay, ..Options::default() });
        let [one, two] = [lab.host(1), lab.host(2)];
        let capture = Capture::of(&one.namespace);
        send_marker(&lab, 100);
        stream::udp(&one.container, &two.container, &inner_v6(2), &[1000; 20]);
        stream::tcp(&one.container, &two.container, &inner_v4(2), 1 << 20);
        one.reaches(2);

        let frames = capture.end();
        let sealed = frames.iter().filter(|frame| frame.len() > 100).count();
        assert!(sealed > 10, "{sealed} sealed packets were seen");
        let inner_v6 = "fd77::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
        for needle in [
            MARKER,
            &[2, 0, 0, 0, 0, 1],
            &[2, 0, 0, 0, 0, 2],
            &[10, 77, 0, 1, 10, 77, 0, 2],
            &inner_v6,
        ] {
            for frame in &frames {
                assert!(!contains(frame, needle), "{needle:02x?} in {frame:02x?}");
            }
        }
    }
}

#[test]
fn two_networks_that_packets_cannot_tell_apart_are_both_refused_and_say_so() {
    let lab = Lab::new(Options::default());
    let one = lab.host(1);
    one.reaches(2);
    let mut id = *network().as_bytes();
    id[15] ^= 1;
    let rival = Forwarding { network: id.into(), ..forwarding(1, 2) };
    let elsewhere = Namespace::new();
    let tap = elsewhere.run(|| one.tunnel.open_tap("tap0").unwrap());
    one.tunnel.carry(tap, Arc::new(rival.clone()));

    let status = one.tunnel.status();
    let refused = eventually(Duration::from_secs(30), || {
        let networks = status.borrow().networks.clone();
        let faults = networks.values().filter(|network| network.fault.is_some()).count();
        (faults == 2).then_some(())
    });
    assert!(refused.is_some(), "{:#?}", status.borrow().networks);
    assert!(!one.container.pings(&inner_v4(2), 56));
    assert!(one.counters().total.dropped(DropReason::UnknownNetwork) > 0);

    one.tunnel.drop_network(rival.network);
    one.reaches(2);
}

#[test]
fn who_claims_anothers_mac_does_not_get_what_is_for_its_addresses() {
    let lab = Lab::new(Options { hosts: 3, ..Options::default() });
    let [one, two, three] = [lab.host(1), lab.host(2), lab.host(3)];
    one.reaches(2);
    one.reaches(3);
    // Its container goes on using what it was told of host 2's.
    let mut claimed = forwarding(1, 3);
    claimed.stations.insert(mac(2), claimed.stations[&mac(3)].clone());
    assert!(one.tunnel.forward(Arc::new(claimed)));
    let opened = |host: &Host| host.counters().networks[&network()].opened_packets;
    let before = [two, three].map(opened);
    assert!(!one.container.pings(&inner_v4(2), 56));
    one.until_counted(|counters| counters.total.dropped(DropReason::UnknownDestination) > 0);
    assert_eq!([two, three].map(opened), before);
    one.reaches(3);
}
