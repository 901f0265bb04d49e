use std::ops::Range;

use super::{
    checksum::{complete, fold, pseudo_header, sum, without},
    headers::{
        ETHERNET_LEN, Fragment, Headers, IPV4_LEN, IPV6_LEN, Ip, Malformed, Network, TCP, Tcp,
        Transport, UDP, UDP_LEN,
    },
    vnet::{Checksum, Gso, GsoKind, VnetHeader},
};

/// What the receiver is told of a frame besides its bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Part {
    /// The frame is a segment of a super-frame, not a frame of its own.
    pub segment: bool,
    /// The transport checksum is the sum of the pseudo-header only.
    pub partial: bool,
    /// The last segment of its super-frame.
    pub last: bool,
    /// Which segment of its super-frame, modulo 256; zero for a frame of its own.
    pub index: u8,
}

/// A frame from the TAP as the packets that cross the underlay: a super-frame as its segments, any
/// other frame as one.
///
/// Each segment is a whole packet with headers of its own, so the loss of one costs no other. The
/// checksum of a packet stays partial where the receiver will see by itself what it covers
/// ([`Headers::l4`]); everywhere else it is completed here.
///
/// ```
/// use weft_seal::frame::{Headers, Splitter, VNET_LEN, VnetHeader};
///
/// # fn seal(read: &[u8], room: &mut [u8]) -> Result<(), Box<dyn std::error::Error>> {
/// let vnet = VnetHeader::parse(read)?;
/// let frame = &read[VNET_LEN..];
/// let splitter = Splitter::new(frame, &Headers::parse(frame)?, vnet)?;
/// for index in 0..splitter.segments() {
///     let len = splitter.write(index, room);
///     let part = splitter.part(index);
///     // room[..len] is the frame to seal; `part` goes into its meta data.
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Splitter<'a> {
    frame: &'a [u8],
    /// Offset of what the path MTU counts: all after Ethernet addresses, tags and EtherType.
    network: usize,
    form: Form,
}

#[derive(Clone, Copy, Debug)]
enum Form {
    /// One frame, as it is.
    Whole {
        partial: bool,
    },
    /// One frame, whose checksum at `field` over all from `start` is still to be completed.
    Incomplete {
        start: usize,
        field: usize,
    },
    Run(Run),
}

/// What all segments of a super-frame have in common.
#[derive(Clone, Copy, Debug)]
struct Run {
    network: usize,
    transport: usize,
    payload: usize,
    v6: bool,
    tcp: Option<Tcp>,
    size: usize,
    segments: usize,
    /// Sum of the IPv4 header without length, identification and checksum.
    header_sum: u16,
    identification: u16,
    sums: Sums,
}

/// How the transport checksum of a segment is made. `pseudo` is the sum of the pseudo-header
/// without the length.
#[derive(Clone, Copy, Debug)]
enum Sums {
    Partial {
        pseudo: u16,
    },
    Complete {
        pseudo: u16,
    },
    /// UDP over IPv4 without any (RFC 768).
    Absent,
}

impl<'a> Splitter<'a> {
    /// Reads how `frame`, of which `headers` were parsed and the kernel said `vnet`, is to be cut.
    ///
    /// # Errors
    /// The vnet header does not fit the frame.
    pub fn new(frame: &'a [u8], headers: &Headers, vnet: VnetHeader) -> Result<Self, Malformed> {
        debug_assert_eq!(frame.len(), headers.len, "headers of another frame");
        let network = match headers.network {
            Network::Ip(ip) => ip.offset,
            Network::Arp { .. } | Network::Other(_) => ETHERNET_LEN + 4 * usize::from(headers.tags),
        };
        let form = match vnet.gso {
            Some(gso) => Form::super_frame(frame, headers, gso, vnet.checksum)?,
            None => Form::single(frame, headers, vnet.checksum)?,
        };
        Ok(Self { frame, network, form })
    }

    /// How many packets there are; at least one.
    pub fn segments(&self) -> usize {
        match self.form {
            Form::Run(run) => run.segments,
            Form::Whole { .. } | Form::Incomplete { .. } => 1,
        }
    }

    /// Length in bytes of the frame that [`Self::write`] makes of segment `index`. All but the last
    /// have the same, and the last is not longer.
    ///
    /// # Panics
    /// There is no such segment.
    pub fn segment_len(&self, index: usize) -> usize {
        match self.form {
            Form::Run(run) => run.payload + run.piece(index, self.frame).len(),
            Form::Whole { .. } | Form::Incomplete { .. } => {
                assert_eq!(index, 0, "a frame that is not cut has one segment");
                self.frame.len()
            }
        }
    }

