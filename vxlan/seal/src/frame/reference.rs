//! Packets made and cut byte by byte, with nothing of the code that they test.

use std::num::NonZeroU16;

use proptest::prelude::*;

use super::{Checksum, Gso, GsoKind, VnetHeader};

/// A flow, and all that its headers say.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) v6: bool,
    pub(super) tcp: bool,
    pub(super) tags: Vec<[u8; 4]>,
    /// IPv4 options, or whole IPv6 extension headers of the kind "destination options".
    pub(super) options: Vec<u8>,
    pub(super) tcp_options: Vec<u8>,
    pub(super) ports: [u16; 2],
    pub(super) sequence: u32,
    pub(super) flags: u8,
    pub(super) identification: u16,
    pub(super) dont_fragment: bool,
    pub(super) class: u8,
    pub(super) hop_limit: u8,
    pub(super) acknowledgement: u32,
    pub(super) window: u16,
    pub(super) urgent: u16,
}

impl Flow {
    pub(super) fn tcp4() -> Self {
        Self {
            v6: false,
            tcp: true,
            tags: Vec::new(),
            options: Vec::new(),
            tcp_options: Vec::new(),
            ports: [4000, 80],
            sequence: 7,
            flags: 0x10,
            identification: 1,
            dont_fragment: true,
            class: 0,
            hop_limit: 64,
            acknowledgement: 9,
            window: 258,
            urgent: 0,
        }
    }

    pub(super) fn udp4() -> Self {
        Self { tcp: false, ..Self::tcp4() }
    }

    /// One packet. `partial`: with the sum of the pseudo-header where the checksum goes.
    pub(super) fn packet(&self, payload: &[u8], partial: bool) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.ports.map(u16::to_be_bytes).concat());
        let protocol = if self.tcp {
            transport.extend(self.sequence.to_be_bytes());
            transport.extend(self.acknowledgement.to_be_bytes());
            transport.extend([(5 + self.tcp_options.len() as u8 / 4) << 4, self.flags]);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0, 0]);
            transport.extend(self.urgent.to_be_bytes());
            transport.extend(&self.tcp_options);
            6
        } else {
            transport.extend((8 + payload.len() as u16).to_be_bytes());
            transport.extend([0, 0]);
            17
        };
        transport.extend(payload);

        let (source, destination) = self.addresses();
        let mut covered = [source.clone(), destination.clone()].concat();
        covered.extend([0, protocol]);
        covered.extend((transport.len() as u32).to_be_bytes());
        let checksum = if partial {
            ones(&covered)
        } else {
            covered.extend(&transport);
            match !ones(&covered) {
                0 => 0xffff,
                checksum => checksum,
            }
        };
        let field = if self.tcp { 16 } else { 6 };
        transport[field..field + 2].copy_from_slice(&checksum.to_be_bytes());

        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        frame.extend(self.tags.concat());
        frame.extend(if self.v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        frame.extend(self.ip_header(protocol, transport.len()));
        frame.extend(&transport);
        frame
    }

    fn addresses(&self) -> (Vec<u8>, Vec<u8>) {
        if self.v6 {
            let address = |last| [&[0xfd; 15][..], &[last]].concat();
            (address(1), address(2))
        } else {
            (vec![10, 0, 0, 1], vec![10, 0, 0, 2])
        }
    }

    fn ip_header(&self, protocol: u8, transport: usize) -> Vec<u8> {
        let (source, destination) = self.addresses();
        let mut header = Vec::new();
        if self.v6 {
            header.extend([0x60 | self.class >> 4, self.class << 4, 0, 5]);
            header.extend(((self.options.len() + transport) as u16).to_be_bytes());
            header.extend([if self.options.is_empty() { protocol } else { 60 }, self.hop_limit]);
            header.extend([source, destination].concat());
            let mut options = self.options.clone();
            if let Some(next) = options.first_mut() {
                *next = protocol;
            }
            header.extend(options);
            return header;
        }
        let len = 20 + self.options.len();
        header.extend([0x40 | (len / 4) as u8, self.class]);
        header.extend(((len + transport) as u16).to_be_bytes());
        header.extend(self.identification.to_be_bytes());
        header.extend([
            if self.dont_fragment { 0x40 } else { 0 },
            0,
            self.hop_limit,
            protocol,
            0,
            0,
        ]);
        header.extend([source, destination, self.options.clone()].concat());
        let checksum = !ones(&header);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        header
    }

    /// Bytes of all headers.
    pub(super) fn header_len(&self) -> usize {
        self.packet(&[], true).len()
    }

    /// A frame as the kernel gives it to a TAP that offers segmentation.
    pub(super) fn super_frame(&self, payload: &[u8], size: u16) -> (VnetHeader, Vec<u8>) {
        let kind = match (self.tcp, self.v6) {
            (false, _) => GsoKind::Udp,
            (true, false) => GsoKind::Tcp4,
            (true, true) => GsoKind::Tcp6,
        };
        let size = NonZeroU16::new(size).unwrap();
        let ecn = self.tcp && self.flags & 0x80 != 0;
        let header_len = self.header_len() as u16;
        let vnet =
            VnetHeader { gso: Some(Gso { kind, size, ecn }), header_len, ..self.partial_vnet() };
        (vnet, self.packet(payload, true))
    }

    /// What the kernel says of a single packet with a partial checksum.
    pub(super) fn partial_vnet(&self) -> VnetHeader {
        let start = 14 + 4 * self.tags.len() + self.options.len() + if self.v6 { 40 } else { 20 };
        let offset = if self.tcp { 16 } else { 6 };
        VnetHeader {
            checksum: Checksum::Partial { start: start as u16, offset },
            ..VnetHeader::default()
        }
    }

    /// The packets that a network card makes of a super-frame.
    pub(super) fn segments(&self, payload: &[u8], size: u16, partial: bool) -> Vec<Vec<u8>> {
        let pieces: Vec<_> = payload.chunks(usize::from(size)).collect();
        let mut flow = self.clone();
        let mut packets = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            let mut flags = self.flags;
            if index != 0 {
                flags &= 0x7f;
            }
            if index != pieces.len() - 1 {
                flags &= 0xf6;
            }
            flow.flags = flags;
            packets.push(flow.packet(piece, partial));
            flow.identification = flow.identification.wrapping_add(1);
            flow.sequence = flow.sequence.wrapping_add(piece.len() as u32);
        }
        packets
    }
}

