//! How long a super-frame takes to be split and to be put together again, without crypto:
//! `cargo run --release -p weft-seal --example frames`.
#![expect(clippy::print_stdout, reason = "a benchmark's result goes to the terminal")]

use std::{
    hint::black_box,
    num::NonZeroU16,
    ops::Range,
    time::{Duration, Instant},
};

use weft_seal::frame::{
    Accepts, Arrival, Built, Checksum, Coalescer, Gso, GsoKind, Headers, Part, Splitter, VnetHeader,
};

fn main() {
    println!("payload copied, one core, median of {ROUNDS} rounds");
    for (name, tcp, size, payload) in [
        ("TCP, 64 KiB at 1348", true, 1348, 65_200),
        ("TCP, 64 KiB at 8848", true, 8848, 65_200),
        ("UDP, 64 KiB at 1372", false, 1372, 65_200),
        ("UDP, 64 x 64 bytes", false, 64, 4096),
    ] {
        let (vnet, frame) = super_frame(tcp, size, payload);
        let (mut arena, arrivals) = segments(vnet, &frame);
        let split = median(|| split(vnet, &frame, &mut arena));
        let mut written = vec![0; 70_000];
        let mut coalescer = Coalescer::new(Accepts { tcp4: true, tcp6: true, udp: true });
        let coalesce = median(|| coalesce(&mut coalescer, &arena, &arrivals, &mut written));
        let segments = arrivals.len();
        println!("{name:20} {segments:3} segments: split {split:5} ns, coalesce {coalesce:5} ns");
    }
}

fn split(vnet: VnetHeader, frame: &[u8], arena: &mut [u8]) {
    let headers = Headers::parse(black_box(frame)).expect("a good frame");
    let splitter = Splitter::new(frame, &headers, vnet).expect("a good frame");
    let mut start = 0;
    for index in 0..splitter.segments() {
        start += splitter.write(index, &mut arena[start..]);
        black_box(splitter.part(index));
    }
}

fn coalesce(
    coalescer: &mut Coalescer<u16>,
    arena: &[u8],
    arrivals: &[(Part, Range<usize>)],
    written: &mut [u8],
) {
    let mut write = |built: Built<'_, u16>| {
        built.with_slices(|slices| {
            let mut at = 0;
            for slice in slices {
                written[at..at + slice.len()].copy_from_slice(slice);
                at += slice.len();
            }
            black_box(&written[..at]);
        });
    };
    for (counter, (part, frame)) in arrivals.iter().enumerate() {
        let headers = Headers::parse(&arena[frame.clone()]).expect("a good segment");
        let counter = counter as u64;
        let arrival = Arrival { key: 1, counter, part: *part, frame: frame.clone() };
        coalescer.push(arena, arrival, &headers, &mut write).expect("a good segment");
    }
    coalescer.flush(arena, &mut write);
}

fn median(mut run: impl FnMut()) -> u128 {
    let mut rounds: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..REPEATS {
                run();
            }
            start.elapsed() / REPEATS
        })
        .collect();
    rounds.sort();
    rounds[ROUNDS / 2].as_nanos()
}

fn segments(vnet: VnetHeader, frame: &[u8]) -> (Vec<u8>, Vec<(Part, Range<usize>)>) {
    let headers = Headers::parse(frame).expect("a good frame");
    let splitter = Splitter::new(frame, &headers, vnet).expect("a good frame");
    let mut arena = vec![0; 100_000];
    let mut start = 0;
    let cut = |index| {
        let len = splitter.write(index, &mut arena[start..]);
        start += len;
        (splitter.part(index), start - len..start)
    };
    let arrivals = (0..splitter.segments()).map(cut).collect();
    (arena, arrivals)
}

/// A super-frame of IPv4; only what the code looks at is filled in.
fn super_frame(tcp: bool, size: u16, payload: usize) -> (VnetHeader, Vec<u8>) {
    let transport = if tcp { 32 } else { 8 };
    let total = (20 + transport + payload) as u16;
    let mut frame = vec![0; 34 + transport + payload];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
    frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    frame[20..24].copy_from_slice(&[0x40, 0, 64, if tcp { 6 } else { 17 }]);
    frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    if tcp {
        frame[46..48].copy_from_slice(&[8 << 4, 0x10]);
    } else {
        frame[38..40].copy_from_slice(&(total - 20).to_be_bytes());
    }
    let size = NonZeroU16::new(size).expect("a size");
    let vnet = VnetHeader {
        checksum: Checksum::Partial { start: 34, offset: if tcp { 16 } else { 6 } },
        gso: Some(Gso { kind: if tcp { GsoKind::Tcp4 } else { GsoKind::Udp }, size, ecn: false }),
        header_len: 0,
    };
    (vnet, frame)
}

const ROUNDS: usize = 21;
const REPEATS: u32 = 500;
