//! The agent's configuration: one TOML file with few keys, all defaulted, and flags above it.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::{NonZeroU32, NonZeroU64},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Deserializer, de};
use weft_model::{DnsName, Suite};
use weft_seal::{Offload, OffloadSwitches};

/// The UDP port on which agents talk to each other.
pub const AGENT_PORT: u16 = 6790;
/// The UDP port of the first lane of sealed packets.
pub const SEALED_PORT: u16 = 6791;
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
    /// Whether this host takes part in encrypted networks.
    pub encryption: bool,
    /// The first UDP port of sealed packets; lane N has the port plus N.
    pub sealed_port: u16,
    /// How many lanes sealed packets take; by the number of cores when absent.
    #[serde(deserialize_with = "lanes")]
    pub sealed_lanes: Option<u8>,
    /// The cipher suites that this host takes, the one it likes best first; by the CPU when empty.
    #[serde(deserialize_with = "distinct")]
    pub sealed_suites: Vec<Suite>,
    /// Bytes after which a key is replaced.
    pub sealed_rekey_bytes: NonZeroU64,
    /// Seconds after which a key is replaced.
    pub sealed_rekey_seconds: NonZeroU32,
    /// What of the kernel's offloads the sealed data path may use: all but those that are named.
    #[serde(rename = "sealed_offloads_off", deserialize_with = "all_but")]
    pub sealed_offloads: OffloadSwitches,
    /// Whether this host passes on sealed packets between hosts that do not reach each other.
    pub relay: bool,
    /// The directory of the programs that checks of services may run on this host.
    pub check_programs: PathBuf,
    /// Whether this host's Docker finds the network driver and the IPAM driver `weft`.
    pub docker: bool,
    /// Where Docker looks for the sockets of its plugins.
    pub docker_plugin_dir: PathBuf,
    /// The socket of Docker's API.
    pub docker_socket: PathBuf,
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
            encryption: true,
            sealed_port: SEALED_PORT,
            sealed_lanes: None,
            sealed_suites: Vec::new(),
            sealed_rekey_bytes: NonZeroU64::new(1 << 36).expect("not zero"),
            sealed_rekey_seconds: NonZeroU32::new(120).expect("not zero"),
            sealed_offloads: OffloadSwitches::ALL_ON,
            relay: true,
            check_programs: "/etc/weft/checks".into(),
            docker: true,
            docker_plugin_dir: "/run/docker/plugins".into(),
            docker_socket: "/run/docker.sock".into(),
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

    /// Refuses UDP ports that meet, for an agent that others reach at `agent`.
    ///
    /// # Errors
    ///
    /// Two of them are the same, or there are not as many ports as sealed lanes; both keys are
    /// named.
    pub fn refuse_port_clash(&self, agent: u16) -> Result<(), PortClash> {
        let vxlan = self.vxlan_port;
        if agent == vxlan {
            return Err(PortClash::Agent { port: agent });
        }
        if !self.encryption {
            return Ok(());
        }
        let (first, lanes) = (self.sealed_port, self.lanes());
        let Some(last) = first.checked_add(u16::from(lanes) - 1).filter(|_| first != 0) else {
            return Err(PortClash::Range { first, lanes });
        };
        match [(agent, "listen"), (vxlan, "vxlan_port")]
            .into_iter()
            .find(|(port, _)| (first..=last).contains(port))
        {
            None => Ok(()),
            Some((port, key)) => Err(PortClash::Sealed { first, last, port, key }),
        }
    }

    /// How many lanes sealed packets take on this host.
    pub fn lanes(&self) -> u8 {
        self.sealed_lanes.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            u8::try_from((cores / 2).clamp(1, 4)).expect("at most 4")
        })
    }

    pub fn rest(&self) -> Duration {
        Duration::from_secs(self.address_rest.into())
    }
}

fn optional_address<'de, D: Deserializer<'de>>(text: D) -> Result<Option<SocketAddr>, D::Error> {
    match String::deserialize(text)?.as_str() {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| {
            de::Error::custom(format!(
                "{text:?} is not ADDRESS:PORT; give one such as 127.0.0.1:9480, or \"\" for none"
            ))
        }),
    }
}

