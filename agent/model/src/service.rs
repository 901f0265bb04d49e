use std::{collections::BTreeMap, fmt, net::IpAddr, num::NonZeroU16, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{AddressGrant, EndpointId, Label, Labels, NetworkId, NodeId};

/// One name for many endpoints of a network, and how connections reach them.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Service {
    pub name: Label,
    pub network: NetworkId,
    /// The virtual addresses, one a family at most; none if the name resolves to the backends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vips: Vec<AddressGrant>,
    /// In whose address space the virtual addresses are in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<VipLease>,
    /// What of the virtual addresses is translated. Every TCP and UDP port, unchanged, if there is
    /// none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ServicePort>,
    #[serde(default)]
    pub spread: Spread,
    /// Seconds for which a client address keeps its backend after its last connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<u32>,
    /// What decides whether a backend gets connections; being attached is enough where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<Check>,
    /// Where it is reached from outside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<Publication>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// Who holds the virtual addresses of a service: the node that reserved them, also when others
/// have changed the service since.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VipLease {
    pub node: NodeId,
    /// What stands for the service in that node's address space.
    pub id: EndpointId,
}

/// A port of a virtual address, and the backends' port that it stands for.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct ServicePort {
    pub protocol: Protocol,
    pub port: NonZeroU16,
    pub target: NonZeroU16,
}

/// A port of hosts that leads to a service.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Publication {
    pub protocol: Protocol,
    pub port: NonZeroU16,
    /// The port of the backends.
    pub target: NonZeroU16,
    #[serde(default)]
    pub mode: PublishMode,
    /// The one address of the host at which it is; every address where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    #[serde(default)]
    pub source: Source,
    /// Whether a proxy tells the backend the client's address in front of what the client says
    /// (PROXY protocol, version 2).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub proxy_protocol: bool,
}

/// A transport protocol that can be spread over backends.
#[derive(
    Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

/// How connections are spread over backends.
#[derive(
    Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// By the client's address and port: every host chooses alike.
    #[default]
    Hash,
    Random,
}

/// Which hosts accept connections to a published port.
#[derive(
    Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize,
)]
#[serde(rename_all = "lowercase")]
pub enum PublishMode {
    /// Every host, for backends on any host.
    #[default]
    Ingress,
    /// Those that have a backend, for their own.
    Host,
}

/// What source address a backend sees of a client from outside.
#[derive(
    Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The client's. Needs a backend whose default route is by the network's gateway.
    #[default]
    Preserve,
    /// The network's gateway.
    Snat,
    /// The client's; and only a host that has a backend accepts the connection.
    Local,
}

/// How a backend's host finds out whether it can serve.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Check {
    pub probe: Probe,
    /// Milliseconds from one probe to the next.
    pub interval: u32,
    /// Milliseconds after which a probe has failed.
    pub timeout: u32,
    /// Successes in a row that make a backend healthy; at least one.
    pub rise: u16,
    /// Failures in a row that make it unhealthy; at least one.
    pub fall: u16,
}

/// One attempt to find out.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// A connection can be made.
    Tcp { port: NonZeroU16 },
    /// `GET` is answered with a status from 200 to 399, or the one given, and a body that contains
    /// the text, if one is given.
    Http {
        port: NonZeroU16,
        path: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<u16>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        body: Option<String>,
    },
    /// A program of the host's, run in the backend's network namespace, ends with status 0.
    Exec { command: Vec<String> },
    /// The container engine's own health check.
    Engine,
}

/// What a node says about a service: of all that is said, the highest revision holds, and of two
/// alike the higher writer's.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ServiceRecord {
    pub name: Label,
    /// When it was written, in seconds since the Unix epoch; more where one before was as late.
    pub revision: u64,
    /// Who wrote this revision; others repeat it.
    pub writer: NodeId,
    pub state: ServiceState,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceState {
    Defined(Box<Service>),
    Removed,
}

/// What a node says about the state of one of its endpoints.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Condition {
    pub endpoint: EndpointId,
    /// It gets no new connections and will go.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// What the checks of services have found, by service.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub verdicts: BTreeMap<Label, Verdict>,
}

/// What a check has found.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Healthy,
    /// With the reason, for people.
    Unhealthy(String),
}

impl Service {
    /// A service without a virtual address, a check or a published port.
    pub fn bare(name: Label, network: NetworkId) -> Self {
        Self {
            name,
            network,
            vips: Vec::new(),
            lease: None,
            ports: Vec::new(),
            spread: Spread::default(),
            affinity: None,
            check: None,
            published: Vec::new(),
            labels: Labels::new(),
        }
    }
}

impl Protocol {
    /// The name in records, commands and nftables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Protocol {
    type Err = UnknownProtocol;

    fn from_str(text: &str) -> Result<Self, UnknownProtocol> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            other => Err(UnknownProtocol(other.to_owned())),
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} cannot be spread over backends: choose tcp or udp")]
pub struct UnknownProtocol(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_service_does_not_say_is_not_in_its_record() {
        let bare = serde_json::json!({"name": "web", "network": "02".repeat(16)});
        let service: Service = serde_json::from_value(bare).unwrap();
        assert_eq!(service.spread, Spread::Hash);
        let said = serde_json::to_string(&service).unwrap();
        assert!(!said.contains("vips") && !said.contains("check"), "{said}");
        assert_eq!(serde_json::from_str::<Service>(&said).unwrap(), service);
    }

    #[test]
    fn every_probe_reads_as_it_is_written() {
        let port = NonZeroU16::new(80).unwrap();
        let path = "/health".to_owned();
        for probe in [
            Probe::Tcp { port },
            Probe::Http { port, path, status: Some(204), body: Some("ok".into()) },
            Probe::Exec { command: vec!["true".into()] },
            Probe::Engine,
        ] {
            let text = serde_json::to_string(&probe).unwrap();
            assert_eq!(serde_json::from_str::<Probe>(&text).unwrap(), probe, "{text}");
        }
    }
}
