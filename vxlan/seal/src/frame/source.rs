use std::net::{IpAddr, Ipv6Addr};

use weft_model::MacAddr;

use super::headers::{ARP_LEN, Headers, ICMPV6, Ip, Network};

/// Who may send as whom: the stations of one network, as seen by one who received from `peer`.
pub trait Stations {
    /// Whether `mac` is a station of the peer, and if an address is given, has it.
    fn holds(&self, mac: MacAddr, ip: Option<IpAddr>) -> bool;

    /// Whether `mac` is the gateway's, which is the same on every node.
    fn is_gateway(&self, mac: MacAddr) -> bool;

    /// Whether `ip` is that of a station of another node than the peer, as far as it is known. The
    /// peer's gateway forwards for the peer's stations and for the world, but not for these.
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
    let gateway = stations.is_gateway(source);
    let may = |ip: IpAddr| match ip {
        ip if ip.is_unspecified() || ip == IpAddr::V6(link_local(source)) => Ok(()),
        ip if gateway && !stations.is_elsewhere(ip) => Ok(()),
        ip if !gateway && stations.holds(source, Some(ip)) => Ok(()),
        ip => Err(Spoofed::Address { mac: source, ip }),
    };
    if !gateway && !stations.holds(source, None) {
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
