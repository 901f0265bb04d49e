//! Names of addresses: `4.3.2.10.in-addr.arpa` (RFC 1035 §3.5) and `….ip6.arpa` (RFC 3596 §2.5).

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use weft_model::Subnet;

use crate::key::Key;

/// The part of an address that a reverse name spells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Reverse {
    range: IpNet,
    labels: usize,
    /// Whether every label was part of the address.
    exact: bool,
}

impl Reverse {
    /// Reads the key of a reverse name; nothing if it is another name.
    pub(crate) fn parse(key: &Key) -> Option<Self> {
        let mut labels = key.labels();
        let ("arpa", family @ ("in-addr" | "ip6")) = (labels.next()?, labels.next()?) else {
            return None;
        };
        let digits: Vec<&str> = labels.collect();
        let (range, used) = match family {
            "in-addr" => ipv4(&digits),
            _ => ipv6(&digits),
        };
        Some(Self { range, labels: digits.len() + 2, exact: used == digits.len() })
    }

    /// The addresses below this name.
    pub(crate) fn range(&self) -> IpNet {
        self.range
    }

    /// The address, if the name spells one and no more.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        let whole = self.range.prefix_len() == self.range.max_prefix_len();
        (whole && self.exact).then_some(self.range.addr())
    }

    pub(crate) fn is_exact(&self) -> bool {
        self.exact
    }

    pub(crate) fn label_count(&self) -> usize {
        self.labels
    }

    /// The labels of the shortest reverse name whose addresses `subnet` covers in part or whole.
    pub(crate) fn zone_labels(subnet: Subnet) -> usize {
        match subnet.net() {
            IpNet::V4(net) => 2 + usize::from(net.prefix_len() / 8),
            IpNet::V6(net) => 2 + usize::from(net.prefix_len() / 4),
        }
    }
}

/// Returns the range and how many labels gave it.
fn ipv4(digits: &[&str]) -> (IpNet, usize) {
    let octets: Vec<u8> = digits
        .iter()
        .take(4)
        .map_while(|text| text.parse().ok().filter(|octet: &u8| octet.to_string() == *text))
        .collect();
    let mut bytes = [0; 4];
    bytes[..octets.len()].copy_from_slice(&octets);
    let bits = u8::try_from(octets.len() * 8).expect("at most four octets");
    (Ipv4Net::new(bytes.into(), bits).expect("at most 32 bits").into(), octets.len())
}

/// Returns the range and how many labels gave it.
fn ipv6(digits: &[&str]) -> (IpNet, usize) {
    let nibbles: Vec<u128> = digits
        .iter()
        .take(32)
        .map_while(|text| u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 1))
        .collect();
    let value = (0..).zip(&nibbles).fold(0, |value, (at, nibble)| value | nibble << (124 - 4 * at));
    let bits = u8::try_from(nibbles.len() * 4).expect("at most 32 nibbles");
    (Ipv6Net::new(value.into(), bits).expect("at most 128 bits").into(), nibbles.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Option<Reverse> {
        Reverse::parse(&Key::of(name.split('.')))
    }

    #[test]
    fn a_reverse_name_spells_an_address_or_a_range() {
        for (name, range, exact) in [
            ("4.3.2.10.in-addr.arpa", "10.2.3.4/32", true),
            ("3.2.10.in-addr.arpa", "10.2.3.0/24", true),
            ("in-addr.arpa", "0.0.0.0/0", true),
            ("x.4.3.2.10.in-addr.arpa", "10.2.3.4/32", false),
            ("04.3.2.10.in-addr.arpa", "10.2.3.0/24", false),
            ("2.3.0.0.0.0.d.f.ip6.arpa", "fd00:32::/32", true),
            ("10.2.3.0.0.0.0.d.f.ip6.arpa", "fd00:32::/32", false),
        ] {
            let reverse = parse(name).unwrap();
            assert_eq!((reverse.range().to_string().as_str(), reverse.exact), (range, exact));
        }
        assert_eq!(parse("10.example"), None);
        assert_eq!(parse("arpa"), None);
    }

    #[test]
    fn a_full_name_gives_its_address() {
        assert_eq!(parse("4.3.2.10.in-addr.arpa").unwrap().address(), "10.2.3.4".parse().ok());
        assert_eq!(parse("4.3.2.1.10.in-addr.arpa").unwrap().address(), None);
        let v6 = "9.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.2.3.0.0.0.0.d.f.ip6.arpa";
        assert_eq!(parse(v6).unwrap().address(), "fd00:32::9".parse().ok());
    }
}
