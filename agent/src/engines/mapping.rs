//! Ports of the host that a runtime's plugin is told to publish for a container.

use std::net::IpAddr;

use weft_model::Protocol;

use crate::api::types::{EndpointStatus, PortRequest};

/// Ports of the host in a row that lead to as many of a container, as runtimes write it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct PortMapping {
    /// Every address of the host when empty.
    pub(crate) host_ip: String,
    /// The first.
    pub(crate) host_port: u16,
    /// The first.
    pub(crate) container_port: u16,
    /// TCP when empty.
    pub(crate) protocol: String,
    pub(crate) count: u16,
}

/// Why no port can be what was asked for.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum MappingError {
    #[error("{0} is no address of a host: give one such as 192.0.2.1, or leave it out")]
    Address(String),
    #[error("{port}/{protocol} cannot be published: weft publishes tcp and udp")]
    Protocol { port: u16, protocol: String },
    #[error("{count} ports from {first}: the last port is 65535")]
    Beyond { first: u16, count: u16 },
}

impl PortMapping {
    /// One request a port.
    ///
    /// # Errors
    ///
    /// The address, the protocol or the number of ports cannot be.
    pub(crate) fn requests(&self) -> Result<Vec<PortRequest>, MappingError> {
        let Self { host_ip, host_port, container_port, protocol, count } = self;
        let host_ip: Option<IpAddr> = match host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| MappingError::Address(text.into()))?),
        };
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "" | "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => {
                let (port, protocol) = (*container_port, protocol.clone());
                return Err(MappingError::Protocol { port, protocol });
            }
        };
        let nth = |first: u16, n: u16| {
            first.checked_add(n).ok_or(MappingError::Beyond { first, count: *count })
        };
        let request = |n: u16| {
            Ok(PortRequest {
                host_ip,
                host_port: Some(nth(*host_port, n)?),
                host_port_last: None,
                container_port: nth(*container_port, n)?,
                protocol,
            })
        };
        (0..*count).map(request).collect()
    }
}

/// What of `wanted` leads to none of a container's `others`: a runtime tells each network of a
/// container of all its ports.
pub(crate) fn without_those_of(
    wanted: Vec<PortRequest>,
    others: &[EndpointStatus],
) -> Vec<PortRequest> {
    let published = || others.iter().flat_map(|other| &other.ports);
    let is_missing = |request: &PortRequest| {
        !published().any(|port| {
            (port.host_ip, Some(port.host_port), port.container_port, port.protocol)
                == (request.host_ip, request.host_port, request.container_port, request.protocol)
        })
    };
    wanted.into_iter().filter(is_missing).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping() -> PortMapping {
        PortMapping {
            host_ip: String::new(),
            host_port: 8080,
            container_port: 80,
            protocol: "TCP".into(),
            count: 1,
        }
    }

    #[test]
    fn ports_in_a_row_are_one_request_each() {
        let row = PortMapping { count: 3, protocol: String::new(), ..mapping() };
        let requests = row.requests().unwrap();
        let pairs: Vec<_> = requests.iter().map(|r| (r.host_port, r.container_port)).collect();
        assert_eq!(pairs, [(Some(8080), 80), (Some(8081), 81), (Some(8082), 82)]);
        assert!(requests.iter().all(|request| request.protocol == Protocol::Tcp));
    }

    #[test]
    fn what_cannot_be_published_is_refused_by_name() {
        let at = PortMapping { host_ip: "127.0.0.1".into(), ..mapping() };
        assert_eq!(at.requests().unwrap()[0].host_ip, Some([127, 0, 0, 1].into()));
        for (mapping, word) in [
            (PortMapping { protocol: "sctp".into(), ..mapping() }, "80/sctp"),
            (PortMapping { host_ip: "lo".into(), ..mapping() }, "lo"),
            (PortMapping { host_port: 65535, count: 2, ..mapping() }, "65535"),
        ] {
            let refused = mapping.requests().unwrap_err().to_string();
            assert!(refused.contains(word), "{refused}");
        }
    }
}
