use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::Family;

/// The address range of one network, one family: a prefix without host bits.
///
/// IPv4 from /8 to /29, IPv6 from /32 to /120: large enough for a gateway and some endpoints.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet(IpNet);

impl Subnet {
    pub fn net(self) -> IpNet {
        self.0
    }

    pub fn prefix_len(self) -> u8 {
        self.0.prefix_len()
    }

    pub fn family(self) -> Family {
        Family::of(self.0.addr())
    }

    pub fn contains(self, ip: IpAddr) -> bool {
        self.0.contains(&ip)
    }

    pub fn overlaps(self, other: IpNet) -> bool {
        self.0.contains(&other.network()) || other.contains(&self.0.network())
    }

    /// The address `offset` places above the network address.
    pub fn nth(self, offset: u128) -> Option<IpAddr> {
        let ip = match self.0.network() {
            IpAddr::V4(base) => {
                let offset = u32::try_from(offset).ok()?;
                IpAddr::V4(u32::from(base).checked_add(offset)?.into())
            }
            IpAddr::V6(base) => IpAddr::V6(u128::from(base).checked_add(offset)?.into()),
        };
        self.contains(ip).then_some(ip)
    }

    /// How far `ip` lies above the network address.
    pub fn offset_of(self, ip: IpAddr) -> Option<u128> {
        match (self.0.network(), ip) {
            _ if !self.contains(ip) => None,
            (IpAddr::V4(base), IpAddr::V4(ip)) => Some((u32::from(ip) - u32::from(base)).into()),
            (IpAddr::V6(base), IpAddr::V6(ip)) => Some(u128::from(ip) - u128::from(base)),
            _ => None,
        }
    }

    /// Whether an endpoint may have `ip`: inside, and neither the network address (in IPv6 the
    /// subnet-router anycast address, RFC 4291 §2.6.1) nor the IPv4 broadcast address.
    pub fn is_host(self, ip: IpAddr) -> bool {
        let broadcast = ip.is_ipv4() && ip == self.0.broadcast();
        self.contains(ip) && ip != self.0.network() && !broadcast
    }

    /// The first host address: the gateway where none is asked for.
    pub fn first_host(self) -> IpAddr {
        self.nth(1).expect("a subnet has at least eight addresses")
    }
}

impl TryFrom<IpNet> for Subnet {
    type Error = InvalidSubnet;

    fn try_from(net: IpNet) -> Result<Self, InvalidSubnet> {
        let invalid = |why| InvalidSubnet { text: net.to_string(), why };
        if net.addr() != net.network() {
            return Err(invalid("the address has host bits set"));
        }
        let range = match net {
            IpNet::V4(_) => 8..=29,
            IpNet::V6(_) => 32..=120,
        };
        if !range.contains(&net.prefix_len()) {
            return Err(invalid("the prefix length must be 8 to 29 (IPv4) or 32 to 120 (IPv6)"));
        }
        let ip = net.network();
        if ip.is_multicast() || ip.is_loopback() || ip.is_unspecified() {
            return Err(invalid("the range is not for unicast addresses"));
        }
        Ok(Self(net))
    }
}

impl FromStr for Subnet {
    type Err = InvalidSubnet;

    fn from_str(text: &str) -> Result<Self, InvalidSubnet> {
        let net: IpNet = text.parse().map_err(|_| InvalidSubnet {
            text: text.to_owned(),
            why: "it is not ADDRESS/PREFIX",
        })?;
        Self::try_from(net)
    }
}

impl TryFrom<String> for Subnet {
    type Error = InvalidSubnet;

    fn try_from(text: String) -> Result<Self, InvalidSubnet> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a usable subnet: {why}; give one such as 10.32.0.0/24 or fd00:32::/64")]
pub struct InvalidSubnet {
    text: String,
    why: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_that_cannot_carry_a_network_are_refused() {
        for bad in [
            "10.0.0.1/24",
            "10.0.0.0/30",
            "10.0.0.0/7",
            "224.0.0.0/8",
            "127.0.0.0/8",
            "::/64",
            "fd00::/127",
            "10.0.0.0",
            "x/24",
            "10.0.0.0/33",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn offsets_and_addresses_are_inverse() {
        for text in ["10.32.0.0/24", "fd00:32::/64"] {
            let subnet: Subnet = text.parse().unwrap();
            let ip = subnet.nth(9).unwrap();
            assert_eq!(subnet.offset_of(ip), Some(9));
        }
        let subnet: Subnet = "10.32.0.0/24".parse().unwrap();
        assert_eq!(subnet.nth(256), None);
        assert_eq!(subnet.offset_of("10.33.0.1".parse().unwrap()), None);
        assert!(!subnet.is_host("10.32.0.255".parse().unwrap()));
        assert!(!subnet.is_host("10.32.0.0".parse().unwrap()));
    }
}
