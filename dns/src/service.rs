//! The backends of a service, and where they listen: what SRV records say (RFC 2782).

use std::net::IpAddr;

use weft_model::{DnsName, Label, Protocol};

/// The backends of one service. Its addresses are an [`Entry`](crate::Entry) of their own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    pub name: Label,
    /// Those that may get new connections.
    pub backends: Vec<Backend>,
}

/// One member of a service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backend {
    /// Relative to the network; it stands for this backend alone.
    pub target: DnsName,
    pub addresses: Vec<IpAddr>,
    /// Its share among the backends.
    pub weight: u16,
    pub ports: Vec<BackendPort>,
}

/// A port of a service at one of its backends.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct BackendPort {
    pub protocol: Protocol,
    /// The port that it is asked for by.
    pub port: u16,
    /// The port that the backend listens at.
    pub target: u16,
}

/// What a name says about a port: `_http._tcp`, `_8080._udp`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Wanted {
    protocol: Protocol,
    port: u16,
}

impl Wanted {
    /// Reads the two labels in front of a service's name, without their underscores; nothing if there
    /// is no such port.
    pub(crate) fn parse(port: &str, protocol: &str) -> Option<Self> {
        let known = || NAMES.iter().find(|(name, _)| *name == port).map(|(_, number)| *number);
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = if digits { port.parse().ok()? } else { known()? };
        Some(Self { protocol: protocol.parse().ok()?, port })
    }

    /// The backend's ports that are meant: those that are asked for by this number; if there is none,
    /// those that listen at it.
    pub(crate) fn among(self, ports: &[BackendPort]) -> Vec<BackendPort> {
        let of = |number: fn(&BackendPort) -> u16| -> Vec<BackendPort> {
            let meant =
                |one: &&BackendPort| one.protocol == self.protocol && number(one) == self.port;
            ports.iter().filter(meant).copied().collect()
        };
        let asked = of(|one| one.port);
        if asked.is_empty() { of(|one| one.target) } else { asked }
    }
}

/// Names of ports in the registry of RFC 6335 that containers are likely to serve.
const NAMES: &[(&str, u16)] = &[
    ("amqp", 5672),
    ("amqps", 5671),
    ("domain", 53),
    ("ftp", 21),
    ("http", 80),
    ("http-alt", 8080),
    ("https", 443),
    ("imap", 143),
    ("imaps", 993),
    ("ldap", 389),
    ("ldaps", 636),
    ("memcache", 11211),
    ("mongodb", 27017),
    ("mqtt", 1883),
    ("ms-sql-s", 1433),
    ("mysql", 3306),
    ("nfs", 2049),
    ("ntp", 123),
    ("pop3", 110),
    ("pop3s", 995),
    ("postgresql", 5432),
    ("redis", 6379),
    ("rsync", 873),
    ("sip", 5060),
    ("sips", 5061),
    ("smtp", 25),
    ("ssh", 22),
    ("submission", 587),
    ("syslog", 514),
    ("telnet", 23),
    ("xmpp-client", 5222),
    ("xmpp-server", 5269),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_asked_for_by_number_or_by_its_registered_name() {
        let wanted = |protocol, port| Some(Wanted { protocol, port });
        assert_eq!(Wanted::parse("http", "tcp"), wanted(Protocol::Tcp, 80));
        assert_eq!(Wanted::parse("53", "udp"), wanted(Protocol::Udp, 53));
        for (port, protocol) in [("nope", "tcp"), ("80", "sctp"), ("65536", "tcp"), ("+80", "tcp")]
        {
            assert_eq!(Wanted::parse(port, protocol), None, "{port} {protocol}");
        }
        assert!(NAMES.is_sorted());
    }

    #[test]
    fn the_port_of_the_service_goes_before_the_backends() {
        let port = |port, target| BackendPort { protocol: Protocol::Tcp, port, target };
        let ports = [port(80, 8080), port(8080, 9090), port(443, 8443)];
        let meant = |text| Wanted::parse(text, "tcp").unwrap().among(&ports);
        assert_eq!(meant("80"), [port(80, 8080)]);
        assert_eq!(meant("8080"), [port(8080, 9090)]);
        assert_eq!(meant("8443"), [port(443, 8443)]);
        assert_eq!(meant("22"), []);
    }
}
