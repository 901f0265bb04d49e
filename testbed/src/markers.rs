use std::{fmt, net::IpAddr};

use anyhow::Context as _;

use crate::{Attachment, Recording};

/// Bytes that packets of a network hold, and that must not be seen outside an encrypted one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Marker {
    what: String,
    bytes: Vec<u8>,
}

impl Marker {
    /// # Panics
    ///
    /// There are so few `bytes` that chance would make them.
    pub fn new(what: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        let marker = Self { what: what.into(), bytes: bytes.into() };
        assert!(marker.bytes.len() >= 4, "{marker} is too short to be looked for");
        marker
    }

    /// What packets between two containers have in their headers, and what names them: MAC
    /// addresses, addresses in binary, name and DNS label.
    ///
    /// # Errors
    ///
    /// A MAC address of an attachment is none.
    pub fn between(one: &Attachment, other: &Attachment) -> anyhow::Result<Vec<Self>> {
        let mut markers = Vec::new();
        for (near, far) in [(one, other), (other, one)] {
            let name = &near.name;
            markers.push(Self::new(format!("the MAC address of {name}"), mac(&near.mac)?));
            markers.push(Self::new(format!("the name {name}"), name.as_bytes()));
            let label = [&[u8::try_from(name.len())?], name.as_bytes()].concat();
            markers.push(Self::new(format!("the DNS label {name}"), label));
            for (source, destination) in near.ips().zip(far.ips()) {
                markers.push(Self::new(format!("the address {source}"), octets(source)));
                let both = [octets(source), octets(destination)].concat();
                markers.push(Self::new(format!("{source} and {destination} in a row"), both));
            }
        }
        Ok(markers)
    }

    /// How many packets of `recording` hold it.
    pub fn found_in(&self, recording: &Recording) -> usize {
        recording.holding(&self.bytes)
    }

    /// # Errors
    ///
    /// More packets of `recording` hold it than chance puts there.
    pub fn absent_from(&self, recording: &Recording) -> anyhow::Result<()> {
        let (found, chance) = (self.found_in(recording), self.chance(recording));
        anyhow::ensure!(found <= chance, "{found} packets hold {self}; chance makes {chance}");
        Ok(())
    }

    /// How many packets of random bytes may hold it by chance: what happens in one of a million
    /// recordings is no proof of anything. Only four bytes, an IPv4 address, are so few.
    fn chance(&self, recording: &Recording) -> usize {
        let bytes: usize = recording.packets().iter().map(Vec::len).sum();
        let mean = bytes as f64 / 256_f64.powi(i32::try_from(self.bytes.len()).unwrap_or(i32::MAX));
        // The tail of a Poisson distribution.
        let (mut count, mut term, mut tail) = (0, (-mean).exp(), 1.0);
        while tail - term > 1e-6 {
            tail -= term;
            count += 1;
            term *= mean / count as f64;
        }
        count
    }
}

impl fmt::Display for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, bytes } = self;
        write!(f, "{what} ({:02x?})", bytes.get(..16).unwrap_or(bytes))
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn mac(text: &str) -> anyhow::Result<Vec<u8>> {
    text.split(':')
        .map(|pair| u8::from_str_radix(pair, 16))
        .collect::<Result<_, _>>()
        .with_context(|| format!("{text} is no MAC address"))
}
