use std::net::{IpAddr, Ipv6Addr};

use weft_model::MacAddr;

use super::headers::{ARP_LEN, Headers, ICMPV6, Ip, Network};

/// Who may send as whom: the stations of one network, as seen by one who received from `peer`.
pub trait Stations {
    /// Whether `mac` is a station of the peer, and if an address is given, has it.
    fn holds(&self, mac: MacAddr, ip: Option<IpAddr>) -> bool;

    /// Whether `mac` is the gateway's, which is the same on every node, or the peer's router's.
    fn forwards(&self, mac: MacAddr) -> bool;

    /// Whether `ip` is that of a station of another node than the peer, as far as it is known. The
    /// peer's gateway and router forward for the peer's stations and for the world, but not for
    /// these.
    fn is_elsewhere(&self, ip: IpAddr) -> bool;
}

/// Checks that an opened frame was sent by whom it says: the source MAC, the source address of
/// IPv4 and IPv6, the sender of ARP and what a neighbour advertisement announces.
///
/// An unspecified source (DHCP, duplicate address detection) and the link-local address that
/// belongs to the MAC (RFC 4291 appendix A) need no more than the MAC.
///
/// # Errors
/// What was claimed without right.
pub fn check_source(
    frame: &[u8],
    headers: &Headers,
    stations: &impl Stations,
) -> Result<(), Spoofed> {
    let source = headers.source.ok_or(Spoofed::NotAStation)?;
    let forwards = stations.forwards(source);
    let may = |ip: IpAddr| match ip {
        ip if ip.is_unspecified() || ip == IpAddr::V6(link_local(source)) => Ok(()),
        ip if forwards && !stations.is_elsewhere(ip) => Ok(()),
        ip if !forwards && stations.holds(source, Some(ip)) => Ok(()),
        ip => Err(Spoofed::Address { mac: source, ip }),
    };
    if !forwards && !stations.holds(source, None) {
        return Err(Spoofed::Mac { mac: source });
    }
    match headers.network {
        Network::Ip(ip) => {
            may(ip.source)?;
            announced(frame, &ip).map_or(Ok(()), may)
        }
        Network::Arp { offset } => {
            let message = &frame[offset..offset + ARP_LEN];
            if message[8..14] != source.octets() {
                return Err(Spoofed::Arp { mac: source });
            }
            let sender: [u8; 4] = message[14..18].try_into().expect("four octets");
            may(sender.into())
        }
        Network::Other(_) => Ok(()),
    }
}

/// A frame that claims to be another's.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Spoofed {
    #[error("the source of the frame is a group address or all zeros")]
    NotAStation,
    #[error("{mac} is no station of the node that sent it")]
    Mac { mac: MacAddr },
    #[error("{mac} has not the address {ip}")]
    Address { mac: MacAddr, ip: IpAddr },
    #[error("an ARP message from {mac} names another sender")]
    Arp { mac: MacAddr },
}

/// The address that a neighbour advertisement speaks of (RFC 4861 §4.4).
fn announced(frame: &[u8], ip: &Ip) -> Option<IpAddr> {
    if ip.protocol != ICMPV6 || !ip.source.is_ipv6() {
        return None;
    }
    match frame[ip.payload..ip.end] {
        [ADVERTISEMENT, _, _, _, _, _, _, _, ref rest @ ..] => {
            rest.first_chunk::<16>().map(|target| Ipv6Addr::from(*target).into())
        }
        _ => None,
    }
}