/// Any flow of the usual layout.
pub(super) fn flow() -> impl Strategy<Value = Flow> {
    let shape = (any::<bool>(), any::<bool>(), 0usize..3, 0usize..4);
    let numbers = (any::<u32>(), any::<u16>(), any::<bool>(), any::<u8>(), any::<[u16; 2]>());
    let flags = prop::sample::select(vec![0x10, 0x18, 0x11, 0x19, 0x50, 0x90, 0xd8]);
    (shape, numbers, flags).prop_map(|((v6, tcp, options, tcp_options), numbers, flags)| {
        let (sequence, identification, dont_fragment, class, ports) = numbers;
        Flow {
            v6,
            tcp,
            tags: Vec::new(),
            options: if v6 { Vec::new() } else { vec![1; options * 4] },
            tcp_options: vec![1; tcp_options * 4],
            ports,
            sequence,
            flags,
            identification,
            dont_fragment,
            class,
            ..Flow::tcp4()
        }
    })
}

/// The same with VLAN tags or an IPv6 extension header.
pub(super) fn unusual_flow() -> impl Strategy<Value = Flow> {
    (flow(), 0usize..3).prop_map(|(mut flow, tags)| {
        flow.tags = [[0x88, 0xa8, 0, 5], [0x81, 0, 0, 6]][2 - tags..].to_vec();
        if flow.v6 {
            flow.options = vec![0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        } else if tags == 0 {
            flow.tags = vec![[0x81, 0, 0, 6]];
        }
        flow
    })
}

/// The one's complement sum, a byte pair at a time.
pub(super) fn ones(bytes: &[u8]) -> u16 {
    let mut total = 0u32;
    for (index, &byte) in bytes.iter().enumerate() {
        total += u32::from(byte) << if index % 2 == 0 { 8 } else { 0 };
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}
