//! What must hold for any bytes: the fuzz targets of the sealed data path, and the inputs that
//! they begin with. Each function panics if something does not hold.

mod packets;
mod seeds;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
};

use weft_model::MacAddr;
use weft_seal::frame::{
    ANSWER_ROOM, Accepts, Answer, Arrival, Coalescer, Excess, Fragments, Gateway, Headers,
    MAX_PIECES, Network, Part, REPORT_ROOM, Remedy, Splitter, Stations, VNET_LEN, VnetHeader,
    answer, check_source, station, too_big,
};

pub use packets::packets;
use seeds::ones;
pub use seeds::seeds;

/// Any frame may be read, answered, reported, checked for its source and fragmented.
pub fn frames(data: &[u8]) {
    let Some((&choice, frame)) = data.split_first() else { return };
    let Ok(headers) = Headers::parse(frame) else { return };
    if let Some(l4) = headers.l4() {
        assert!(l4.offset < l4.payload && l4.payload <= frame.len());
    }

    let mac = station([2, 0, 0, 0, 0, choice]).expect("a station's address");
    let mut room = [0; ANSWER_ROOM];
    if let Answer::Reply(len) = answer(frame, &headers, |_| Some(mac), &mut room) {
        let reply = Headers::parse(&room[..len]).expect("a reply is a good frame");
        assert_eq!(reply.source, Some(mac));
    }

    let everybody = Everybody { gateway: choice & 1 == 0 };
    if check_source(frame, &headers, &everybody).is_ok() {
        assert!(headers.source.is_some());
    }

    let gateway =
        Gateway { mac, v4: Some(Ipv4Addr::new(10, 0, 0, 1)), v6: Some(Ipv6Addr::LOCALHOST) };
    let mtu = usize::from(choice) * 8;
    let mut room = [0; REPORT_ROOM];
    match too_big(frame, &headers, Excess { longest: frame.len(), mtu }, &gateway, &mut room) {
        Remedy::Report(len) => {
            let report = Headers::parse(&room[..len]).expect("a report is a good frame");
            assert_eq!(report.destination, headers.source);
        }
        Remedy::Fragment => fragments(&mut frame.to_vec(), &headers, choice & 1 == 1, mtu),
        Remedy::Drop | Remedy::Carry => {}
    }
}

fn fragments(frame: &mut [u8], headers: &Headers, partial: bool, mtu: usize) {
    let Ok(fragments) = Fragments::new(frame, headers, partial, mtu) else { return };
    let mut payload = 0;
    for index in 0..fragments.count() {
        let mut room = vec![0; fragments.len(index)];
        assert_eq!(fragments.write(index, &mut room), room.len());
        let Ok(Headers { network: Network::Ip(ip), .. }) = Headers::parse(&room) else {
            panic!("a fragment is a good frame");
        };
        assert!(room.len() <= mtu + 14);
        payload += ip.end - ip.payload;
    }
    let Network::Ip(ip) = headers.network else { panic!("only IP is fragmented") };
    assert_eq!(payload, ip.end - ip.payload);
}

/// Whatever the TAP says of whatever frame, it is cut to good frames, which come together again
/// to what can be cut to the same.
pub fn split(data: &[u8]) {
    let Ok(vnet) = VnetHeader::parse(data) else { return };
    let frame = &data[VNET_LEN..];
    let Some(segments) = cut(vnet, frame) else { return };
    let mut wire = Wire::default();
    for (counter, (bytes, part)) in segments.iter().enumerate() {
        let headers = Headers::parse(bytes).expect("a segment is a good frame");
        assert!(headers.l4().is_some() || !(part.partial || part.segment));
        wire.push(bytes, *part, counter as u64);
    }
    wire.check();
}

/// Whatever a peer sends, what is written to the TAP can be cut to what came.
pub fn coalesce(data: &[u8]) {
    let mut wire = Wire::default();
    let mut rest = data;
    while let [len, factor, flags, index, counter, bytes @ ..] = rest {
        let len = (usize::from(*len) * usize::from(factor % 8 + 1)).min(bytes.len());
        let part = Part {
            segment: flags & 1 != 0,
            partial: flags & 2 != 0,
            last: flags & 4 != 0,
            index: *index,
        };
        wire.push(&bytes[..len], part, (*counter).into());
        rest = &bytes[len..];
    }
    wire.check();
}

