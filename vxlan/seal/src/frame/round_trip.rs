//! What splitting and coalescing promise to each other, over any flow and any bytes.

use proptest::prelude::*;

use super::{
    Accepts, Arrival, Coalescer, Headers, Part,
    reference::{Flow, flow, ones, unusual_flow},
    wire::{ALL, PARTIAL, Wire, cut, split},
};

proptest! {
    #[test]
    fn segments_are_those_of_a_network_card(flow in flow(), (payload, size) in cut()) {
        let (vnet, frame) = flow.super_frame(&payload, size);
        let segments = split(vnet, &frame);
        let bytes: Vec<_> = segments.iter().map(|(bytes, _)| bytes.clone()).collect();
        prop_assert_eq!(bytes, flow.segments(&payload, size, true));
    }

    #[test]
    fn a_segment_once_completed_has_the_right_checksum(flow in flow(), (payload, size) in cut()) {
        let (vnet, frame) = flow.super_frame(&payload, size);
        let complete = flow.segments(&payload, size, false);
        for ((mut bytes, part), expected) in split(vnet, &frame).into_iter().zip(complete) {
            prop_assert!(part.partial);
            let l4 = Headers::parse(&bytes).unwrap().l4().unwrap();
            let checksum = match !ones(&bytes[l4.offset..]) { 0 => 0xffff, sum => sum };
            let field = l4.offset + l4.checksum_offset();
            bytes[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
            prop_assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn an_unusual_super_frame_becomes_complete_packets(flow in unusual_flow(), (payload, size) in cut()) {
        let (vnet, frame) = flow.super_frame(&payload, size);
        let segments = split(vnet, &frame);
        for (_, part) in &segments {
            prop_assert_eq!(*part, Part::default());
        }
        let bytes: Vec<_> = segments.into_iter().map(|(bytes, _)| bytes).collect();
        prop_assert_eq!(bytes, flow.segments(&payload, size, false));
    }

    #[test]
    fn what_was_split_comes_together_again(flow in flow(), (payload, size) in cut()) {
        let (vnet, frame) = flow.super_frame(&payload, size);
        let mut wire = Wire::default();
        for (counter, (bytes, part)) in split(vnet, &frame).into_iter().enumerate() {
            wire.push(&bytes, part, counter as u64);
        }
        // Runs of more pieces than one super-frame may have become several.
        if wire.arrivals.len() <= super::MAX_PIECES {
            let written = wire.coalesce(ALL);
            prop_assert_eq!(written.len(), 1);
            let vnet = if wire.arrivals.len() == 1 { flow.partial_vnet() } else { vnet };
            prop_assert_eq!(&written[0], &[&vnet.to_bytes()[..], &frame].concat());
        }
        prop_assert_eq!(wire.again(ALL), wire.sent());
    }

    #[test]
    fn plain_packets_of_one_flow_come_together(tcp: bool, v6: bool, partial: bool, (payload, size) in cut()) {
        let flow = Flow { tcp, v6, ..Flow::tcp4() };
        let mut wire = Wire::default();
        for (counter, bytes) in flow.segments(&payload, size, partial).iter().enumerate() {
            wire.push(bytes, Part { partial, ..Part::default() }, counter as u64 * 3);
        }
        let limit = wire.arrivals.len().div_ceil(super::MAX_PIECES);
        prop_assert_eq!(wire.coalesce(ALL).len(), limit);
        prop_assert_eq!(wire.coalesce(Accepts::default()).len(), wire.arrivals.len());
        prop_assert_eq!(wire.again(ALL), wire.sent());
    }
}

#[test]
fn flows_that_alternate_come_together_each_for_itself() {
    let payload = vec![7; 4000];
    let mut wire = Wire::default();
    for index in 0..4 {
        for port in 1..=3 {
            let flow = Flow { ports: [port, 9], ..Flow::udp4() };
            let bytes = &flow.segments(&payload, 1000, true)[index];
            wire.push(bytes, PARTIAL, 0);
        }
    }
    assert_eq!(wire.coalesce(ALL).len(), 3);
}

#[test]
fn more_flows_than_can_be_held_lose_nothing() {
    let mut wire = Wire::default();
    for round in 0..3u8 {
        for port in 0..9 {
            let flow = Flow { ports: [port, 9], identification: round.into(), ..Flow::udp4() };
            wire.push(&flow.packet(&[round; 100], true), PARTIAL, 0);
        }
    }
    let (mut again, mut sent) = (wire.again(ALL), wire.sent());
    again.sort();
    sent.sort();
    assert_eq!(again, sent);
}

#[test]
fn two_peers_with_the_same_flow_are_kept_apart() {
    let flow = Flow::udp4();
    let mut wire = Wire::default();
    for (index, bytes) in flow.segments(&[1; 3000], 1000, true).iter().enumerate() {
        wire.push(bytes, PARTIAL, 0);
        wire.arrivals[index].key = index % 2;
    }
    assert_eq!(wire.coalesce(ALL).len(), 2);
}

#[test]
fn a_hole_ends_a_super_frame() {
    let (vnet, frame) = Flow::tcp4().super_frame(&[5; 5000], 1000);
    for hole in 1..4 {
        let mut wire = Wire::default();
        for (counter, (bytes, part)) in split(vnet, &frame).into_iter().enumerate() {
            if counter != hole {
                wire.push(&bytes, part, counter as u64);
            }
        }
        assert_eq!(wire.coalesce(ALL).len(), 2, "without {hole}");
        assert_eq!(wire.again(ALL), wire.sent());
    }
}

#[test]
fn an_acknowledgement_goes_after_the_data_that_came_before_it() {
    let flow = Flow::tcp4();
    let mut wire = Wire::default();
    for bytes in flow.segments(&[5; 3000], 1000, true) {
        wire.push(&bytes, PARTIAL, 0);
    }
    wire.push(&Flow { sequence: flow.sequence + 3000, ..flow }.packet(&[], true), PARTIAL, 0);
    let written = wire.coalesce(ALL);
    assert_eq!(written.iter().map(Vec::len).collect::<Vec<_>>(), [10 + 54 + 3000, 10 + 54]);
}

#[test]
fn a_checksum_that_was_wrong_stays_wrong() {
    for (field, part) in
        [(24, PARTIAL), (24, Part::default()), (40, Part::default()), (60, Part::default())]
    {
        let mut wire = Wire::default();
        for (index, mut bytes) in
            Flow::udp4().segments(&[5; 3000], 1000, part.partial).into_iter().enumerate()
        {
            if index == 1 {
                bytes[field] ^= 1;
            }
            wire.push(&bytes, part, 0);
        }
        assert_eq!(wire.coalesce(ALL).len(), 3, "byte {field}");
        assert_eq!(wire.again(ALL), wire.sent());
    }
}

#[test]
fn udp_without_a_checksum_stays_without() {
    let (mut vnet, mut frame) = Flow::udp4().super_frame(&[3; 2500], 1000);
    frame[40..42].fill(0);
    vnet.checksum = super::Checksum::Unchecked;
    let segments = split(vnet, &frame);
    assert_eq!(segments.len(), 3);
    let mut wire = Wire::default();
    for (counter, (bytes, part)) in segments.iter().enumerate() {
        assert_eq!((&bytes[40..42], part.partial), (&[0, 0][..], false));
        wire.push(bytes, *part, counter as u64);
    }
    assert_eq!(wire.coalesce(ALL).len(), 3);
}

#[test]
fn what_claims_to_be_partial_must_be_tcp_or_udp() {
    let arp = [&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 6][..], &[0; 28]].concat();
    let headers = Headers::parse(&arp).unwrap();
    for part in [PARTIAL, Part { segment: true, ..Part::default() }] {
        let arrival = Arrival { key: 0, counter: 0, part, frame: 0..arp.len() };
        let refused = Coalescer::new(ALL).push(&arp, arrival, &headers, |_| {});
        assert_eq!(refused, Err(super::Malformed::Unusual));
    }
}