    /// Length in bytes of the longest packet without its Ethernet header: what the path MTU is to be
    /// compared with.
    pub fn packet_len(&self) -> usize {
        self.segment_len(0) - self.network
    }

    /// What the receiver has to be told of segment `index`.
    pub fn part(&self, index: usize) -> Part {
        match self.form {
            Form::Whole { partial } => Part { partial, ..Part::default() },
            Form::Incomplete { .. } => Part::default(),
            Form::Run(Run { sums: Sums::Complete { .. }, .. }) => Part::default(),
            Form::Run(run) => Part {
                segment: true,
                partial: matches!(run.sums, Sums::Partial { .. }),
                last: index + 1 == run.segments,
                index: index as u8,
            },
        }
    }

    /// Writes segment `index` to the begin of `room` and gives its length.
    ///
    /// # Panics
    /// There is no such segment, or `room` is shorter than [`Self::segment_len`].
    pub fn write(&self, index: usize, room: &mut [u8]) -> usize {
        match self.form {
            Form::Run(run) => run.write(index, self.frame, room),
            Form::Whole { .. } => {
                room[..self.frame.len()].copy_from_slice(self.frame);
                self.frame.len()
            }
            Form::Incomplete { start, field } => {
                let room = &mut room[..self.frame.len()];
                room.copy_from_slice(self.frame);
                let checksum = complete(sum(&room[start..]));
                put(room, field, checksum);
                room.len()
            }
        }
    }
}

impl Form {
    fn single(frame: &[u8], headers: &Headers, checksum: Checksum) -> Result<Self, Malformed> {
        let Checksum::Partial { start, offset } = checksum else {
            return Ok(Self::Whole { partial: false });
        };
        let (start, offset) = (usize::from(start), usize::from(offset));
        let earliest = match headers.network {
            Network::Ip(ip) => ip.payload,
            Network::Arp { .. } | Network::Other(_) => ETHERNET_LEN + 4 * usize::from(headers.tags),
        };
        if start < earliest || start + offset + 2 > frame.len() {
            return Err(Malformed::ChecksumOutside { start, offset, len: frame.len() });
        }
        match headers.l4() {
            Some(l4) if l4.offset == start && l4.checksum_offset() == offset => {
                Ok(Self::Whole { partial: true })
            }
            _ => Ok(Self::Incomplete { start, field: start + offset }),
        }
    }

    fn super_frame(
        frame: &[u8],
        headers: &Headers,
        gso: Gso,
        checksum: Checksum,
    ) -> Result<Self, Malformed> {
        let Network::Ip(ip) = headers.network else { return Err(Malformed::KindMismatch) };
        let (tcp, header_len) = match (gso.kind, ip.transport, ip.source.is_ipv6()) {
            (GsoKind::Tcp4, Transport::Tcp(tcp), false)
            | (GsoKind::Tcp6, Transport::Tcp(tcp), true) => (Some(tcp), tcp.header_len),
            (GsoKind::Udp, Transport::Udp, _) => (None, UDP_LEN),
            _ => return Err(Malformed::KindMismatch),
        };
        if ip.fragment != Fragment::Whole || ip.end != frame.len() {
            return Err(Malformed::Unusual);
        }
        let payload = ip.payload + header_len;
        let size = usize::from(gso.size.get());
        if frame.len() - payload <= size {
            return Self::single(frame, headers, checksum);
        }

        Ok(Self::Run(Run {
            network: ip.offset,
            transport: ip.payload,
            payload,
            v6: ip.source.is_ipv6(),
            tcp,
            size,
            segments: (frame.len() - payload).div_ceil(size),
            header_sum: header_sum(frame, &ip),
            identification: word(frame, ip.offset + 4),
            sums: Sums::of(frame, headers, &ip, tcp.is_some(), checksum)?,
        }))
    }
}

