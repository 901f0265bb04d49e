use std::{io::IoSlice, num::NonZeroU16, ops::Range};

use super::{
    checksum::{fold, pseudo_header, sum},
    headers::{ETHERNET_LEN, IPV6_LEN, L4},
    split::{ACK, CWR, ECE, FIN, PSH, Part, put, word},
    vnet::{Checksum, Gso, GsoKind, VNET_LEN, VnetHeader},
};

/// Most pieces of payload that a super-frame is put together from.
pub const MAX_PIECES: usize = 128;

/// A frame for the TAP, complete with its vnet header, in pieces to be written by one `writev`.
#[derive(Debug)]
pub struct Built<'a, K> {
    /// Whose frame it is: as it was given with the packets.
    pub key: K,
    pub vnet: VnetHeader,
    /// How many packets it was put together from.
    pub packets: usize,
    pub(super) head: &'a [u8],
    pub(super) arena: &'a [u8],
    pub(super) pieces: &'a [Piece],
}

/// Where a piece lies in the arena.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Piece {
    start: u32,
    len: u32,
}

impl<K> Built<'_, K> {
    /// Length in bytes, with the vnet header.
    pub fn len(&self) -> usize {
        self.head.len() + self.pieces.iter().map(|piece| piece.len as usize).sum::<usize>()
    }

    /// Never true: there always is a header.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Calls `write` with the vnet header and the frame, in order, and gives what it gives.
    pub fn with_slices<R>(&self, write: impl FnOnce(&[IoSlice<'_>]) -> R) -> R {
        if let [piece] = self.pieces {
            return write(&[IoSlice::new(self.head), IoSlice::new(&self.arena[piece.range()])]);
        }
        let mut slices = [IoSlice::new(&[]); MAX_PIECES + 1];
        slices[0] = IoSlice::new(self.head);
        for (slice, piece) in slices[1..].iter_mut().zip(self.pieces) {
            *slice = IoSlice::new(&self.arena[piece.range()]);
        }
        write(&slices[..=self.pieces.len()])
    }

    /// All in one: for tests and for what is not the fast path.
    pub fn to_vec(&self) -> Vec<u8> {
        self.with_slices(|slices| slices.iter().flat_map(|slice| slice.to_vec()).collect())
    }
}

impl Piece {
    fn range(self) -> Range<usize> {
        self.start as usize..(self.start + self.len) as usize
    }
}

impl From<Range<usize>> for Piece {
    fn from(range: Range<usize>) -> Self {
        debug_assert!(range.end <= u32::MAX as usize, "an arena of less than 4 GiB");
        Self { start: range.start as u32, len: range.len() as u32 }
    }
}

/// One packet of the usual layout, checked as far as it can be alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a, K> {
    pub(super) key: K,
    pub(super) counter: u64,
    pub(super) part: Part,
    pub(super) l4: L4,
    /// The frame from the Ethernet header to the end.
    pub(super) frame: &'a [u8],
    /// Where the frame begins in the arena.
    pub(super) start: usize,
}

impl<K> Candidate<'_, K> {
    pub(super) fn payload_len(&self) -> usize {
        self.frame.len() - self.l4.payload
    }

    fn piece(&self) -> Piece {
        Piece::from(self.start + self.l4.payload..self.start + self.frame.len())
    }

    /// Whether more may follow: the flags are those of the first of several, or of a middle one.
    pub(super) fn may_begin(&self) -> bool {
        let Some(tcp) = self.l4.tcp else { return true };
        let besides = if self.part.segment { ECE | CWR } else { 0 };
        tcp.flags & ACK != 0 && tcp.flags & !(ACK | besides) == 0
    }

    /// Whether all checksums are there and right, but for a partial one, which is made here: one
    /// that was wrong when the packet was sealed must not become right by being made anew.
    pub(super) fn checksums_hold(&self) -> bool {
        let header = &self.frame[ETHERNET_LEN..self.l4.offset];
        (self.l4.v6 || sum(header) == 0xffff) && (self.part.partial || self.transport_sum_holds())
    }

    fn transport_sum_holds(&self) -> bool {
        let segment = &self.frame[self.l4.offset..];
        let pseudo =
            pseudo_header(&self.frame[self.l4.addresses()], self.l4.protocol(), segment.len());
        word(segment, self.l4.checksum_offset()) != 0
            && fold(u64::from(pseudo) + u64::from(sum(segment))) == 0xffff
    }
}

