//! The agent's configuration: one TOML file with few keys, all defaulted, and flags above it.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use serde::Deserialize;
use weft_model::DnsName;

/// The UDP port on which agents talk to each other.
pub const AGENT_PORT: u16 = 6790;
pub const DEFAULT_CONFIG: &str = "/etc/weft/weft.toml";
pub const DEFAULT_SOCKET: &str = "/run/weft/weft.sock";
pub const DEFAULT_STATE_DIR: &str = "/var/lib/weft";

/// What one agent is told. Every key has a default; an unknown key is an error.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Identity, tokens and the node's own records.
    pub state_dir: PathBuf,
    /// The API's unix socket, mode 0660.
    pub socket: PathBuf,
    /// The group that owns the socket, by name.
    pub socket_group: Option<String>,
    /// Where the networks' namespaces are named; `ip netns` looks into `/run/netns`.
    pub runtime_dir: PathBuf,
    /// Where other agents reach this one: the address to bind and its port.
    pub listen: Option<SocketAddr>,
    /// The underlay address that other hosts know this one by; the tunnel endpoint too.
    pub advertise: Option<IpAddr>,
    /// The UDP port of VXLAN, the same on all hosts (RFC 7348: 4789).
    pub vxlan_port: u16,
    /// Where Prometheus finds `/metrics`; an empty text switches it off.
    #[serde(deserialize_with = "optional_address")]
    pub metrics: Option<SocketAddr>,
    /// The domain below which every name of the cluster is answered.
    pub domain: DnsName,
    /// Seconds that a DNS answer may be cached.
    pub dns_ttl: u32,
    /// Resolvers for names outside the cluster; those of `/etc/resolv.conf` when empty.
    pub dns_upstream: Vec<IpAddr>,
    /// Link-local range for the links between the host and its networks; one /31 a network.
    pub uplink_pool: Ipv4Net,
    /// Seconds that a released address rests before it is given out unasked.
    pub address_rest: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: DEFAULT_STATE_DIR.into(),
            socket: DEFAULT_SOCKET.into(),
            socket_group: None,
            runtime_dir: "/run/netns".into(),
            listen: None,
            advertise: None,
            vxlan_port: 4789,
            metrics: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 9480))),
            domain: "weft.internal".parse().expect("a valid name"),
            dns_ttl: 5,
            dns_upstream: Vec::new(),
            uplink_pool: Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 192, 0), 18),
            address_rest: 60,
        }
    }
}

impl Config {
    /// Reads `path`; without a path the default file, which may be absent.
    ///
    /// # Errors
    ///
    /// A file that was named is absent, or a file is not valid.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or_else(|| Path::new(DEFAULT_CONFIG));
        match fs::read_to_string(file) {
            Ok(text) => Self::parse(&text)
                .map_err(|source| ConfigError::Invalid { path: file.into(), source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_none() => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Unreadable { path: file.into(), source }),
        }
    }

    fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    pub fn rest(&self) -> Duration {
        Duration::from_secs(self.address_rest.into())
    }
}

fn optional_address<'de, D>(deserializer: D) -> Result<Option<SocketAddr>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    match String::deserialize(deserializer)?.as_str() {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| {
            serde::de::Error::custom(format!(
                "{text:?} is not ADDRESS:PORT; give one such as 127.0.0.1:9480, or \"\" for none"
            ))
        }),
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {}; give a readable one with --config", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("the configuration file {} is not valid", path.display())]
    Invalid { path: PathBuf, source: toml::de::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(Config::parse("").unwrap().vxlan_port, 4789);
    }

    #[test]
    fn an_unknown_key_or_a_wrong_value_is_refused_by_name() {
        for (text, word) in [
            ("vxlan_prot = 1", "vxlan_prot"),
            ("vxlan_port = 70000", "70000"),
            ("metrics = \"nine\"", "nine"),
            ("domain = \"-\"", "\"-\""),
            ("uplink_pool = \"10.0.0.0\"", "uplink_pool"),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn the_sample_file_holds_the_defaults() {
        let sample = include_str!("../../deploy/weft.toml");
        let uncommented: String = sample
            .lines()
            .filter_map(|line| {
                line.strip_prefix('#').filter(|rest| rest.contains(" = ")).or(Some(line))
            })
            .filter(|line| !line.starts_with('#'))
            .collect::<Vec<_>>()
            .join("\n");
        Config::parse(&uncommented).unwrap();
    }
}
