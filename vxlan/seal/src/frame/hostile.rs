//! What coalescing promises whatever a peer sends: cut again, what is written to the TAP is what
//! came.

use proptest::prelude::*;

use super::{
    Part, VNET_LEN,
    reference::{Flow, flow},
    wire::{ALL, PARTIAL, Wire, cut, split_super},
};

proptest! {
    #[test]
    fn hostile_packets_are_never_changed_by_coming_together(
        flow in flow(),
        (payload, size) in cut(),
        mutations in prop::collection::vec(mutation(), 0..12),
    ) {
        let mut packets: Vec<_> = split_super(&flow, &payload, size);
        for mutation in &mutations {
            mutation.apply(&mut packets);
        }
        let mut wire = Wire::default();
        for (bytes, part, counter) in &packets {
            wire.push(bytes, *part, *counter);
        }
        for frame in wire.coalesce(ALL) {
            prop_assert!(frame.len() <= VNET_LEN + 14 + 8 + 40 + 65_535);
        }
        let (mut again, mut sent) = (wire.again(ALL), wire.sent());
        again.sort();
        sent.sort();
        prop_assert_eq!(again, sent);
    }

    #[test]
    fn packets_that_nearly_continue_each_other_are_never_changed(
        flow in flow(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut wire = Wire::default();
        let mut flow = Flow { flags: 0x10, ..flow };
        for (counter, step) in steps.iter().enumerate() {
            let mut one = flow.clone();
            let bytes = step.packet(&mut one);
            wire.push(&bytes, Part { partial: step.partial, ..Part::default() }, counter as u64);
            flow.sequence = one.sequence.wrapping_add(step.len as u32);
            flow.identification = one.identification.wrapping_add(1);
        }
        let (mut again, mut sent) = (wire.again(ALL), wire.sent());
        again.sort();
        sent.sort();
        prop_assert_eq!(again, sent);
    }
}

#[test]
fn packets_come_together_only_if_all_but_the_place_is_the_same() {
    let first = Flow { options: vec![1; 4], tcp_options: vec![1; 12], ..Flow::tcp4() };
    let next = Flow { sequence: first.sequence + 1000, identification: 2, ..first.clone() };
    let written = |next: Flow| {
        let mut wire = Wire::default();
        wire.push(&first.packet(&[1; 1000], true), PARTIAL, 0);
        wire.push(&next.packet(&[2; 1000], true), PARTIAL, 1);
        wire.coalesce(ALL).len()
    };
    assert_eq!(written(next.clone()), 1);
    let fixed = Flow { identification: 77, ..next.clone() };
    assert_eq!(written(fixed), 1, "an identification that means nothing");
    for (what, other) in [
        ("sequence", Flow { sequence: next.sequence + 1, ..next.clone() }),
        ("a repeated packet", first.clone()),
        ("class", Flow { class: 3, ..next.clone() }),
        ("fragmentation", Flow { dont_fragment: false, ..next.clone() }),
        ("hop limit", Flow { hop_limit: 63, ..next.clone() }),
        ("IPv4 options", Flow { options: vec![0; 4], ..next.clone() }),
        ("fewer IPv4 options", Flow { options: Vec::new(), ..next.clone() }),
        ("TCP options", Flow { tcp_options: vec![0; 12], ..next.clone() }),
        ("fewer TCP options", Flow { tcp_options: vec![1; 8], ..next.clone() }),
        ("acknowledgement", Flow { acknowledgement: 8, ..next.clone() }),
        ("window", Flow { window: 3, ..next.clone() }),
        ("urgent pointer", Flow { urgent: 1, ..next.clone() }),
        ("ports", Flow { ports: [4001, 80], ..next.clone() }),
        ("SYN", Flow { flags: 0x12, ..next.clone() }),
        ("RST", Flow { flags: 0x14, ..next.clone() }),
        ("FIN", Flow { flags: 0x11, ..next.clone() }),
        ("URG", Flow { flags: 0x30, ..next.clone() }),
        ("ECE", Flow { flags: 0x50, ..next.clone() }),
        ("CWR", Flow { flags: 0x90, ..next.clone() }),
        ("no ACK", Flow { flags: 0, ..next }),
    ] {
        assert_eq!(written(other), 2, "{what}");
    }
}

#[test]
fn a_datagram_that_may_be_fragmented_keeps_its_identification() {
    let first = Flow { dont_fragment: false, ..Flow::udp4() };
    for (identification, frames) in [(2, 1), (1, 2), (3, 2)] {
        let mut wire = Wire::default();
        wire.push(&first.packet(&[1; 100], true), PARTIAL, 0);
        let next = Flow { identification, ..first.clone() };
        wire.push(&next.packet(&[1; 100], true), PARTIAL, 1);
        assert_eq!(wire.coalesce(ALL).len(), frames, "{identification}");
    }
}

#[test]
fn only_the_last_piece_may_be_shorter() {
    for (lens, frames) in [
        (&[100, 100, 99][..], 1),
        (&[100, 101], 2),
        (&[100, 99, 99], 2),
        (&[100, 99, 100], 2),
        (&[100, 0, 100], 3),
    ] {
        let mut wire = Wire::default();
        let mut flow = Flow::udp4();
        for &len in lens {
            wire.push(&flow.packet(&vec![1; len], true), PARTIAL, 0);
            flow.identification += 1;
        }
        assert_eq!(wire.coalesce(ALL).len(), frames, "{lens:?}");
        assert_eq!(wire.again(ALL), wire.sent());
    }
}

#[test]
fn no_super_frame_is_longer_than_a_packet_can_be() {
    for v6 in [false, true] {
        for tcp in [false, true] {
            let mut wire = Wire::default();
            let mut flow = Flow { v6, tcp, ..Flow::tcp4() };
            for _ in 0..100 {
                wire.push(&flow.packet(&[9; 8900], true), PARTIAL, 0);
                flow.sequence += 8900;
                flow.identification += 1;
            }
            let written = wire.coalesce(ALL);
            assert!(written.iter().all(|frame| frame.len() <= VNET_LEN + 14 + 65_535));
            assert_eq!(written.len(), 100_usize.div_ceil(7));
            assert_eq!(wire.again(ALL), wire.sent());
        }
    }
}

#[test]
fn a_partial_and_a_complete_checksum_do_not_mix() {
    let mut wire = Wire::default();
    for (index, partial) in [true, false, true].into_iter().enumerate() {
        let flow = Flow { identification: index as u16, ..Flow::udp4() };
        wire.push(&flow.packet(&[1; 100], partial), Part { partial, ..PARTIAL }, 0);
    }
    assert_eq!(wire.coalesce(ALL).len(), 3);
}

#[test]
fn a_segment_out_of_its_place_ends_a_super_frame() {
    let flow = Flow::udp4();
    let segment = |index| Part { segment: true, index, ..PARTIAL };
    for (what, second, counter, frames) in [
        ("the next", segment(1), 1, 1),
        ("an index left out", segment(2), 1, 2),
        ("a counter left out", segment(1), 2, 2),
        ("a frame of its own", PARTIAL, 1, 2),
    ] {
        let mut wire = Wire::default();
        let packets = flow.segments(&[4; 200], 100, true);
        wire.push(&packets[0], segment(0), 0);
        wire.push(&packets[1], second, counter);
        assert_eq!(wire.coalesce(ALL).len(), frames, "{what}");
    }
}

/// A packet that continues a flow, or nearly so; all its checksums are right.
#[derive(Clone, Debug)]
struct Step {
    len: usize,
    partial: bool,
    tweak: u8,
}

impl Step {
    fn packet(&self, flow: &mut Flow) -> Vec<u8> {
        match self.tweak {
            0 => flow.sequence = flow.sequence.wrapping_add(1),
            1 => flow.identification = flow.identification.wrapping_add(1),
            2 => flow.dont_fragment = !flow.dont_fragment,
            3 => flow.class ^= 4,
            4 => flow.window ^= 1,
            5 => flow.acknowledgement ^= 1,
            6 => flow.urgent ^= 1,
            7 => flow.flags ^= 0x08,
            8 => flow.flags ^= 0x01,
            9 => flow.flags ^= 0x40,
            10 => flow.flags ^= 0x80,
            11 => flow.hop_limit ^= 1,
            _ => {}
        }
        flow.packet(&vec![self.tweak; self.len], self.partial)
    }
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop::sample::select(vec![0usize, 1, 99, 100, 100, 100, 100, 100, 101]);
    (len, prop::bool::weighted(0.9), 0u8..40).prop_map(|(len, partial, tweak)| Step {
        len,
        partial,
        tweak,
    })
}

/// One thing that a hostile peer, or a bad network, does to a run of packets.
#[derive(Clone, Debug)]
enum Mutation {
    Flip { packet: prop::sample::Index, byte: prop::sample::Index, mask: u8 },
    Truncate { packet: prop::sample::Index, to: prop::sample::Index },
    Drop { packet: prop::sample::Index },
    Swap { packet: prop::sample::Index, with: prop::sample::Index },
    Repeat { packet: prop::sample::Index },
    Claim { packet: prop::sample::Index, part: Part, counter: u64 },
}

impl Mutation {
    fn apply(&self, packets: &mut Vec<(Vec<u8>, Part, u64)>) {
        if packets.is_empty() {
            return;
        }
        let count = packets.len();
        match self {
            Self::Flip { packet, byte, mask } => {
                let bytes = &mut packets[packet.index(count)].0;
                if !bytes.is_empty() {
                    let at = byte.index(bytes.len().min(90));
                    bytes[at] ^= mask;
                }
            }
            Self::Truncate { packet, to } => {
                let bytes = &mut packets[packet.index(count)].0;
                bytes.truncate(to.index(bytes.len() + 1));
            }
            Self::Drop { packet } => drop(packets.remove(packet.index(count))),
            Self::Swap { packet, with } => packets.swap(packet.index(count), with.index(count)),
            Self::Repeat { packet } => packets.push(packets[packet.index(count)].clone()),
            Self::Claim { packet, part, counter } => {
                let packet = &mut packets[packet.index(count)];
                (packet.1, packet.2) = (*part, *counter);
            }
        }
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    let part = (any::<bool>(), any::<bool>(), any::<bool>(), 0u8..6)
        .prop_map(|(segment, partial, last, index)| Part { segment, partial, last, index });
    prop_oneof![
        4 => (index(), index(), 1u8..).prop_map(|(packet, byte, mask)| Mutation::Flip { packet, byte, mask }),
        1 => (index(), index()).prop_map(|(packet, to)| Mutation::Truncate { packet, to }),
        1 => index().prop_map(|packet| Mutation::Drop { packet }),
        1 => (index(), index()).prop_map(|(packet, with)| Mutation::Swap { packet, with }),
        1 => index().prop_map(|packet| Mutation::Repeat { packet }),
        1 => (index(), part, 0u64..6).prop_map(|(packet, part, counter)| Mutation::Claim { packet, part, counter }),
    ]
}