/// Packets that were opened, as they lie in an arena.
#[derive(Default)]
struct Wire {
    arena: Vec<u8>,
    arrivals: Vec<Arrival<()>>,
}

impl Wire {
    fn push(&mut self, bytes: &[u8], part: Part, counter: u64) {
        let start = self.arena.len();
        self.arena.extend(bytes);
        let frame: Range<usize> = start..self.arena.len();
        self.arrivals.push(Arrival { key: (), counter, part, frame });
    }

    fn check(&self) {
        let mut sent = Vec::new();
        let mut written = Vec::new();
        let mut emit = |built: weft_seal::frame::Built<'_, ()>| {
            assert!(built.packets <= MAX_PIECES);
            assert_eq!(built.to_vec().len(), built.len());
            written.push(built.to_vec());
        };
        let mut coalescer = Coalescer::new(Accepts { tcp4: true, tcp6: true, udp: true });
        for arrival in &self.arrivals {
            let bytes = &self.arena[arrival.frame.clone()];
            let Ok(headers) = Headers::parse(bytes) else { continue };
            if coalescer.push(&self.arena, arrival.clone(), &headers, &mut emit).is_ok() {
                sent.push(comparable(bytes, arrival.part.partial));
            }
        }
        coalescer.flush(&self.arena, &mut emit);

        let mut again = Vec::new();
        for bytes in written {
            assert!(bytes.len() <= VNET_LEN + MAX_FRAME);
            let vnet = VnetHeader::parse(&bytes).expect("a vnet header");
            let segments = cut(vnet, &bytes[VNET_LEN..]).expect("what is written can be cut");
            again.extend(segments.iter().map(|(bytes, part)| comparable(bytes, part.partial)));
        }
        sent.sort();
        again.sort();
        assert!(sent == again, "sent {sent:02x?}, written {again:02x?}");
    }
}

/// The packet with its checksum completed, and without the identification where it means nothing
/// (RFC 6864).
fn comparable(bytes: &[u8], partial: bool) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let Some(l4) = Headers::parse(&bytes).expect("it was parsed before").l4() else {
        return bytes;
    };
    if partial {
        let (field, protocol) = if l4.tcp.is_some() { (16, 6) } else { (6, 17) };
        let addresses = if l4.v6 { 22..54 } else { 26..34 };
        bytes[l4.offset + field..][..2].fill(0);
        let mut covered = bytes[addresses].to_vec();
        covered.extend([0, protocol]);
        covered.extend(((bytes.len() - l4.offset) as u32).to_be_bytes());
        covered.extend(&bytes[l4.offset..]);
        let checksum = match !ones(&covered) {
            0 => 0xffff,
            checksum => checksum,
        };
        bytes[l4.offset + field..][..2].copy_from_slice(&checksum.to_be_bytes());
    }
    // A wrong checksum of the header stays what it is.
    if !l4.v6 && bytes[20] & 0x40 != 0 && ones(&bytes[14..l4.offset]) == 0xffff {
        bytes[18..20].fill(0);
        bytes[24..26].fill(0);
    }
    bytes
}

fn cut(vnet: VnetHeader, frame: &[u8]) -> Option<Vec<(Vec<u8>, Part)>> {
    let headers = Headers::parse(frame).ok()?;
    let splitter = Splitter::new(frame, &headers, vnet).ok()?;
    let segment = |index| {
        let mut room = vec![0; splitter.segment_len(index)];
        assert!(room.len() <= frame.len());
        assert_eq!(splitter.write(index, &mut room), room.len());
        (room, splitter.part(index))
    };
    Some((0..splitter.segments()).map(segment).collect())
}

/// A network where all may send as all.
struct Everybody {
    gateway: bool,
}

impl Stations for Everybody {
    fn holds(&self, _: MacAddr, _: Option<IpAddr>) -> bool {
        true
    }

    fn forwards(&self, _: MacAddr) -> bool {
        self.gateway
    }

    fn is_elsewhere(&self, ip: IpAddr) -> bool {
        ip.is_loopback()
    }
}

/// The longest frame that anything may become: two tags, and the longest packet of IPv6.
const MAX_FRAME: usize = 14 + 8 + 40 + 65_535;
