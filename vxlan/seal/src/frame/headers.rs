use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weft_model::MacAddr;

/// What the headers of a frame say. All offsets are from the begin of the frame, in bytes, and lie
/// within the frame that was parsed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Headers {
    /// `None` for a group address (multicast or broadcast) and for all zeros.
    pub destination: Option<MacAddr>,
    /// `None` for an address that no station can have.
    pub source: Option<MacAddr>,
    /// VLAN tags between the addresses and the EtherType (IEEE 802.1Q, 802.1ad).
    pub tags: u8,
    pub network: Network,
    /// Length of the frame that was parsed.
    pub len: usize,
}

/// What the frame carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Network {
    Ip(Ip),
    /// An ARP message of IPv4 over Ethernet (RFC 826), whole, at this offset.
    Arp {
        offset: usize,
    },
    /// Some other protocol, by its EtherType, or an ARP message of another kind.
    Other(u16),
}

/// An IPv4 or IPv6 packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ip {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub offset: usize,
    /// Offset of what follows the IP header, its options and its extension headers.
    pub payload: usize,
    /// Offset of the first byte after the packet; the frame may have padding after it.
    pub end: usize,
    /// Number of the protocol at `payload`.
    pub protocol: u8,
    pub fragment: Fragment,
    /// The packet has IPv6 extension headers.
    pub extended: bool,
    pub transport: Transport,
}

/// Whether the packet is a fragment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fragment {
    Whole,
    /// The first of several: has the transport header.
    First,
    /// One after the first: has none.
    Later,
}

/// The header after the IP header, if it is one of these and is there in whole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    Tcp(Tcp),
    Udp,
    /// Another protocol, a later fragment, or a header that is cut off.
    Other,
}

/// What of a TCP header decides about segments (RFC 9293 §3.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tcp {
    pub header_len: usize,
    pub sequence: u32,
    /// CWR, ECE, URG, ACK, PSH, RST, SYN, FIN, from the highest bit.
    pub flags: u8,
}

/// Where TCP or UDP lies in a frame of the usual layout: see [`Headers::l4`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct L4 {
    pub v6: bool,
    pub offset: usize,
    /// Offset of the payload, which reaches to the end of the frame.
    pub payload: usize,
    /// `None` for UDP.
    pub tcp: Option<Tcp>,
}

impl Headers {
    /// Reads the headers of `frame`, an Ethernet frame without a vnet header.
    ///
    /// # Errors
    /// The frame contradicts itself up to the IP header: a receiver would drop it. What comes after
    /// the IP header is not judged.
    pub fn parse(frame: &[u8]) -> Result<Self, Malformed> {
        let ethernet = frame
            .first_chunk::<ETHERNET_LEN>()
            .ok_or(Malformed::Truncated { header: "Ethernet", len: frame.len() })?;
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *ethernet;

        let mut kind = u16::from_be_bytes([t0, t1]);
        let mut offset = ETHERNET_LEN;
        let mut tags = 0;
        while matches!(kind, VLAN | SERVICE_VLAN) {
            if tags == MAX_TAGS {
                return Err(Malformed::Tags);
            }
            let [_, _, t0, t1] = *at::<4>(frame, offset, "VLAN")?;
            kind = u16::from_be_bytes([t0, t1]);
            offset += 4;
            tags += 1;
        }

        let network = match kind {
            IPV4 => Network::Ip(Ip::parse_v4(frame, offset)?),
            IPV6 => Network::Ip(Ip::parse_v6(frame, offset)?),
            ARP => match at::<ARP_LEN>(frame, offset, "ARP")? {
                [0, 1, 8, 0, 6, 4, ..] => Network::Arp { offset },
                _ => Network::Other(ARP),
            },
            kind => Network::Other(kind),
        };
        Ok(Self {
            destination: station([d0, d1, d2, d3, d4, d5]),
            source: station([s0, s1, s2, s3, s4, s5]),
            tags,
            network,
            len: frame.len(),
        })
    }

    /// Where TCP or UDP lies, if the layout is the usual one: no VLAN tag, no extension header, no
    /// fragment, no padding, and a length in the UDP header that is that of the packet.
    ///
    /// Only such a frame is ever carried with a partial checksum or as a segment.
    pub fn l4(&self) -> Option<L4> {
        let Network::Ip(ip) = self.network else { return None };
        let usual =
            self.tags == 0 && !ip.extended && ip.fragment == Fragment::Whole && ip.end == self.len;
        let (header_len, tcp) = match ip.transport {
            _ if !usual => return None,
            Transport::Tcp(tcp) => (tcp.header_len, Some(tcp)),
            Transport::Udp => (UDP_LEN, None),
            Transport::Other => return None,
        };
        let v6 = ip.source.is_ipv6();
        Some(L4 { v6, offset: ip.payload, payload: ip.payload + header_len, tcp })
    }
}

