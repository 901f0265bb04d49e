//! Packets on their way from one splitter to one coalescer.

use std::ops::Range;

use proptest::prelude::*;

use super::{
    Accepts, Arrival, Built, Coalescer, Headers, Part, Splitter, VNET_LEN, VnetHeader,
    reference::{Flow, ones},
};

pub(super) const ALL: Accepts = Accepts { tcp4: true, tcp6: true, udp: true };
pub(super) const PARTIAL: Part = Part { segment: false, partial: true, last: false, index: 0 };

/// Packets that were opened, as they lie in an arena.
#[derive(Default)]
pub(super) struct Wire {
    pub(super) arena: Vec<u8>,
    pub(super) arrivals: Vec<Arrival<usize>>,
}

impl Wire {
    pub(super) fn push(&mut self, bytes: &[u8], part: Part, counter: u64) {
        let start = self.arena.len();
        self.arena.extend(bytes);
        let frame: Range<usize> = start..self.arena.len();
        self.arrivals.push(Arrival { key: 0, counter, part, frame });
    }

    fn each(&self, accepts: Accepts, mut emit: impl FnMut(Built<'_, usize>)) {
        let mut coalescer = Coalescer::new(accepts);
        for arrival in &self.arrivals {
            if let Ok(headers) = Headers::parse(&self.arena[arrival.frame.clone()]) {
                let _ = coalescer.push(&self.arena, arrival.clone(), &headers, &mut emit);
            }
        }
        coalescer.flush(&self.arena, &mut emit);
    }

    /// What is written to the TAP.
    pub(super) fn coalesce(&self, accepts: Accepts) -> Vec<Vec<u8>> {
        let mut written = Vec::new();
        self.each(accepts, |built| {
            let bytes = built.to_vec();
            assert_eq!(bytes.len(), built.len());
            written.push(bytes);
        });
        written
    }

    /// What is written to the TAP, cut again.
    pub(super) fn again(&self, accepts: Accepts) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        for written in self.coalesce(accepts) {
            let vnet = VnetHeader::parse(&written).unwrap();
            let whole = split(vnet, &written[VNET_LEN..]);
            packets.extend(whole.into_iter().map(|(bytes, part)| completed(bytes, part.partial)));
        }
        packets
    }

    /// What was sent, but for what a receiver refuses.
    pub(super) fn sent(&self) -> Vec<Vec<u8>> {
        let accepted = |arrival: &&Arrival<usize>| {
            Headers::parse(&self.arena[arrival.frame.clone()]).is_ok_and(|headers| {
                headers.l4().is_some() || !(arrival.part.partial || arrival.part.segment)
            })
        };
        self.arrivals
            .iter()
            .filter(accepted)
            .map(|arrival| {
                completed(self.arena[arrival.frame.clone()].to_vec(), arrival.part.partial)
            })
            .collect()
    }
}

/// The packet with its checksum completed from the addresses and the payload, and without the
/// identification where it means nothing.
fn completed(mut bytes: Vec<u8>, partial: bool) -> Vec<u8> {
    let Some(l4) = Headers::parse(&bytes).unwrap().l4() else { return bytes };
    if partial {
        let field = l4.offset + l4.checksum_offset();
        bytes[field..field + 2].fill(0);
        let mut covered = bytes[l4.addresses()].to_vec();
        covered.extend([0, if l4.tcp.is_some() { 6 } else { 17 }]);
        covered.extend(((bytes.len() - l4.offset) as u32).to_be_bytes());
        covered.extend(&bytes[l4.offset..]);
        let checksum = match !ones(&covered) {
            0 => 0xffff,
            checksum => checksum,
        };
        bytes[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    let wrong_header = ones(&bytes[14..l4.offset]) != 0xffff;
    if !l4.v6 && bytes[20] & 0x40 != 0 && !wrong_header {
        bytes[18..20].fill(0);
        bytes[24..26].fill(0);
    }
    bytes
}

pub(super) fn split(vnet: VnetHeader, frame: &[u8]) -> Vec<(Vec<u8>, Part)> {
    let headers = Headers::parse(frame).unwrap();
    let splitter = Splitter::new(frame, &headers, vnet).unwrap();
    (0..splitter.segments())
        .map(|index| {
            let mut room = vec![0; splitter.segment_len(index)];
            assert_eq!(splitter.write(index, &mut room), room.len());
            (room, splitter.part(index))
        })
        .collect()
}

pub(super) fn split_super(flow: &Flow, payload: &[u8], size: u16) -> Vec<(Vec<u8>, Part, u64)> {
    let (vnet, frame) = flow.super_frame(payload, size);
    let segments = split(vnet, &frame).into_iter().enumerate();
    segments.map(|(counter, (bytes, part))| (bytes, part, counter as u64)).collect()
}

/// A payload and the size that it is cut to.
pub(super) fn cut() -> impl Strategy<Value = (Vec<u8>, u16)> {
    (1u16..2000, 1usize..40, any::<u8>(), any::<prop::sample::Index>()).prop_map(
        |(size, pieces, seed, last)| {
            let len = usize::from(size) * (pieces - 1) + 1 + last.index(usize::from(size));
            let payload = (0..len.min(65_000)).map(|at| (at as u8).wrapping_mul(31) ^ seed);
            (payload.collect(), size)
        },
    )
}