/// The link-local address that a host makes of its MAC.
fn link_local(mac: MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.octets();
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

const ADVERTISEMENT: u8 = 136;

#[cfg(test)]
mod tests {
    use super::{
        super::{headers::station, reference::Flow},
        *,
    };

    #[test]
    fn a_station_may_send_as_itself() {
        for flow in [Flow::tcp4(), Flow { v6: true, ..Flow::udp4() }] {
            assert_eq!(check(&flow.packet(&[1], true)), Ok(()));
        }
    }

    #[test]
    fn another_mac_is_refused() {
        let mut frame = Flow::tcp4().packet(&[1], true);
        frame[11] = 2;
        assert_eq!(check(&frame), Err(Spoofed::Mac { mac: mac(2) }));
        frame[6] = 3;
        assert_eq!(check(&frame), Err(Spoofed::NotAStation));
        frame[6..12].fill(0);
        assert_eq!(check(&frame), Err(Spoofed::NotAStation));
    }

    #[test]
    fn another_address_is_refused_also_behind_tags_and_options() {
        let tags = vec![[0x88, 0xa8, 0, 1], [0x81, 0, 0, 1]];
        for (at, flow) in [
            (29, Flow::tcp4()),
            (37, Flow { tags, options: vec![1; 8], ..Flow::udp4() }),
            (37, Flow { v6: true, ..Flow::udp4() }),
        ] {
            let mut frame = flow.packet(&[1], true);
            frame[at] ^= 0x40;
            let refused = check(&frame).unwrap_err();
            assert!(matches!(refused, Spoofed::Address { .. }), "{refused}");
        }
    }

    #[test]
    fn without_an_address_the_mac_is_enough() {
        let mut discover = Flow::udp4().packet(&[1], true);
        discover[26..30].fill(0);
        assert_eq!(check(&discover), Ok(()));
        let mut report = Flow { v6: true, ..Flow::udp4() }.packet(&[1], true);
        for (address, verdict) in [
            ("::", true),
            ("fe80::ff:fe00:1", true),
            ("fe80::ff:fe00:2", false),
            ("fe80::1", false),
        ] {
            report[22..38].copy_from_slice(&address.parse::<Ipv6Addr>().unwrap().octets());
            assert_eq!(check(&report).is_ok(), verdict, "{address}");
        }
    }

    #[test]
    fn the_gateway_forwards_for_all_but_stations_elsewhere() {
        let mut frame = Flow::tcp4().packet(&[1], true);
        frame[11] = 0xfe;
        for (last, verdict) in [(1, true), (77, true), (200, false)] {
            frame[29] = last;
            assert_eq!(check(&frame).is_ok(), verdict, "10.0.0.{last}");
        }
    }

    #[test]
    fn an_arp_message_may_speak_for_its_sender_only() {
        let arp = |mac: u8, ip: u8| {
            let head = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2];
            [&head[..], &[2, 0, 0, 0, 0, mac, 10, 0, 0, ip], &[0; 10]].concat()
        };
        assert_eq!(check(&arp(1, 1)), Ok(()));
        assert_eq!(check(&arp(2, 1)), Err(Spoofed::Arp { mac: mac(1) }));
        let ip = IpAddr::from([10, 0, 0, 2]);
        assert_eq!(check(&arp(1, 2)), Err(Spoofed::Address { mac: mac(1), ip }));
    }

    #[test]
    fn an_advertisement_may_announce_the_senders_address_only() {
        let mut frame = Flow { v6: true, ..Flow::udp4() }.packet(&[0; 16], true);
        frame[20] = ICMPV6;
        frame[54] = ADVERTISEMENT;
        for (last, verdict) in [(1, true), (2, false)] {
            frame[62..78].fill(0xfd);
            frame[77] = last;
            assert_eq!(check(&frame).is_ok(), verdict, "{last}");
        }
    }

    struct One;

    impl Stations for One {
        fn holds(&self, source: MacAddr, ip: Option<IpAddr>) -> bool {
            let mut v6 = [0xfd; 16];
            v6[15] = 1;
            let own = [IpAddr::from([10, 0, 0, 1]), IpAddr::from(v6)];
            source == mac(1) && ip.is_none_or(|ip| own.contains(&ip))
        }

        fn forwards(&self, source: MacAddr) -> bool {
            source == mac(0xfe)
        }

        fn is_elsewhere(&self, ip: IpAddr) -> bool {
            ip == IpAddr::from([10, 0, 0, 200])
        }
    }

    fn check(frame: &[u8]) -> Result<(), Spoofed> {
        check_source(frame, &Headers::parse(frame).unwrap(), &One)
    }

    fn mac(last: u8) -> MacAddr {
        station([2, 0, 0, 0, 0, last]).unwrap()
    }
}
