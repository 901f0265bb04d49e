use std::net::{IpAddr, Ipv6Addr};

use weft_model::MacAddr;

use super::{
    checksum::{complete, fold, pseudo_header, sum},
    headers::{ARP, ARP_LEN, ETHERNET_LEN, Headers, ICMPV6, IPV6, IPV6_LEN, Ip, Network, station},
    split::put,
};

/// Room in bytes that every answer fits in.
pub const ANSWER_ROOM: usize = ETHERNET_LEN + IPV6_LEN + ADVERTISEMENT_LEN;

/// What becomes of a frame that may be a question for a neighbour's address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Write this many bytes of the room back into the TAP, as a frame with an empty vnet header.
    Reply(usize),
    /// A question for an address that nobody has: drop it and count it.
    Unknown,
    /// Not to be carried, and nothing is wrong with it: announcements, replies, a host asking for
    /// the address that it has itself, or whether one is free that is. Drop it without a word.
    Quiet,
    /// Neither ARP nor neighbour discovery: forward it.
    Forward,
}

/// Answers ARP requests (RFC 826, RFC 5227) and neighbour solicitations (RFC 4861 §7.2) in the
/// place of the stations of other nodes, so that none of them ever crosses the underlay.
///
/// `lookup` says which station of *another node* has an address; it must not know addresses that
/// are answered on this side of the TAP, the gateway's above all.
pub fn answer(
    frame: &[u8],
    headers: &Headers,
    lookup: impl Fn(IpAddr) -> Option<MacAddr>,
    room: &mut [u8; ANSWER_ROOM],
) -> Answer {
    if headers.tags != 0 {
        return Answer::Forward;
    }
    match headers.network {
        Network::Arp { offset } => arp(frame, headers, offset, lookup, room),
        Network::Ip(ip) if ip.protocol == ICMPV6 && ip.source.is_ipv6() => {
            let message = &frame[ip.payload..ip.end];
            match message.first() {
                Some(&SOLICITATION) if frame[ip.offset + 7] == HOP_LIMIT => {
                    solicitation(message, headers, &ip, lookup, room)
                }
                Some(&SOLICITATION) => Answer::Quiet,
                Some(&ADVERTISEMENT) => Answer::Quiet,
                _ => Answer::Forward,
            }
        }
        Network::Other(ARP) => Answer::Quiet,
        Network::Ip(_) | Network::Other(_) => Answer::Forward,
    }
}

