use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use weft_model::MacAddr;

use super::{
    checksum::{complete, fold, pseudo_header, sum},
    headers::{
        DONT_FRAGMENT, ETHERNET_LEN, Fragment, Headers, ICMP, ICMPV6, IPV4, IPV4_LEN, IPV6,
        IPV6_LEN, Ip, Network,
    },
    split::{put, word},
};

/// Room in bytes that every report fits in.
pub const REPORT_ROOM: usize = ETHERNET_LEN + MAX_REPORT_V6;

/// Whose name the reports of one network are made in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Gateway {
    pub mac: MacAddr,
    /// Without one, an IPv4 packet that is too large is dropped without a report.
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

/// What to do with a packet that is too large for the path to its peer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Remedy {
    /// Drop it, and write this many bytes of the room back into the TAP, as a frame with an empty
    /// vnet header, if the rate limit of the network has a token.
    Report(usize),
    /// IPv4 that may be fragmented: carry [`Fragments`](super::Fragments) of it instead (of a
    /// super-frame: of each segment).
    Fragment,
    /// Drop it: there is nobody to be told.
    Drop,
    /// IPv6 of at most 1280 bytes, which every link has to carry (RFC 8200 §5) and no sender makes
    /// smaller: carry it (of a super-frame: each segment), and let the underlay fragment the sealed
    /// packet (RFC 2473 §7.1).
    Carry,
}

/// By how much a frame is too large.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Excess {
    /// Longest IP packet of the frame in bytes: [`Splitter::packet_len`](super::Splitter::packet_len).
    pub longest: usize,
    /// Longest IP packet in bytes that the path takes.
    pub mtu: usize,
}

/// Decides what becomes of `frame`, which is too large for the path to its peer.
///
/// A report is "fragmentation needed" (RFC 792, RFC 1191 §4) with as much of the packet as makes 576
/// bytes, or "packet too big" (RFC 4443 §3.2) with as much as makes 1280. There is none for an ICMP
/// error, a group address, a later fragment, or a source that is not one host (RFC 1122 §3.2.2,
/// RFC 4443 §2.4 e). Of a super-frame, the begin of its first segment is quoted.
pub fn too_big(
    frame: &[u8],
    headers: &Headers,
    Excess { longest, mtu }: Excess,
    gateway: &Gateway,
    room: &mut [u8; REPORT_ROOM],
) -> Remedy {
    let Network::Ip(ip) = headers.network else { return Remedy::Drop };
    let packet = &frame[ip.offset..ip.end];
    if ip.source.is_ipv4() && word(packet, 6) & DONT_FRAGMENT == 0 {
        return if headers.tags == 0 { Remedy::Fragment } else { Remedy::Drop };
    }
    if ip.source.is_ipv6() && longest <= MIN_MTU_V6 {
        return Remedy::Carry;
    }
    let (Some(source), Some(_)) = (headers.source, headers.destination) else {
        return Remedy::Drop;
    };
    if headers.tags != 0 || !may_be_told(&ip, packet, ip.payload - ip.offset) {
        return Remedy::Drop;
    }

    room[..6].copy_from_slice(&source.octets());
    room[6..12].copy_from_slice(&gateway.mac.octets());
    let report = &mut room[ETHERNET_LEN..];
    let len = match (ip.source, gateway.v4, gateway.v6) {
        (IpAddr::V4(to), Some(from), _) => report_v4(report, packet, from, to, mtu),
        (IpAddr::V6(to), _, Some(from)) => report_v6(report, packet, from, to, mtu),
        _ => return Remedy::Drop,
    };
    put(room, 12, if ip.source.is_ipv4() { IPV4 } else { IPV6 });
    Remedy::Report(ETHERNET_LEN + len)
}

/// How many reports may be made: so many at once, and one more after each interval.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    burst: u32,
    interval: Duration,
    tokens: u32,
    /// When the newest token came.
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket. `interval` must not be zero.
    pub fn new(burst: u32, interval: Duration, now: Instant) -> Self {
        assert!(!interval.is_zero(), "a token needs time to come");
        Self { burst, interval, tokens: burst, filled: now }
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled);
        let came = (elapsed.as_nanos() / self.interval.as_nanos()).min(u128::from(u32::MAX)) as u32;
        self.tokens = self.tokens.saturating_add(came).min(self.burst);
        self.filled = if self.tokens == self.burst {
            self.filled.max(now)
        } else {
            self.filled + self.interval * came
        };
        let had = self.tokens > 0;
        self.tokens -= u32::from(had);
        had
    }
}