impl Sums {
    fn of(
        frame: &[u8],
        headers: &Headers,
        ip: &Ip,
        tcp: bool,
        checksum: Checksum,
    ) -> Result<Self, Malformed> {
        let (protocol, offset) = if tcp { (TCP, 16) } else { (UDP, 6) };
        let field = word(frame, ip.payload + offset);
        if let Some(l4) = headers.l4() {
            let absent =
                !tcp && !l4.v6 && field == 0 && !matches!(checksum, Checksum::Partial { .. });
            let pseudo = pseudo_header(&frame[l4.addresses()], protocol, 0);
            return Ok(if absent { Self::Absent } else { Self::Partial { pseudo } });
        }
        // A routing header changes which destination counts (RFC 8200 §8.1), so the kernel's own
        // sum is taken, but for its length.
        match checksum {
            Checksum::Partial { start, offset: at }
                if usize::from(start) == ip.payload && usize::from(at) == offset =>
            {
                let length = (ip.end - ip.payload) as u64;
                Ok(Self::Complete { pseudo: without(field, fold(length)) })
            }
            _ => Err(Malformed::Unusual),
        }
    }
}

impl Run {
    /// Where the payload of segment `index` lies in the super-frame.
    fn piece(&self, index: usize, frame: &[u8]) -> Range<usize> {
        assert!(index < self.segments, "segment {index} of {}", self.segments);
        let start = self.payload + index * self.size;
        start..frame.len().min(start + self.size)
    }

    fn write(&self, index: usize, frame: &[u8], room: &mut [u8]) -> usize {
        let piece = self.piece(index, frame);
        let room = &mut room[..self.payload + piece.len()];
        let (headers, payload) = room.split_at_mut(self.payload);
        headers.copy_from_slice(&frame[..self.payload]);
        payload.copy_from_slice(&frame[piece]);

        self.write_ip(index, headers, payload.len());
        match self.tcp {
            Some(tcp) => self.write_tcp(tcp, index, headers),
            None => put(headers, self.transport + 4, (UDP_LEN + payload.len()) as u16),
        }
        self.write_checksum(headers, payload);
        room.len()
    }

    fn write_ip(&self, index: usize, headers: &mut [u8], payload: usize) {
        let total = headers.len() - self.network + payload;
        if self.v6 {
            put(headers, self.network + 4, (total - IPV6_LEN) as u16);
            return;
        }
        let total = total as u16;
        let identification = self.identification.wrapping_add(index as u16);
        let sum = [self.header_sum, total, identification].map(u64::from).iter().sum();
        put(headers, self.network + 2, total);
        put(headers, self.network + 4, identification);
        put(headers, self.network + 10, !fold(sum));
    }

    fn write_tcp(&self, tcp: Tcp, index: usize, headers: &mut [u8]) {
        let sequence = tcp.sequence.wrapping_add((index * self.size) as u32);
        headers[self.transport + 4..self.transport + 8].copy_from_slice(&sequence.to_be_bytes());
        let mut flags = tcp.flags;
        if index > 0 {
            flags &= !CWR;
        }
        if index + 1 < self.segments {
            flags &= !(FIN | PSH);
        }
        headers[self.transport + 13] = flags;
    }

    fn write_checksum(&self, headers: &mut [u8], payload: &[u8]) {
        let field = self.transport + if self.tcp.is_some() { 16 } else { 6 };
        let length = (headers.len() - self.transport + payload.len()) as u64;
        match self.sums {
            Sums::Absent => {}
            Sums::Partial { pseudo } => put(headers, field, fold(u64::from(pseudo) + length)),
            Sums::Complete { pseudo } => {
                put(headers, field, fold(u64::from(pseudo) + length));
                let total = u64::from(sum(&headers[self.transport..])) + u64::from(sum(payload));
                put(headers, field, complete(fold(total)));
            }
        }
    }
}

/// The sum of an IPv4 header without the fields that differ from segment to segment.
fn header_sum(frame: &[u8], ip: &Ip) -> u16 {
    if ip.source.is_ipv6() {
        return 0;
    }
    let header = &frame[ip.offset..ip.payload];
    let parts = [&header[..2], &header[6..10], &header[12..]].map(|part| u64::from(sum(part)));
    debug_assert!(header.len() >= IPV4_LEN, "parsed as IPv4");
    fold(parts.iter().sum())
}

