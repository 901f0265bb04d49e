use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

/// The underlay address of a node's tunnel endpoint (VTEP, RFC 7348 §2). Never an overlay address.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct VtepAddr(IpAddr);

impl VtepAddr {
    pub fn ip(self) -> IpAddr {
        self.0
    }
}

impl From<IpAddr> for VtepAddr {
    fn from(ip: IpAddr) -> Self {
        Self(ip.to_canonical())
    }
}

impl FromStr for VtepAddr {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<IpAddr>().map(Self::from)
    }
}

impl fmt::Display for VtepAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