fn report_v4(report: &mut [u8], packet: &[u8], from: Ipv4Addr, to: Ipv4Addr, mtu: usize) -> usize {
    let quoted = packet.len().min(MAX_REPORT_V4 - IPV4_LEN - ICMP_LEN);
    let total = IPV4_LEN + ICMP_LEN + quoted;
    report[..IPV4_LEN + ICMP_LEN].fill(0);
    // Precedence "internetwork control" (RFC 1812 §4.3.2.5).
    report[..2].copy_from_slice(&[0x45, 0xc0]);
    put(report, 2, total as u16);
    report[8..10].copy_from_slice(&[TTL, ICMP]);
    report[12..16].copy_from_slice(&from.octets());
    report[16..20].copy_from_slice(&to.octets());
    let checksum = !sum(&report[..IPV4_LEN]);
    put(report, 10, checksum);

    let icmp = &mut report[IPV4_LEN..total];
    icmp[..2].copy_from_slice(&[UNREACHABLE, FRAGMENTATION_NEEDED]);
    put(icmp, 6, mtu.min(usize::from(u16::MAX)) as u16);
    icmp[ICMP_LEN..].copy_from_slice(&packet[..quoted]);
    let checksum = !sum(icmp);
    put(icmp, 2, checksum);
    total
}

fn report_v6(report: &mut [u8], packet: &[u8], from: Ipv6Addr, to: Ipv6Addr, mtu: usize) -> usize {
    let quoted = packet.len().min(MAX_REPORT_V6 - IPV6_LEN - ICMP_LEN);
    let total = IPV6_LEN + ICMP_LEN + quoted;
    report[..IPV6_LEN + ICMP_LEN].fill(0);
    report[0] = 0x60;
    put(report, 4, (ICMP_LEN + quoted) as u16);
    report[6..8].copy_from_slice(&[ICMPV6, TTL]);
    report[8..24].copy_from_slice(&from.octets());
    report[24..40].copy_from_slice(&to.octets());

    report[IPV6_LEN] = PACKET_TOO_BIG;
    let told = mtu.max(MIN_MTU_V6) as u32;
    report[IPV6_LEN + 4..IPV6_LEN + 8].copy_from_slice(&told.to_be_bytes());
    report[IPV6_LEN + ICMP_LEN..total].copy_from_slice(&packet[..quoted]);
    let pseudo = pseudo_header(&report[8..40], ICMPV6, ICMP_LEN + quoted);
    let all = u64::from(pseudo) + u64::from(sum(&report[IPV6_LEN..total]));
    put(report, IPV6_LEN + 2, complete(fold(all)));
    total
}

/// Whether the sender of `packet` is one host that may be told of an error.
fn may_be_told(ip: &Ip, packet: &[u8], header_len: usize) -> bool {
    let one_host = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => {
            // 240.0.0.0/4 has the broadcast address in it.
            !(ip.is_unspecified() || ip.is_loopback() || ip.octets()[0] >= 224)
        }
        IpAddr::V6(ip) => !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast()),
    };
    let error = match (ip.protocol, packet.get(header_len)) {
        // Only what asks something, or answers, is surely not an error.
        (ICMP, Some(0 | 8 | 9 | 10 | 13..=18)) => false,
        (ICMP, _) => true,
        (ICMPV6, kind) => kind.is_none_or(|&kind| kind < 128 || kind == REDIRECT),
        _ => false,
    };
    one_host(ip.source) && one_host(ip.destination) && !error && ip.fragment != Fragment::Later
}

const UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const PACKET_TOO_BIG: u8 = 2;
const REDIRECT: u8 = 137;
const ICMP_LEN: usize = 8;
const TTL: u8 = 64;
/// RFC 1812 §4.3.2.3.
const MAX_REPORT_V4: usize = 576;
const MAX_REPORT_V6: usize = MIN_MTU_V6;
const MIN_MTU_V6: usize = 1280;

#[cfg(test)]
mod tests {
    use super::{
        super::{
            headers::station,
            reference::{Flow, ones},
        },
        *,
    };