/// A super-frame that is being put together, or room for one.
#[derive(Debug)]
pub(super) struct Slot<K> {
    key: Option<K>,
    /// When it was begun, to be flushed in that order.
    pub(super) begun: u64,
    /// The vnet header's room, and the headers of the first packet.
    head: [u8; HEAD_ROOM],
    l4: L4,
    part: Part,
    counter: u64,
    /// Payload of the first packet in bytes: that of all but the last.
    size: usize,
    payload: usize,
    /// FIN and PSH of the last packet.
    closing: u8,
    pieces: [Piece; MAX_PIECES],
    packets: usize,
}

impl<K: Copy + Eq> Slot<K> {
    pub(super) const fn empty() -> Self {
        Self {
            key: None,
            begun: 0,
            head: [0; HEAD_ROOM],
            l4: L4 { v6: false, offset: 0, payload: 0, tcp: None },
            part: Part { segment: false, partial: false, last: false, index: 0 },
            counter: 0,
            size: 0,
            payload: 0,
            closing: 0,
            pieces: [Piece { start: 0, len: 0 }; MAX_PIECES],
            packets: 0,
        }
    }

    pub(super) fn is_free(&self) -> bool {
        self.key.is_none()
    }

    /// Begins with `first`.
    pub(super) fn begin(&mut self, first: &Candidate<'_, K>, begun: u64) {
        let headers = &first.frame[..first.l4.payload];
        self.head[VNET_LEN..VNET_LEN + headers.len()].copy_from_slice(headers);
        self.key = Some(first.key);
        self.begun = begun;
        self.l4 = first.l4;
        self.size = first.payload_len();
        self.payload = 0;
        self.packets = 0;
        self.add(first);
    }

    fn add(&mut self, next: &Candidate<'_, K>) {
        self.pieces[self.packets] = next.piece();
        self.packets += 1;
        self.payload += next.payload_len();
        self.part = next.part;
        self.counter = next.counter;
        self.closing = next.l4.tcp.map_or(0, |tcp| tcp.flags & (FIN | PSH));
    }

    /// Whether `frame` is of the flow that this slot has begun with: addresses and ports.
    pub(super) fn is_flow(&self, key: K, l4: &L4, frame: &[u8]) -> bool {
        let head = &self.head[VNET_LEN..];
        self.key == Some(key)
            && self.l4.v6 == l4.v6
            && self.l4.tcp.is_some() == l4.tcp.is_some()
            && head[l4.addresses()] == frame[l4.addresses()]
            && head[self.l4.offset..self.l4.offset + 4] == frame[l4.offset..l4.offset + 4]
    }

    /// Takes `next` in if it continues what is here, which the slot does not trust but sees from
    /// the headers. False leaves all as it was.
    pub(super) fn append(&mut self, next: &Candidate<'_, K>) -> bool {
        let fits = self.follows(next) && self.has_room(next) && self.same_headers(next);
        if fits {
            self.add(next);
        }
        fits
    }

    /// Whether nothing can come after what is here.
    pub(super) fn is_complete(&self) -> bool {
        let short = self.payload < self.size * self.packets;
        short || self.part.last || self.closing != 0 || self.packets == MAX_PIECES
    }

    fn follows(&self, next: &Candidate<'_, K>) -> bool {
        if self.part.segment != next.part.segment || self.part.partial != next.part.partial {
            return false;
        }
        !next.part.segment
            || (next.counter == self.counter.wrapping_add(1)
                && next.part.index == self.part.index.wrapping_add(1))
    }

    fn has_room(&self, next: &Candidate<'_, K>) -> bool {
        let network = self.l4.payload - ETHERNET_LEN + self.payload + next.payload_len();
        !self.is_complete() && next.payload_len() <= self.size && network <= MAX_PACKET
    }

    /// Whether the headers of `next` are those of the first but for what must differ.
    fn same_headers(&self, next: &Candidate<'_, K>) -> bool {
        if self.l4.payload != next.l4.payload || self.l4.offset != next.l4.offset {
            return false;
        }
        let first = &self.head[VNET_LEN..VNET_LEN + self.l4.payload];
        let next_headers = &next.frame[..next.l4.payload];
        let same = |range: Range<usize>| first[range.clone()] == next_headers[range];

        let network = if self.l4.v6 {
            same(0..ETHERNET_LEN + 4) && same(ETHERNET_LEN + 6..ETHERNET_LEN + IPV6_LEN)
        } else {
            let at = |offset| ETHERNET_LEN + offset;
            let nth = word(first, at(4)).wrapping_add(self.packets as u16);
            let fixed = first[at(6)] & 0x40 != 0;
            same(0..at(2))
                && same(at(6)..at(10))
                && same(at(12)..self.l4.offset)
                // Where a packet may not be fragmented its identification means nothing (RFC 6864).
                && (fixed || word(next_headers, at(4)) == nth)
        };
        network && same(self.l4.offset..self.l4.offset + 4) && self.same_transport(next, same)
    }