pub(super) fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn put(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

pub(super) const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
pub(super) const ECE: u8 = 0x40;
pub(super) const CWR: u8 = 0x80;

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::{super::reference::Flow, *};

    #[test]
    fn a_usual_frame_stays_partial_and_is_not_touched() {
        for flow in [Flow::tcp4(), Flow { v6: true, ..Flow::udp4() }] {
            let frame = flow.packet(&[3; 40], true);
            let (written, part) = only(&frame, flow.partial_vnet());
            assert_eq!((written, part.partial, part.segment), (frame, true, false));
        }
    }

    #[test]
    fn a_partial_checksum_that_nobody_would_recognise_is_completed() {
        for (what, flow) in [
            ("VLAN", Flow { tags: vec![[0x81, 0, 0, 1]], ..Flow::tcp4() }),
            (
                "an extension",
                Flow { v6: true, options: vec![0, 0, 1, 4, 0, 0, 0, 0], ..Flow::udp4() },
            ),
        ] {
            let (written, part) = only(&flow.packet(&[3; 41], true), flow.partial_vnet());
            assert_eq!((written, part), (flow.packet(&[3; 41], false), Part::default()), "{what}");
        }
        // Some other protocol, with its checksum somewhere.
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5, 1, 2, 0, 0, 5];
        let vnet = VnetHeader {
            checksum: Checksum::Partial { start: 14, offset: 2 },
            ..VnetHeader::default()
        };
        let (written, part) = only(&frame, vnet);
        put(&mut frame, 16, !0x0602);
        assert_eq!((written, part), (frame, Part::default()));
    }

    #[test]
    fn a_super_frame_of_one_segment_is_a_frame() {
        let (vnet, frame) = Flow::tcp4().super_frame(&[1; 1000], 1000);
        let (written, part) = only(&frame, vnet);
        assert_eq!((written, part.segment, part.partial), (frame, false, true));
    }

    #[test]
    fn a_vnet_header_that_does_not_fit_is_refused() {
        let (vnet, frame) = Flow::tcp4().super_frame(&[1; 3000], 1000);
        let (udp_vnet, udp) = Flow::udp4().super_frame(&[1; 3000], 1000);
        let kind = |kind| VnetHeader {
            gso: Some(Gso { kind, size: NonZeroU16::new(1000).unwrap(), ecn: false }),
            ..vnet
        };
        let checksum = |start, offset| VnetHeader {
            checksum: Checksum::Partial { start, offset },
            ..VnetHeader::default()
        };
        let mut fragment = frame.clone();
        fragment[20] = 0x20;
        let padded = [&frame[..], &[0; 4]].concat();
        let arp = [&frame[..12], &[8, 6], &[0; 28]].concat();
        let len = frame.len();
        for (frame, vnet, expected) in [
            (&frame, kind(GsoKind::Tcp6), Malformed::KindMismatch),
            (&frame, kind(GsoKind::Udp), Malformed::KindMismatch),
            (&udp, kind(GsoKind::Tcp4), Malformed::KindMismatch),
            (&arp, udp_vnet, Malformed::KindMismatch),
            (&fragment, vnet, Malformed::Unusual),
            (&padded, vnet, Malformed::Unusual),
            (&frame, checksum(65535, 65535), outside(65535, 65535, len)),
            (&frame, checksum(33, 16), outside(33, 16, len)),
            (&arp, checksum(13, 0), outside(13, 0, arp.len())),
            (&frame, checksum(len as u16 - 17, 16), outside(len - 17, 16, len)),
        ] {
            let headers = Headers::parse(frame).unwrap();
            assert_eq!(Splitter::new(frame, &headers, vnet).unwrap_err(), expected);
        }
    }

    #[test]
    fn the_path_is_asked_for_the_longest_packet_without_ethernet() {
        let tags = vec![[0x81, 0, 0, 1]];
        for (flow, expected) in [
            (Flow::tcp4(), 20 + 20 + 1000),
            (Flow { v6: true, ..Flow::udp4() }, 40 + 8 + 1000),
            (Flow { tags, ..Flow::tcp4() }, 20 + 20 + 1000),
        ] {
            let (vnet, frame) = flow.super_frame(&[1; 1500], 1000);
            let headers = Headers::parse(&frame).unwrap();
            assert_eq!(Splitter::new(&frame, &headers, vnet).unwrap().packet_len(), expected);
        }
    }

    fn outside(start: usize, offset: usize, len: usize) -> Malformed {
        Malformed::ChecksumOutside { start, offset, len }
    }

    fn only(frame: &[u8], vnet: VnetHeader) -> (Vec<u8>, Part) {
        let splitter = Splitter::new(frame, &Headers::parse(frame).unwrap(), vnet).unwrap();
        assert_eq!(splitter.segments(), 1);
        let mut room = vec![0; splitter.segment_len(0)];
        assert_eq!(splitter.write(0, &mut room), room.len());
        (room, splitter.part(0))
    }
}