    #[test]
    fn a_large_ipv4_packet_is_reported_with_its_begin() {
        let frame = Flow::udp4().packet(&[7; 1500], true);
        let report = report_of(&frame, 1400).unwrap();
        assert_eq!(report.len(), 14 + 576);
        assert_eq!(report[..14], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0xfe, 8, 0]);
        assert_eq!(report[16..18], 576u16.to_be_bytes());
        assert_eq!(report[23], ICMP);
        assert_eq!(report[26..34], [10, 0, 0, 254, 10, 0, 0, 1]);
        assert_eq!(report[34..36], [3, 4]);
        assert_eq!(report[38..42], [0, 0, 5, 120]);
        assert_eq!(report[42..], frame[14..14 + 548]);
        assert_eq!((ones(&report[14..34]), ones(&report[34..])), (0xffff, 0xffff));
    }

    #[test]
    fn a_large_ipv6_packet_is_reported_with_its_begin() {
        let frame = Flow { v6: true, ..Flow::tcp4() }.packet(&[7; 1500], true);
        let report = report_of(&frame, 1400).unwrap();
        assert_eq!(report.len(), 14 + 1280);
        assert_eq!(report[12..14], [0x86, 0xdd]);
        assert_eq!(report[18..22], [4, 216, ICMPV6, 64]);
        assert_eq!(report[38..54], frame[22..38]);
        assert_eq!(report[54..56], [2, 0]);
        assert_eq!(report[58..62], 1400u32.to_be_bytes());
        assert_eq!(report[62..], frame[14..14 + 1232]);
        let pseudo = [&report[22..54], &1240u32.to_be_bytes(), &[0, 0, 0, ICMPV6]].concat();
        assert_eq!(ones(&[&pseudo[..], &report[54..]].concat()), 0xffff);
    }

    #[test]
    fn no_ipv6_host_is_asked_for_less_than_every_link_carries() {
        let large = Flow { v6: true, ..Flow::tcp4() }.packet(&[7; 1300], true);
        assert_eq!(report_of(&large, 1178).unwrap()[58..62], 1280u32.to_be_bytes());
        let small = Flow { v6: true, ..Flow::tcp4() }.packet(&[7; 1220], true);
        assert_eq!(report_of(&small, 1178), Err(Remedy::Carry));
        let of_a_super_frame = Excess { longest: 1280, mtu: 1178 };
        assert_eq!(report(&large, of_a_super_frame), Err(Remedy::Carry));
    }

    #[test]
    fn ipv4_that_allows_it_is_fragmented() {
        let frame = Flow { dont_fragment: false, ..Flow::udp4() }.packet(&[7; 1500], true);
        assert_eq!(report_of(&frame, 1400), Err(Remedy::Fragment));
    }

    #[test]
    fn nobody_is_told_of_what_has_no_one_sender_or_is_an_error_itself() {
        let good = Flow::udp4().packet(&[7; 1500], false);
        let v6 = Flow { v6: true, ..Flow::udp4() }.packet(&[7; 1500], false);
        let change = |frame: &[u8], changes: &[(usize, u8)]| {
            let mut frame = frame.to_vec();
            for &(at, value) in changes {
                frame[at] = value;
            }
            frame
        };
        for (what, frame) in [
            ("a group MAC", change(&good, &[(0, 1)])),
            ("broadcast", change(&good, &[(30, 255), (31, 255), (32, 255), (33, 255)])),
            ("multicast", change(&good, &[(30, 239)])),
            ("no source", change(&good, &[(26, 0), (27, 0), (28, 0), (29, 0)])),
            ("a multicast source", change(&good, &[(26, 224)])),
            ("a loopback source", change(&good, &[(26, 127)])),
            ("a later fragment", change(&good, &[(21, 9)])),
            ("an ICMP error", change(&good, &[(23, ICMP), (34, 3)])),
            ("an ICMP redirect", change(&good, &[(23, ICMP), (34, 5)])),
            ("unknown ICMP", change(&good, &[(23, ICMP), (34, 200)])),
            ("IPv6 multicast", change(&v6, &[(38, 0xff)])),
            ("an ICMPv6 error", change(&v6, &[(20, ICMPV6), (54, 2)])),
            ("an ICMPv6 redirect", change(&v6, &[(20, ICMPV6), (54, 137)])),
        ] {
            assert_eq!(report_of(&frame, 1400), Err(Remedy::Drop), "{what}");
        }
        for echo in [change(&good, &[(23, ICMP), (34, 8)]), change(&v6, &[(20, ICMPV6), (54, 128)])]
        {
            assert!(report_of(&echo, 1400).is_ok(), "an echo request is told");
        }
    }

    #[test]
    fn without_an_address_of_the_gateway_nothing_is_reported() {
        let nameless = Gateway { v4: None, v6: None, ..gateway() };
        for v6 in [false, true] {
            let frame = Flow { v6, ..Flow::udp4() }.packet(&[7; 1500], true);
            let headers = Headers::parse(&frame).unwrap();
            let mut room = [0; REPORT_ROOM];
            let excess = Excess { longest: frame.len() - 14, mtu: 1400 };
            assert_eq!(too_big(&frame, &headers, excess, &nameless, &mut room), Remedy::Drop);
        }
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_one_per_interval() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut bucket = TokenBucket::new(3, Duration::from_millis(10), start);
        let taken = |bucket: &mut TokenBucket, now| (0..100).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, start), 3);
        assert_eq!(taken(&mut bucket, at(9)), 0);
        assert_eq!(taken(&mut bucket, at(15)), 1);
        assert_eq!(taken(&mut bucket, at(19)), 0, "half an interval is not lost and not doubled");
        assert_eq!(taken(&mut bucket, at(20)), 1);
        assert_eq!(taken(&mut bucket, at(1_000_000)), 3);
        assert_eq!(taken(&mut bucket, at(5)), 0, "time that goes back");
        assert_eq!(taken(&mut bucket, at(1_000_010)), 1);
    }

    fn gateway() -> Gateway {
        Gateway {
            mac: station([2, 0, 0, 0, 0, 0xfe]).unwrap(),
            v4: Some(Ipv4Addr::new(10, 0, 0, 254)),
            v6: Some("fd00::fe".parse().unwrap()),
        }
    }

    fn report_of(frame: &[u8], mtu: usize) -> Result<Vec<u8>, Remedy> {
        let excess = Excess { longest: frame.len() - 14, mtu };
        report(frame, excess)
    }

    fn report(frame: &[u8], excess: Excess) -> Result<Vec<u8>, Remedy> {
        let mut room = [0xaa; REPORT_ROOM];
        match too_big(frame, &Headers::parse(frame).unwrap(), excess, &gateway(), &mut room) {
            Remedy::Report(len) => Ok(room[..len].to_vec()),
            other => Err(other),
        }
    }
}