impl Ip {
    fn parse_v4(frame: &[u8], offset: usize) -> Result<Self, Malformed> {
        let header = at::<IPV4_LEN>(frame, offset, "IPv4")?;
        let header_len = usize::from(header[0] & 0xf) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let available = frame.len() - offset;
        if header[0] >> 4 != 4 {
            return Err(Malformed::Version { header: "IPv4", found: header[0] >> 4 });
        }
        if header_len < IPV4_LEN || total < header_len || total > available {
            return Err(Malformed::Length { header: "IPv4", claimed: total, available });
        }

        let position = u16::from_be_bytes([header[6], header[7]]);
        let fragment = match (position & OFFSET_MASK, position & MORE_FRAGMENTS) {
            (0, 0) => Fragment::Whole,
            (0, _) => Fragment::First,
            _ => Fragment::Later,
        };
        let [.., a, b, c, d, e, f, g, h] = *header;
        let mut ip = Self {
            source: Ipv4Addr::new(a, b, c, d).into(),
            destination: Ipv4Addr::new(e, f, g, h).into(),
            offset,
            payload: offset + header_len,
            end: offset + total,
            protocol: header[9],
            fragment,
            extended: false,
            transport: Transport::Other,
        };
        ip.transport = ip.parse_transport(frame);
        Ok(ip)
    }

    fn parse_v6(frame: &[u8], offset: usize) -> Result<Self, Malformed> {
        let header = at::<IPV6_LEN>(frame, offset, "IPv6")?;
        let claimed = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let available = frame.len() - offset - IPV6_LEN;
        if header[0] >> 4 != 6 {
            return Err(Malformed::Version { header: "IPv6", found: header[0] >> 4 });
        }
        if claimed > available {
            return Err(Malformed::Length { header: "IPv6", claimed, available });
        }

        let address = |from: usize| {
            let octets: [u8; 16] = header[from..from + 16].try_into().expect("sixteen octets");
            Ipv6Addr::from(octets).into()
        };
        let mut ip = Self {
            source: address(8),
            destination: address(24),
            offset,
            payload: offset + IPV6_LEN,
            end: offset + IPV6_LEN + claimed,
            protocol: header[6],
            fragment: Fragment::Whole,
            extended: false,
            transport: Transport::Other,
        };
        ip.skip_extensions(frame)?;
        ip.transport = ip.parse_transport(frame);
        Ok(ip)
    }

    /// Goes over the extension headers of IPv6 (RFC 8200 §4) to the protocol after them.
    fn skip_extensions(&mut self, frame: &[u8]) -> Result<(), Malformed> {
        let packet = &frame[..self.end];
        for _ in 0..MAX_EXTENSIONS {
            let units = match self.protocol {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | FRAGMENT => 8,
                AUTHENTICATION => 4,
                _ => return Ok(()),
            };
            let extension = at::<8>(packet, self.payload, "IPv6 extension")?;
            let (next, more) = (extension[0], usize::from(extension[1]));
            let len = match self.protocol {
                FRAGMENT => {
                    let position = u16::from_be_bytes([extension[2], extension[3]]);
                    self.fragment = match (position >> 3, position & 1) {
                        (0, 0) => self.fragment,
                        (0, _) => Fragment::First,
                        _ => Fragment::Later,
                    };
                    8
                }
                AUTHENTICATION => (more + 2) * units,
                _ => (more + 1) * units,
            };
            if self.payload + len > self.end {
                return Err(Malformed::Truncated { header: "IPv6 extension", len: frame.len() });
            }
            self.payload += len;
            self.protocol = next;
            self.extended = true;
            if self.fragment == Fragment::Later {
                return Ok(());
            }
        }
        Err(Malformed::Extensions)
    }

    fn parse_transport(&self, frame: &[u8]) -> Transport {
        let rest = match self.fragment {
            Fragment::Later => return Transport::Other,
            Fragment::Whole | Fragment::First => &frame[self.payload..self.end],
        };
        match self.protocol {
            TCP => rest.first_chunk::<TCP_LEN>().map_or(Transport::Other, |header| {
                let header_len = usize::from(header[12] >> 4) * 4;
                if header_len < TCP_LEN || header_len > rest.len() {
                    return Transport::Other;
                }
                let sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                Transport::Tcp(Tcp { header_len, sequence, flags: header[13] })
            }),
            UDP => match rest.first_chunk::<UDP_LEN>() {
                Some(&[_, _, _, _, a, b, _, _])
                    if usize::from(u16::from_be_bytes([a, b])) == rest.len() =>
                {
                    Transport::Udp
                }
                _ => Transport::Other,
            },
            _ => Transport::Other,
        }
    }
}

