//! Packets of a fixed secret, as docs/sealed.md prints them: whoever changes one changes the
//! format.

use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::Suite;

use super::*;

/// A packet whose every input is fixed.
struct Vector {
    sender: Role,
    lane: u8,
    suite: Suite,
    /// In epochs of two packets each, the packet that this many were sealed before.
    counter: u64,
    epoch: u16,
    packet: &'static str,
}

const VECTORS: [Vector; 3] = [
    Vector {
        sender: Role::Dialler,
        lane: 0,
        suite: Suite::Aes128Gcm,
        counter: 0,
        epoch: 0,
        packet: "1100000060defa970000000000000000319ae9c79abfb08bbc3e3b20c21cf084fa10907ab798281f\
                 6324242a7c5155a1b8ef96a96b0a43eb85299d29aedb12333cec3561d0317dc79a13515e3de1569f\
                 239a3c9d0131120756f94fd25cf7b6cf6b78bb88",
    },
    Vector {
        sender: Role::Dialler,
        lane: 3,
        suite: Suite::Aes256Gcm,
        counter: 2,
        epoch: 1,
        packet: "1203010060defa9702000000000000003855a2fda64ead7e128657bf062ef49e68a66544f320e34e\
                 ddd410e706dc3a1bc40f50e9aaec710fcfa6ac65b8a0a83cec52763d5e9a4dc2bf3016e13535dc86\
                 40a804d36736cfcc18cebda6451f07bbbbb0291d",
    },
    Vector {
        sender: Role::Acceptor,
        lane: 255,
        suite: Suite::Chacha20Poly1305,
        counter: 4,
        epoch: 2,
        packet: "13ff0200fdb1f99e0400000000000000a4e7b1b8ba89a32372b75cc2fd68c7a086218da9f47339d3\
                 af77ba1924bf099db4c3b3e3ee6671c453a372ced70fff39cdcc01bfc6f67824e5474060c5a8dd61\
                 e1d1313cf4c155f01d4d6c08aae6b1f6c82184cd",
    },
];

#[test]
fn packets_of_a_fixed_secret_are_those_of_the_document() {
    for vector in VECTORS {
        let start = Instant::now();
        let (root, lane) = (root(vector.sender, start), Lane::try_from(vector.lane).unwrap());
        assert_eq!(root.id().to_string(), "5e45685e8d8290c7");
        let limits = Limits { packets: 2, ..Limits::default() };
        let mut sealer = root.sealer(lane, vector.suite, limits).unwrap();
        let mut packet = Vec::new();
        for _ in 0..=vector.counter {
            packet = unsealed();
            sealer.seal(start, &mut packet).unwrap();
        }
        let header = Header::decode(&packet).unwrap();
        assert_eq!((header.epoch, header.counter), (vector.epoch, vector.counter));
        assert_eq!(hex::encode(&packet), vector.packet, "{:?}", vector.suite);
    }
}

#[test]
fn the_document_prints_these_packets() {
    let document = include_str!("../../../../docs/sealed.md").replace('\n', "");
    for vector in VECTORS {
        assert!(document.contains(vector.packet), "{:?}", vector.suite);
    }
}

#[test]
fn the_documents_packets_open_at_the_other_end() {
    for vector in VECTORS {
        let start = Instant::now();
        let receiver = match vector.sender {
            Role::Dialler => Role::Acceptor,
            Role::Acceptor => Role::Dialler,
        };
        let lane = Lane::try_from(vector.lane).unwrap();
        let mut opener = root(receiver, start).opener(lane, &[vector.suite]).unwrap();
        let mut packet = hex::decode(vector.packet).unwrap();
        let opened = opener.open(start, &mut packet).unwrap();
        assert_eq!(opened, &unsealed()[HEADER..][..META + FRAME]);
    }
}

const FRAME: usize = 60;

fn root(role: Role, start: Instant) -> Arc<Root> {
    let secret = std::array::from_fn(|at| at as u8);
    Arc::new(Root::new(&secret, role, start + Duration::from_secs(60)))
}

fn unsealed() -> Vec<u8> {
    let mut packet = vec![0; OVERHEAD + FRAME];
    let (meta, rest) = packet[HEADER..].split_first_chunk_mut().unwrap();
    let flags = Flags::PARTIAL_CHECKSUM;
    Meta { content: Content::Frame, flags, index: 0, network: 0x0403_0201 }.encode(meta);
    for (byte, at) in rest[..FRAME].iter_mut().zip(0..) {
        *byte = at;
    }
    packet
}
