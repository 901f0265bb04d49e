use std::fmt;

use serde::{Deserialize, Serialize};

use crate::NetworkId;

/// A VXLAN network identifier, 24 bits on the wire (RFC 7348 §5).
///
/// Zero is never assigned, so an uninitialised field cannot name a network.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

impl Vni {
    pub const MAX: u32 = (1 << 24) - 1;

    /// The first VNI that weft assigns; lower ones are left to other users of VXLAN on the host.
    const FIRST_ASSIGNED: u32 = 4096;

    /// The VNI that `network` takes at its `attempt`-th try; further tries resolve collisions.
    pub fn derive(network: NetworkId, attempt: u32) -> Self {
        let [a, b, c, d, ..] = network.digest(format!("vni/{attempt}").as_bytes());
        let span = Self::MAX - Self::FIRST_ASSIGNED + 1;
        Self(Self::FIRST_ASSIGNED + u32::from_be_bytes([a, b, c, d]) % span)
    }
}

impl TryFrom<u32> for Vni {
    type Error = InvalidVni;

    fn try_from(raw: u32) -> Result<Self, InvalidVni> {
        match raw {
            1..=Self::MAX => Ok(Self(raw)),
            _ => Err(InvalidVni(raw)),
        }
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0} is not a VNI: give a number from 1 to 16777215")]
pub struct InvalidVni(u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_and_25_bit_numbers_are_no_vni_even_from_the_wire() {
        assert!(Vni::try_from(0).is_err());
        assert!(serde_json::from_str::<Vni>("16777216").is_err());
        assert_eq!(u32::from(serde_json::from_str::<Vni>("16777215").unwrap()), Vni::MAX);
    }

    #[test]
    fn another_attempt_gives_another_vni_in_range() {
        let network = NetworkId::from([7; 16]);
        let first = Vni::derive(network, 0);
        assert_eq!(first, Vni::derive(network, 0));
        assert_ne!(first, Vni::derive(network, 1));
        assert!(u32::from(first) >= 4096);
    }
}