impl L4 {
    /// Offset of the transport checksum within the transport header.
    pub(super) fn checksum_offset(&self) -> usize {
        if self.tcp.is_some() { 16 } else { 6 }
    }

    pub(super) fn protocol(&self) -> u8 {
        if self.tcp.is_some() { TCP } else { UDP }
    }

    /// The addresses of source and destination, as they lie in the frame.
    pub(super) fn addresses(&self) -> std::ops::Range<usize> {
        if self.v6 {
            ETHERNET_LEN + 8..ETHERNET_LEN + IPV6_LEN
        } else {
            ETHERNET_LEN + 12..ETHERNET_LEN + IPV4_LEN
        }
    }
}

/// The address as a station's, or `None` for a group address and all zeros.
pub fn station(octets: [u8; 6]) -> Option<MacAddr> {
    if octets[0] & 1 == 1 || octets == [0; 6] {
        return None;
    }
    MacAddr::try_from(octets).ok()
}

/// Why a frame is not fit to be carried.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Malformed {
    #[error("a frame of {len} bytes ends inside its {header} header")]
    Truncated { header: &'static str, len: usize },
    #[error("the {header} header says version {found}")]
    Version { header: &'static str, found: u8 },
    #[error("the {header} header claims {claimed} bytes where {available} are")]
    Length { header: &'static str, claimed: usize, available: usize },
    #[error("more than {MAX_TAGS} VLAN tags")]
    Tags,
    #[error("more than {MAX_EXTENSIONS} IPv6 extension headers")]
    Extensions,
    #[error(
        "a partial checksum at {start}+{offset} lies outside of the payload of a frame of {len} bytes"
    )]
    ChecksumOutside { start: usize, offset: usize, len: usize },
    #[error("a partial checksum or a segment, but no TCP or UDP of the usual layout")]
    Unusual,
    #[error("a super-frame whose kind is not that of its headers")]
    KindMismatch,
    #[error("{len} bytes where at most {most} may be")]
    TooLong { len: usize, most: usize },
}

fn at<'a, const N: usize>(
    frame: &'a [u8],
    offset: usize,
    header: &'static str,
) -> Result<&'a [u8; N], Malformed> {
    frame
        .get(offset..)
        .and_then(<[u8]>::first_chunk)
        .ok_or(Malformed::Truncated { header, len: frame.len() })
}

pub(super) const ETHERNET_LEN: usize = 14;
pub(super) const IPV4_LEN: usize = 20;
pub(super) const IPV6_LEN: usize = 40;
pub(super) const TCP_LEN: usize = 20;
pub(super) const UDP_LEN: usize = 8;
pub(super) const ARP_LEN: usize = 28;

pub(super) const IPV4: u16 = 0x0800;
pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const SERVICE_VLAN: u16 = 0x88a8;
const MAX_TAGS: u8 = 2;

