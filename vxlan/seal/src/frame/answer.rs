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
    /// the address that it has itself. Drop it without a word.
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
                Some(&SOLICITATION) => solicitation(message, headers, &ip, lookup, room),
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
    let Some(owner) = lookup(IpAddr::from(target)) else { return Answer::Unknown };
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
    let Some(owner) = lookup(IpAddr::V6(target)) else { return Answer::Unknown };
    if owner == source {
        return Answer::Quiet;
    }

    // Duplicate address detection asks from the unspecified address; all nodes are told then, and
    // it is not a solicited answer (RFC 4861 §7.2.4, RFC 4862 §5.4.4).
    let probe = asker.is_unspecified();
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
pub(super) const HOP_LIMIT: u8 = 255;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
/// ff02::1:ff00:0/104 (RFC 4291 §2.7.1).
const SOLICITED_NODE: [u8; 13] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff];