    fn same_transport(&self, next: &Candidate<'_, K>, same: impl Fn(Range<usize>) -> bool) -> bool {
        let (Some(first), Some(tcp)) = (self.l4.tcp, next.l4.tcp) else {
            return true;
        };
        let offset = self.l4.offset;
        let ending = if next.part.segment && !next.part.last { 0 } else { FIN | PSH };
        let ending = if next.part.segment { ending } else { ending & PSH };
        tcp.sequence == first.sequence.wrapping_add(self.payload as u32)
            && tcp.flags & !ending == first.flags & !CWR
            && same(offset + 8..offset + 13)
            && same(offset + 14..offset + 16)
            && same(offset + 18..self.l4.payload)
    }

    /// Gives what is here, with headers made to fit, and leaves the slot free.
    pub(super) fn take<'a>(&'a mut self, arena: &'a [u8]) -> Option<Built<'a, K>> {
        let key = self.key.take()?;
        let L4 { offset, payload, tcp, .. } = self.l4;
        let headers = &mut self.head[VNET_LEN..VNET_LEN + payload];
        if let Some(tcp) = tcp {
            headers[offset + 13] = tcp.flags | self.closing;
        }
        let alone = self.packets == 1;
        let vnet = match (alone, self.part.partial) {
            (true, false) => VnetHeader { checksum: Checksum::Valid, ..VnetHeader::default() },
            (true, true) => {
                write_pseudo_header(headers, &self.l4, self.payload);
                partial(&self.l4, None)
            }
            (false, _) => {
                write_lengths(headers, &self.l4, self.payload);
                write_pseudo_header(headers, &self.l4, self.payload);
                let size = NonZeroU16::new(self.size as u16).expect("a payload");
                partial(&self.l4, Some(super_frame(&self.l4, size)))
            }
        };
        self.head[..VNET_LEN].copy_from_slice(&vnet.to_bytes());
        Some(Built {
            key,
            vnet,
            packets: self.packets,
            head: &self.head[..VNET_LEN + payload],
            arena,
            pieces: &self.pieces[..self.packets],
        })
    }
}

/// Makes the length fields of `headers` those of a packet with so much payload.
fn write_lengths(headers: &mut [u8], l4: &L4, payload: usize) {
    let network = l4.payload - ETHERNET_LEN + payload;
    if l4.v6 {
        put(headers, ETHERNET_LEN + 4, (network - IPV6_LEN) as u16);
    } else {
        put(headers, ETHERNET_LEN + 2, network as u16);
        put(headers, ETHERNET_LEN + 10, 0);
        let checksum = !sum(&headers[ETHERNET_LEN..l4.offset]);
        put(headers, ETHERNET_LEN + 10, checksum);
    }
    if l4.tcp.is_none() {
        put(headers, l4.offset + 4, (l4.payload - l4.offset + payload) as u16);
    }
}

/// Makes the transport checksum of `headers` partial.
pub(super) fn write_pseudo_header(headers: &mut [u8], l4: &L4, payload: usize) {
    let length = l4.payload - l4.offset + payload;
    let pseudo = pseudo_header(&headers[l4.addresses()], l4.protocol(), length);
    put(headers, l4.offset + l4.checksum_offset(), pseudo);
}

/// The vnet header of a frame with a partial checksum.
pub(super) fn partial(l4: &L4, gso: Option<Gso>) -> VnetHeader {
    VnetHeader {
        checksum: Checksum::Partial {
            start: l4.offset as u16,
            offset: l4.checksum_offset() as u16,
        },
        gso,
        header_len: if gso.is_some() { l4.payload as u16 } else { 0 },
    }
}

fn super_frame(l4: &L4, size: NonZeroU16) -> Gso {
    let kind = match (l4.tcp, l4.v6) {
        (None, _) => GsoKind::Udp,
        (Some(_), false) => GsoKind::Tcp4,
        (Some(_), true) => GsoKind::Tcp6,
    };
    Gso { kind, size, ecn: l4.tcp.is_some_and(|tcp| tcp.flags & CWR != 0) }
}

/// Ethernet, the longest IPv4 header, the longest TCP header.
pub(super) const MAX_HEADERS: usize = ETHERNET_LEN + 60 + 60;
const HEAD_ROOM: usize = VNET_LEN + MAX_HEADERS;
/// Longest IP packet that is put together, in bytes.
const MAX_PACKET: usize = 65_535;