fn arp(
    frame: &[u8],
    headers: &Headers,
    offset: usize,
    lookup: impl Fn(IpAddr) -> Option<MacAddr>,
    room: &mut [u8; ANSWER_ROOM],
) -> Answer {
    let message: &[u8; ARP_LEN] = frame[offset..][..ARP_LEN].try_into().expect("parsed as ARP");
    let address = |at: usize| -> [u8; 4] { message[at..at + 4].try_into().expect("four octets") };
    let (asker, target) = (address(14), address(24));
    let hardware: [u8; 6] = message[8..14].try_into().expect("six octets");

    let (Some(source), Some(sender)) = (headers.source, station(hardware)) else {
        return Answer::Quiet;
    };
    // An announcement asks for the sender's own address (RFC 5227 §2.3); operation 2 is a reply.
    if message[6..8] != [0, 1] || asker == target {
        return Answer::Quiet;
    }
    let probe = asker == [0; 4];
    let Some(owner) = lookup(IpAddr::from(target)) else {
        return if probe { Answer::Quiet } else { Answer::Unknown };
    };
    if owner == source || owner == sender {
        return Answer::Quiet;
    }

    room[..6].copy_from_slice(&source.octets());
    room[6..12].copy_from_slice(&owner.octets());
    put(room, 12, ARP);
    let reply = &mut room[ETHERNET_LEN..][..ARP_LEN];
    reply[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
    reply[8..14].copy_from_slice(&owner.octets());
    reply[14..18].copy_from_slice(&target);
    reply[18..24].copy_from_slice(&sender.octets());
    reply[24..28].copy_from_slice(&asker);
    Answer::Reply(ETHERNET_LEN + ARP_LEN)
}

fn solicitation(
    message: &[u8],
    headers: &Headers,
    ip: &Ip,
    lookup: impl Fn(IpAddr) -> Option<MacAddr>,
    room: &mut [u8; ANSWER_ROOM],
) -> Answer {
    let (IpAddr::V6(asker), Some(source)) = (ip.source, headers.source) else {
        return Answer::Quiet;
    };
    let Some(target) = valid_target(message, ip, asker) else { return Answer::Quiet };
    // Duplicate address detection asks from the unspecified address; all nodes are told then, and
    // it is not a solicited answer (RFC 4861 §7.2.4, RFC 4862 §5.4.4).
    let probe = asker.is_unspecified();
    let Some(owner) = lookup(IpAddr::V6(target)) else {
        return if probe { Answer::Quiet } else { Answer::Unknown };
    };
    if owner == source {
        return Answer::Quiet;
    }

    let (to, destination) =
        if probe { (ALL_NODES_MAC, ALL_NODES) } else { (source.octets(), asker) };
    let flags = if probe { OVERRIDE } else { SOLICITED | OVERRIDE };

    room.fill(0);
    room[..6].copy_from_slice(&to);
    room[6..12].copy_from_slice(&owner.octets());
    put(room, 12, IPV6);
    let packet = &mut room[ETHERNET_LEN..];
    packet[0] = 0x60;
    put(packet, 4, ADVERTISEMENT_LEN as u16);
    packet[6] = ICMPV6;
    packet[7] = HOP_LIMIT;
    packet[8..24].copy_from_slice(&target.octets());
    packet[24..40].copy_from_slice(&destination.octets());
    packet[40] = ADVERTISEMENT;
    packet[44] = flags;
    packet[48..64].copy_from_slice(&target.octets());
    packet[64..66].copy_from_slice(&[TARGET_ADDRESS_OPTION, 1]);
    packet[66..72].copy_from_slice(&owner.octets());
    let pseudo = pseudo_header(&packet[8..40], ICMPV6, ADVERTISEMENT_LEN);
    let checksum = complete(fold(u64::from(pseudo) + u64::from(sum(&packet[40..]))));
    put(packet, 42, checksum);
    Answer::Reply(ANSWER_ROOM)
}

/// The address that a solicitation asks for, if all that RFC 4861 §7.1.1 wants of one is so.
fn valid_target(message: &[u8], ip: &Ip, asker: Ipv6Addr) -> Option<Ipv6Addr> {
    let target: [u8; 16] = message.get(8..24)?.try_into().expect("sixteen octets");
    let target = Ipv6Addr::from(target);
    let IpAddr::V6(destination) = ip.destination else { return None };

    let pseudo = fold(
        u64::from(sum(&asker.octets()))
            + u64::from(pseudo_header(&destination.octets(), ICMPV6, message.len())),
    );
    let checksum_holds = fold(u64::from(pseudo) + u64::from(sum(message))) == 0xffff;
    if !checksum_holds || message[1] != 0 || target.is_multicast() || ip.extended {
        return None;
    }
    let mut options = &message[24..];
    while let [kind, units, ..] = *options {
        let len = usize::from(units) * 8;
        if len == 0 || (asker.is_unspecified() && kind == SOURCE_ADDRESS_OPTION) {
            return None;
        }
        options = options.get(len..)?;
    }
    let to_group = destination.octets()[..13] == SOLICITED_NODE;
    (options.is_empty() && (to_group || !asker.is_unspecified())).then_some(target)
}

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const SOURCE_ADDRESS_OPTION: u8 = 1;
const TARGET_ADDRESS_OPTION: u8 = 2;
/// With the option that has the address of the target.
const ADVERTISEMENT_LEN: usize = 32;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// What no packet has that came through a router (RFC 4861 §11.2).
const HOP_LIMIT: u8 = 255;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
/// ff02::1:ff00:0/104 (RFC 4291 §2.7.1).
const SOLICITED_NODE: [u8; 13] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff];

#[cfg(test)]
mod tests {
    use super::{super::reference::ones, *};