fn lanes<'de, D: Deserializer<'de>>(lanes: D) -> Result<Option<u8>, D::Error> {
    match i64::deserialize(lanes)? {
        lanes @ 1..=8 => Ok(u8::try_from(lanes).ok()),
        other => Err(de::Error::custom(format!("{other} is not 1 to 8 lanes"))),
    }
}

fn distinct<'de, D: Deserializer<'de>>(suites: D) -> Result<Vec<Suite>, D::Error> {
    let suites = Vec::<Suite>::deserialize(suites)?;
    let twice = suites.iter().enumerate().find(|(at, suite)| suites[..*at].contains(suite));
    match twice {
        None => Ok(suites),
        Some((_, suite)) => {
            Err(de::Error::custom(format!("{} stands twice: name it once", suite.as_str())))
        }
    }
}

fn all_but<'de, D: Deserializer<'de>>(names: D) -> Result<OffloadSwitches, D::Error> {
    let mut switches = OffloadSwitches::ALL_ON;
    for name in Vec::<String>::deserialize(names)? {
        let offload = Offload::ALL.into_iter().find(|offload| offload.as_str() == name);
        let switch = match offload {
            Some(Offload::TapTso) => &mut switches.tap_tso,
            Some(Offload::TapUso) => &mut switches.tap_uso,
            Some(Offload::UdpSegment) => &mut switches.udp_segment,
            Some(Offload::UdpGro) => &mut switches.udp_gro,
            None => {
                let known = Offload::ALL.map(Offload::as_str).join(", ");
                return Err(de::Error::custom(format!(
                    "{name:?} is no offload: there are {known}"
                )));
            }
        };
        *switch = false;
    }
    Ok(switches)
}

/// Two uses of one UDP port of this host.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PortClash {
    #[error("listen and vxlan_port are both {port}: give one of them another port")]
    Agent { port: u16 },
    #[error(
        "sealed_port {first} with sealed_lanes {lanes} is no range of ports: give 1 to {}",
        u16::MAX - u16::from(*lanes) + 1
    )]
    Range { first: u16, lanes: u8 },
    #[error(
        "{key} {port} lies in {first} to {last}, the ports of sealed_port and sealed_lanes: move one of them"
    )]
    Sealed { first: u16, last: u16, port: u16, key: &'static str },
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
            ("sealed_lanes = 9", "9 is not 1 to 8"),
            ("sealed_lanes = 0", "0 is not 1 to 8"),
            ("sealed_suites = [\"rot13\"]", "rot13"),
            ("sealed_suites = [\"aes128-gcm\", \"aes128-gcm\"]", "twice"),
            ("sealed_rekey_bytes = 0", "zero"),
            ("sealed_rekey_seconds = 0", "zero"),
            ("sealed_offloads_off = [\"lro\"]", "tap-tso, tap-uso, udp-segment, udp-gro"),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn offloads_that_are_named_are_off_and_no_others() {
        let config = Config::parse("sealed_offloads_off = [\"tap-uso\"]").unwrap();
        let expected = OffloadSwitches { tap_uso: false, ..OffloadSwitches::ALL_ON };
        assert_eq!(config.sealed_offloads, expected);
    }

    #[test]
    fn ports_that_meet_are_refused_and_both_keys_named() {
        let clash = |text: &str, agent: u16| {
            let refused = Config::parse(text).unwrap().refuse_port_clash(agent);
            refused.err().map(|clash| clash.to_string())
        };
        assert_eq!(clash("sealed_lanes = 4", AGENT_PORT), None);
        for (text, agent, words) in [
            ("", 4789, ["listen", "vxlan_port"]),
            ("sealed_lanes = 4\nsealed_port = 6787", 6790, ["listen", "sealed_port"]),
            ("sealed_port = 4789", 6790, ["vxlan_port", "sealed_port"]),
            ("sealed_port = 65535\nsealed_lanes = 2", 6790, ["65535", "sealed_lanes"]),
            ("sealed_port = 0", 6790, ["sealed_port 0", "sealed_lanes"]),
        ] {
            let message = clash(text, agent).unwrap();
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
        assert_eq!(clash("encryption = false\nsealed_port = 6790", 6790), None);
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
        let config = Config::parse(&uncommented).unwrap();
        let default = Config::default();
        assert_eq!(config.sealed_rekey_bytes, default.sealed_rekey_bytes);
        assert_eq!(config.sealed_port, default.sealed_port);
    }
}
