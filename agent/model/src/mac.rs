use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{NetworkId, NodeId};

/// An Ethernet address of one station: never multicast, never all zeros.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The address of no router, but of the same form as those: it is in the place of any.
    pub const PLACE_OF_ROUTERS: Self = Self([0x0e, 0x57, 0, 0, 0, 0]);

    /// The address of an endpoint that was given none: locally administered, a function of network
    /// and overlay address, so that neighbours' caches stay right when the address moves.
    pub fn for_address(network: NetworkId, ip: IpAddr) -> Self {
        let [a, b, c, d, e, ..] = network.digest(format!("mac/{ip}").as_bytes());
        Self([0x02, a, b, c, d, e])
    }

    /// The anycast gateway's address: the same on all hosts of `network`.
    pub fn for_gateway(network: NetworkId) -> Self {
        let [a, b, c, d, ..] = network.digest(b"gateway");
        Self([0x02, 0x57, a, b, c, d])
    }

    /// The address that `node` forwards by for clients that are not on `network`: the other hosts
    /// tell by it which of them a connection came through.
    pub fn for_router(network: NetworkId, node: NodeId) -> Self {
        let [a, b, c, d, ..] = network.digest(format!("router/{node}").as_bytes());
        Self([0x0e, 0x57, 0x40 | (a & 0x3f), b, c, d])
    }

    /// What connections of the router with this address are marked with: its last four octets. Of
    /// the two highest bits of a router's the lower one is set.
    pub fn router_mark(self) -> u32 {
        let [.., a, b, c, d] = self.0;
        u32::from_be_bytes([a, b, c, d])
    }

    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<[u8; 6]> for MacAddr {
    type Error = InvalidMac;

    fn try_from(octets: [u8; 6]) -> Result<Self, InvalidMac> {
        if octets[0] & 1 == 1 || octets == [0; 6] {
            return Err(InvalidMac(hex::encode(octets)));
        }
        Ok(Self(octets))
    }
}

impl FromStr for MacAddr {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let invalid = || InvalidMac(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split([':', '-']);
        for octet in &mut octets {
            let part = parts.next().ok_or_else(invalid)?;
            hex::decode_to_slice(part, std::slice::from_mut(octet)).map_err(|_| invalid())?;
        }
        match parts.next() {
            None => Self::try_from(octets).map_err(|_| invalid()),
            Some(_) => Err(invalid()),
        }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, InvalidMac> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not a station's MAC address: give six octets such as 02:42:0a:00:00:05, not multicast, not zero"
)]
pub struct InvalidMac(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multicast_zero_and_malformed_addresses_are_refused() {
        for bad in [
            "",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "02:00:00:00:00",
            "2:0:0:0:0:0",
            "02:00:00:00:00:00:01",
            "+2:00:00:00:00:00",
        ] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
        assert_eq!(
            "02-42-0A-00-00-05".parse::<MacAddr>().unwrap().to_string(),
            "02:42:0a:00:00:05"
        );
    }

    #[test]
    fn each_node_has_a_router_of_its_own_on_each_network() {
        let (network, other) = (NetworkId::from([1; 16]), NetworkId::from([2; 16]));
        let routers = [(network, 1), (network, 2), (other, 1)]
            .map(|(network, node)| MacAddr::for_router(network, NodeId::from([node; 16])));
        assert!(routers[0] != routers[1] && routers[0] != routers[2], "{routers:?}");
        for router in routers {
            assert!(router.to_string().starts_with("0e:57:"), "{router}");
            assert_eq!(router.router_mark() >> 30, 1, "{router}");
        }
        assert_ne!(routers[0].router_mark(), routers[1].router_mark());
    }

    #[test]
    fn an_address_keeps_its_mac_wherever_it_is() {
        let network = NetworkId::from([1; 16]);
        let ip: IpAddr = "10.0.0.9".parse().unwrap();
        assert_eq!(MacAddr::for_address(network, ip), MacAddr::for_address(network, ip));
        assert_ne!(
            MacAddr::for_address(network, ip),
            MacAddr::for_address(NetworkId::from([2; 16]), ip)
        );
    }
}