    #[test]
    fn an_arp_request_is_answered_with_the_address_of_the_other_node() {
        let request = arp_message(1, MINE, [10, 0, 0, 1], [10, 0, 0, 9]);
        let reply = reply_to(&request).unwrap();
        let expected = [
            &MINE[..],
            &OTHER,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
            &OTHER,
            &[10, 0, 0, 9],
            &MINE,
            &[10, 0, 0, 1],
        ]
        .concat();
        assert_eq!(reply, expected);
    }

    #[test]
    fn an_arp_probe_learns_that_the_address_is_taken() {
        let probe = arp_message(1, MINE, [0, 0, 0, 0], [10, 0, 0, 9]);
        assert_eq!(reply_to(&probe).unwrap()[28..42], [10, 0, 0, 9, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn nobody_answers_for_an_address_that_nobody_has() {
        let arp = arp_message(1, MINE, [10, 0, 0, 1], [10, 0, 0, 77]);
        assert_eq!(reply_to(&arp), Err(Answer::Unknown));
        let solicitation = solicit(ip("fd00::1"), ip("ff02::1:ff00:77"), ip("fd00::77"), true);
        assert_eq!(reply_to(&solicitation), Err(Answer::Unknown));
    }

    #[test]
    fn announcements_and_replies_are_dropped_without_a_word() {
        let quiet = [
            arp_message(1, MINE, [10, 0, 0, 9], [10, 0, 0, 9]),
            arp_message(2, MINE, [10, 0, 0, 1], [10, 0, 0, 9]),
            // The station moved here, and the snapshot is of before or after.
            arp_message(1, OTHER, [0, 0, 0, 0], [10, 0, 0, 9]),
            arp_message(1, [1, 0, 0, 0, 0, 1], [10, 0, 0, 1], [10, 0, 0, 9]),
            // Asking whether an address is free, which it is.
            arp_message(1, MINE, [0, 0, 0, 0], [10, 0, 0, 77]),
            solicit(Ipv6Addr::UNSPECIFIED, ip("ff02::1:ff00:77"), ip("fd00::77"), false),
            neighbour(ADVERTISEMENT, ip("fd00::9"), ip("ff02::1"), ip("fd00::9"), &[]),
        ];
        for frame in quiet {
            assert_eq!(reply_to(&frame), Err(Answer::Quiet), "{frame:02x?}");
        }
    }

    #[test]
    fn a_solicitation_gets_a_solicited_advertisement() {
        for destination in ["ff02::1:ff00:9", "fd00::9"] {
            let request = solicit(ip("fd00::1"), ip(destination), ip("fd00::9"), true);
            let reply = reply_to(&request).unwrap();
            assert_eq!(reply[..14], [&MINE[..], &OTHER, &[0x86, 0xdd]].concat());
            assert_eq!(reply[18..22], [0, 32, ICMPV6, 255]);
            assert_eq!(reply[22..38], ip("fd00::9").octets());
            assert_eq!(reply[38..54], ip("fd00::1").octets());
            assert_eq!((reply[54], reply[58]), (ADVERTISEMENT, SOLICITED | OVERRIDE));
            assert_eq!(reply[62..78], ip("fd00::9").octets());
            assert_eq!(reply[78..86], [&[TARGET_ADDRESS_OPTION, 1][..], &OTHER].concat());
            assert_eq!(checksum_of(&reply), 0xffff);
        }
    }

    #[test]
    fn duplicate_address_detection_is_answered_to_all_nodes() {
        let probe = solicit(Ipv6Addr::UNSPECIFIED, ip("ff02::1:ff00:9"), ip("fd00::9"), false);
        let reply = reply_to(&probe).unwrap();
        assert_eq!(reply[..6], ALL_NODES_MAC);
        assert_eq!(reply[38..54], ip("ff02::1").octets());
        assert_eq!((reply[54], reply[58]), (ADVERTISEMENT, OVERRIDE));
        assert_eq!(checksum_of(&reply), 0xffff);

        let mut own = probe;
        own[6..12].copy_from_slice(&OTHER);
        assert_eq!(reply_to(&own), Err(Answer::Quiet));
    }

    #[test]
    fn a_solicitation_that_breaks_a_rule_gets_no_answer() {
        let good = solicit(ip("fd00::1"), ip("ff02::1:ff00:9"), ip("fd00::9"), true);
        let change = |at: usize, value: u8| {
            let mut frame = good.clone();
            frame[at] = value;
            fix_checksum(&mut frame);
            frame
        };
        let mut wrong_checksum = good.clone();
        wrong_checksum[56] ^= 1;
        for (what, frame) in [
            ("hop limit", change(21, 254)),
            ("code", change(55, 1)),
            ("a multicast target", change(62, 0xff)),
            ("an option without length", change(79, 0)),
            ("an option cut off", change(79, 2)),
            ("checksum", wrong_checksum),
            (
                "a source option in a probe",
                solicit(Ipv6Addr::UNSPECIFIED, ip("ff02::1:ff00:9"), ip("fd00::9"), true),
            ),
            (
                "a probe to one host",
                solicit(Ipv6Addr::UNSPECIFIED, ip("fd00::9"), ip("fd00::9"), false),
            ),
        ] {
            assert_eq!(reply_to(&frame), Err(Answer::Quiet), "{what}");
        }
        for len in 0..good.len() {
            assert!(reply_to(&good[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn all_else_is_forwarded() {
        let echo = neighbour(128, ip("fd00::1"), ip("fd00::9"), ip("fd00::9"), &[]);
        let mut tagged = arp_message(1, MINE, [10, 0, 0, 1], [10, 0, 0, 9]);
        tagged.splice(12..12, [0x81, 0, 0, 1]);
        for frame in [echo, tagged] {
            assert_eq!(reply_to(&frame), Err(Answer::Forward));
        }
    }

    const MINE: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn reply_to(frame: &[u8]) -> Result<Vec<u8>, Answer> {
        let mut room = [0xaa; ANSWER_ROOM];
        let headers = Headers::parse(frame).map_err(|_| Answer::Forward)?;
        let lookup = |asked: IpAddr| {
            let known = [IpAddr::from([10, 0, 0, 9]), IpAddr::V6(ip("fd00::9"))];
            known.contains(&asked).then(|| station(OTHER).unwrap())
        };
        match answer(frame, &headers, lookup, &mut room) {
            Answer::Reply(len) => Ok(room[..len].to_vec()),
            other => Err(other),
        }
    }

    fn ip(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    fn arp_message(operation: u8, mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let head = [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation]].concat();
        [&head[..], &mac, &sender, &[0; 6], &target].concat()
    }

    fn solicit(from: Ipv6Addr, to: Ipv6Addr, target: Ipv6Addr, with_source: bool) -> Vec<u8> {
        let option = [&[SOURCE_ADDRESS_OPTION, 1][..], &MINE].concat();
        neighbour(SOLICITATION, from, to, target, if with_source { &option } else { &[] })
    }

    fn neighbour(
        kind: u8,
        from: Ipv6Addr,
        to: Ipv6Addr,
        target: Ipv6Addr,
        options: &[u8],
    ) -> Vec<u8> {
        let mut frame =
            [&[0x33, 0x33, 0xff, 0, 0, 9][..], &MINE, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
        frame.extend([0, 24 + options.len() as u8, ICMPV6, 255]);
        frame.extend([from.octets(), to.octets()].concat());
        frame.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend(target.octets());
        frame.extend(options);
        fix_checksum(&mut frame);
        frame
    }

    fn fix_checksum(frame: &mut [u8]) {
        frame[56..58].fill(0);
        let checksum = !checksum_of(frame);
        frame[56..58].copy_from_slice(&checksum.to_be_bytes());
    }

    /// The sum over all that the checksum of ICMPv6 covers: all ones if it is right.
    fn checksum_of(frame: &[u8]) -> u16 {
        let len = (frame.len() - 54) as u32;
        ones(&[&frame[22..54], &len.to_be_bytes(), &[0, 0, 0, ICMPV6], &frame[54..]].concat())
    }
}