pub(super) const DONT_FRAGMENT: u16 = 0x4000;
pub(super) const MORE_FRAGMENTS: u16 = 0x2000;
pub(super) const OFFSET_MASK: u16 = 0x1fff;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
/// As many as RFC 8200 §4.1 lists, and a few to spare.
const MAX_EXTENSIONS: usize = 8;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::reference::Flow, *};

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0usize..6) {
            let mut bytes = bytes;
            let kinds = [IPV4, IPV6, ARP, VLAN, SERVICE_VLAN, 0x88cc];
            if let Some(field) = bytes.get_mut(12..14) {
                field.copy_from_slice(&kinds[kind].to_be_bytes());
            }
            if let Some(version) = bytes.get_mut(14) {
                *version = if kinds[kind] == IPV4 { 0x45 } else { 0x60 };
            }
            check_offsets(&bytes);
        }

        #[test]
        fn any_change_of_a_good_frame_is_parsed_or_refused(
            v6: bool, tcp: bool, at in 0usize..120, value: u8, len in 0usize..130,
        ) {
            let options = if v6 { vec![0, 0, 1, 4, 0, 0, 0, 0] } else { vec![1; 8] };
            let flow = Flow { v6, tcp, options, tags: vec![[0x81, 0, 0, 1]], ..Flow::tcp4() };
            let mut bytes = flow.packet(&[0; 30], true);
            let at = at % bytes.len();
            bytes[at] = value;
            bytes.truncate(len);
            check_offsets(&bytes);
        }
    }

    #[test]
    fn a_frame_cut_off_anywhere_is_refused_by_the_header_that_ends_too_soon() {
        let v4 = Flow { options: vec![1; 4], ..Flow::tcp4() }.packet(&[1, 2, 3], true);
        for len in 0..v4.len() {
            let refused = Headers::parse(&v4[..len]).unwrap_err();
            let expected = match len {
                0..14 => Malformed::Truncated { header: "Ethernet", len },
                14..34 => Malformed::Truncated { header: "IPv4", len },
                _ => {
                    Malformed::Length { header: "IPv4", claimed: 24 + 20 + 3, available: len - 14 }
                }
            };
            assert_eq!(refused, expected);
        }
    }

    #[test]
    fn a_usual_frame_says_where_its_transport_is() {
        for (v6, tcp, options, offset, payload) in [
            (false, true, 0, 34, 66),
            (false, false, 8, 42, 50),
            (true, true, 0, 54, 86),
            (true, false, 0, 54, 62),
        ] {
            let tcp_options = vec![1; 12];
            let flow = Flow { v6, tcp, options: vec![1; options], tcp_options, ..Flow::tcp4() };
            let l4 = Headers::parse(&flow.packet(&[0; 9], true)).unwrap().l4().unwrap();
            let sequence = tcp.then_some(7);
            assert_eq!((l4.v6, l4.offset, l4.payload), (v6, offset, payload));
            assert_eq!(l4.tcp.map(|tcp| tcp.sequence), sequence);
        }
    }

    #[test]
    fn an_unusual_frame_is_read_but_not_for_its_transport() {
        let good = Flow::udp4().packet(&[7; 20], false);
        let change = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        let padded = [&good[..], &[0; 10]].concat();
        let tagged = Flow { tags: vec![[0x81, 0, 0, 1]], ..Flow::udp4() }.packet(&[7; 20], false);
        for (what, frame) in [
            ("the first fragment", change(20, 0x20)),
            ("a later fragment", change(21, 1)),
            ("another length in UDP", change(39, 8)),
            ("padding", padded),
            ("a VLAN tag", tagged),
            ("ICMP", change(23, 1)),
        ] {
            assert_eq!(Headers::parse(&frame).unwrap().l4(), None, "{what}");
        }
    }

    #[test]
    fn extension_headers_are_passed_over_up_to_a_bound() {
        let chain = |count: usize, last: &[u8]| {
            let mut frame = Flow { v6: true, ..Flow::udp4() }.packet(&[1; 4], false);
            let mut extensions =
                [[DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0]].repeat(count).concat();
            extensions.extend(last);
            let before = extensions.len().checked_sub(8 + last.len()).unwrap_or(extensions.len());
            if let Some(next) = extensions.get_mut(before) {
                *next = if last.is_empty() { UDP } else { FRAGMENT };
            }
            frame[20] = DESTINATION_OPTIONS;
            put_len(&mut frame, extensions.len() + 12);
            frame.splice(54..54, extensions);
            frame
        };
        for count in 1..=MAX_EXTENSIONS - 1 {
            let Network::Ip(ip) = Headers::parse(&chain(count, &[])).unwrap().network else {
                panic!("IPv6");
            };
            assert_eq!((ip.protocol, ip.transport, ip.extended), (UDP, Transport::Udp, true));
            assert_eq!(ip.payload, 54 + 8 * count);
        }
        assert_eq!(Headers::parse(&chain(MAX_EXTENSIONS, &[])), Err(Malformed::Extensions));

        for (position, fragment) in
            [(1u16, Fragment::First), (0x00b9, Fragment::Later), (0, Fragment::Whole)]
        {
            let [a, b] = position.to_be_bytes();
            let Network::Ip(ip) =
                Headers::parse(&chain(1, &[UDP, 0, a, b, 0, 0, 0, 1])).unwrap().network
            else {
                panic!("IPv6");
            };
            assert_eq!((ip.fragment, ip.protocol), (fragment, UDP));
        }
        let mut endless = chain(1, &[]);
        endless[55] = 200;
        let cut = Malformed::Truncated { header: "IPv6 extension", len: endless.len() };
        assert_eq!(Headers::parse(&endless), Err(cut));
    }

    fn put_len(frame: &mut [u8], len: usize) {
        frame[18..20].copy_from_slice(&(len as u16).to_be_bytes());
    }

    fn check_offsets(bytes: &[u8]) {
        let Ok(headers) = Headers::parse(bytes) else { return };
        if let Network::Ip(ip) = headers.network {
            assert!(ip.offset < ip.payload && ip.payload <= ip.end && ip.end <= bytes.len());
        }
        if let Some(l4) = headers.l4() {
            assert!(l4.offset + 8 <= l4.payload && l4.payload <= bytes.len());
        }
    }
}
