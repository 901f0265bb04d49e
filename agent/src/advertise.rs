//! The address by which other hosts know this one, as `init` and `join` were told.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use weft_gossip::identity::{FileError, read, write_atomic};

use crate::config::AGENT_PORT;

/// An underlay address of this host and, where it is not the usual one, the agent's port.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Advertise {
    pub ip: IpAddr,
    #[serde(default)]
    pub port: Option<u16>,
}

impl Advertise {
    pub fn socket_address(self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port.unwrap_or(AGENT_PORT))
    }

    /// Keeps it for the agent's starts.
    pub fn save(self, state_dir: &Path) -> Result<(), FileError> {
        let text = serde_json::to_vec(&self).expect("plain fields become JSON");
        write_atomic(&state_dir.join(FILE), &text)
    }

    /// What `init` or `join` was told, if anything.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, io::Error> {
        let path = state_dir.join(FILE);
        let bytes = read(&path).map_err(io::Error::other)?;
        bytes.map(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::other)).transpose()
    }
}

impl FromStr for Advertise {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = text
            .parse::<IpAddr>()
            .map(|ip| Self { ip, port: None })
            .or_else(|_| {
                text.parse().map(|a: SocketAddr| Self { ip: a.ip(), port: Some(a.port()) })
            })
            .map_err(
                |_| "give ADDRESS or ADDRESS:PORT, such as 192.0.2.11 or [2001:db8::1]:6790",
            )?;
        let usable =
            !found.ip.is_unspecified() && !found.ip.is_loopback() && !found.ip.is_multicast();
        match usable && found.port != Some(0) {
            true => Ok(found),
            false => Err("give an address by which other hosts reach this one".into()),
        }
    }
}

const FILE: &str = "advertise.json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_or_without_a_port_is_read() {
        assert_eq!("192.0.2.1".parse::<Advertise>().unwrap().socket_address().port(), AGENT_PORT);
        assert_eq!("[2001:db8::1]:7".parse::<Advertise>().unwrap().port, Some(7));
        for bad in ["", "host", "0.0.0.0", "127.0.0.1", "224.0.0.1", "192.0.2.1:0", "192.0.2.1:x"] {
            assert!(bad.parse::<Advertise>().is_err(), "{bad}");
        }
    }
}
