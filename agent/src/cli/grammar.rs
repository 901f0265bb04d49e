//! How ports, times and checks are written on the command line.

use std::{net::IpAddr, num::NonZeroU16, ops::RangeInclusive};

use weft_model::{Probe, Protocol, Publication, PublishMode, ServicePort, Source, Spread};

use crate::{
    api::types::{PortRequest, Vip},
    bulk::{MOST_PORTS, too_many_ports},
};

/// Reads `PORT[:TARGET][/PROTOCOL]`: a port of a virtual address, and the backends'.
pub(super) fn service_port(text: &str) -> Result<ServicePort, String> {
    let (ports, protocol) = with_protocol(text)?;
    let (port, target) = ports.split_once(':').unwrap_or((ports, ports));
    Ok(ServicePort { protocol, port: number(port)?, target: number(target)? })
}

/// Reads what Docker reads behind `--publish` of a service: `[PORT:]TARGET[/PROTOCOL]`, or
/// `target=80,published=8080,protocol=tcp,mode=host` and our own `host-ip`, `source` and
/// `proxy-protocol`.
pub(super) fn publication(text: &str) -> Result<Publication, String> {
    if text.contains('=') {
        return long_publication(text);
    }
    let (ports, protocol) = with_protocol(text)?;
    let (port, target) = ports.split_once(':').unwrap_or((ports, ports));
    Ok(publication_of(protocol, number(port)?, number(target)?))
}

fn long_publication(text: &str) -> Result<Publication, String> {
    let (mut port, mut target) = (None, None);
    let mut publication = publication_of(Protocol::Tcp, NonZeroU16::MIN, NonZeroU16::MIN);
    for pair in text.split(',') {
        let (key, value) = pair.split_once('=').ok_or("give KEY=VALUE,…")?;
        match key {
            "published" => port = Some(number(value)?),
            "target" => target = Some(number(value)?),
            "protocol" => publication.protocol = protocol(value)?,
            "mode" => publication.mode = mode(value)?,
            "source" => publication.source = source(value)?,
            "host-ip" | "host_ip" => publication.host_ip = Some(address(value)?),
            "proxy-protocol" => publication.proxy_protocol = proxy_protocol(value)?,
            _ => {
                return Err(format!(
                    "{key:?}: there are published, target, protocol, mode, host-ip, source and proxy-protocol"
                ));
            }
        }
    }
    let target = target.ok_or("give target=PORT")?;
    Ok(Publication { target, port: port.unwrap_or(target), ..publication })
}

pub(super) fn publication_of(
    protocol: Protocol,
    port: NonZeroU16,
    target: NonZeroU16,
) -> Publication {
    Publication {
        protocol,
        port,
        target,
        mode: PublishMode::default(),
        host_ip: None,
        source: Source::default(),
        proxy_protocol: false,
    }
}

/// Reads what Docker reads behind `-p`:
/// `[IP:][HOSTPORT[-HOSTPORT]]:CONTAINERPORT[-CONTAINERPORT][/PROTOCOL]`. As many requests as there
/// are container ports.
pub(super) fn port_requests(text: &str) -> Result<Vec<PortRequest>, String> {
    let (ports, protocol) = with_protocol(text)?;
    let (before, container) = match ports.rsplit_once(':') {
        Some((before, container)) => (Some(before), container),
        None => (None, ports),
    };
    let container = range(container)?;
    let (host_ip, host) = match before {
        None => (None, None),
        Some(before) => host_part(before)?,
    };
    let count = container.len();
    if count > MOST_PORTS {
        return Err(too_many_ports(count));
    }
    let requests = container.enumerate().map(|(nth, container_port)| {
        let request = PortRequest {
            host_ip,
            host_port: None,
            host_port_last: None,
            container_port,
            protocol,
        };
        match &host {
            None => request,
            // As in Docker: one port of the container takes any of the range.
            Some(host) if count == 1 => PortRequest {
                host_port: Some(*host.start()),
                host_port_last: (host.start() < host.end()).then_some(*host.end()),
                ..request
            },
            Some(host) => PortRequest { host_port: host.clone().nth(nth), ..request },
        }
    });
    match &host {
        Some(host) if count > 1 && host.len() != count => {
            Err(format!("{} ports of the host for {count} of the container", host.len()))
        }
        _ => Ok(requests.collect()),
    }
}

/// What stands before the container's port: an address, ports of the host, or both.
fn host_part(text: &str) -> Result<(Option<IpAddr>, Option<RangeInclusive<u16>>), String> {
    let (ip, host) = match text.rsplit_once(':') {
        // The last colon of a bare IPv6 address is none of ours.
        Some((ip, host)) if !text.ends_with(']') => (ip, host),
        _ if text.contains('.') || text.starts_with('[') => (text, ""),
        _ => ("", text),
    };
    let ip = match ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')) {
        _ if ip.is_empty() => None,
        Some(v6) => Some(address(v6)?),
        None if ip.contains(':') => return Err(format!("write [{ip}]:… for an IPv6 address")),
        None => Some(address(ip)?),
    };
    let host = match host {
        "" | "0" => None,
        host => Some(range(host)?),
    };
    Ok((ip, host))
}

fn range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?.get(), number(last)?.get());
    match first <= last {
        true => Ok(first..=last),
        false => Err(format!("{text}: give the lower port first")),
    }
}

fn with_protocol(text: &str) -> Result<(&str, Protocol), String> {
    match text.rsplit_once('/') {
        Some((rest, name)) => Ok((rest, protocol(name)?)),
        None => Ok((text, Protocol::Tcp)),
    }
}

pub(super) fn protocol(name: &str) -> Result<Protocol, String> {
    name.to_ascii_lowercase().parse().map_err(|error| format!("{error}"))
}

pub(super) fn mode(name: &str) -> Result<PublishMode, String> {
    match name {
        "ingress" => Ok(PublishMode::Ingress),
        "host" => Ok(PublishMode::Host),
        _ => Err("there are ingress and host".into()),
    }
}

pub(super) fn source(name: &str) -> Result<Source, String> {
    match name {
        "preserve" => Ok(Source::Preserve),
        "snat" => Ok(Source::Snat),
        "local" => Ok(Source::Local),
        _ => Err("there are preserve, snat and local".into()),
    }
}

pub(super) fn spread(name: &str) -> Result<Spread, String> {
    match name {
        "hash" => Ok(Spread::Hash),
        "random" => Ok(Spread::Random),
        _ => Err("there are hash and random".into()),
    }
}

/// Reads `v2`, the only version that is spoken.
pub(super) fn proxy_protocol(version: &str) -> Result<bool, String> {
    match version {
        "v2" | "2" => Ok(true),
        _ => Err("give v2".into()),
    }
}

/// Reads `auto`, `none`, or addresses with commas between them.
pub(super) fn vip(text: &str) -> Result<Vip, String> {
    match text {
        "auto" => Ok(Vip::Auto),
        "none" => Ok(Vip::None),
        _ => {
            let addresses = text.split(',').map(address);
            let addresses = addresses.collect::<Result<Vec<_>, _>>();
            addresses.map(Vip::Addresses).map_err(|why| format!("{why}: or give auto, or none"))
        }
    }
}

/// Reads `tcp:80`, `http:80/path`, `exec:PROGRAM ARGUMENT…` or `engine`. No shell reads the
/// arguments: blanks separate them.
pub(super) fn probe(text: &str) -> Result<Probe, String> {
    let remedy = "give tcp:PORT, http:PORT/PATH, exec:PROGRAM or engine";
    match text.split_once(':') {
        None if text == "engine" => Ok(Probe::Engine),
        Some(("tcp", port)) => Ok(Probe::Tcp { port: number(port)? }),
        Some(("http", rest)) => {
            let (port, path) = match rest.find('/') {
                Some(at) => rest.split_at(at),
                None => (rest, "/"),
            };
            Ok(Probe::Http { port: number(port)?, path: path.into(), status: None, body: None })
        }
        Some(("exec", command)) if !command.trim().is_empty() => {
            let command: Vec<String> = command.split_whitespace().map(String::from).collect();
            match command.iter().take(1).any(|program| program.contains('/')) {
                true => Err("give a program by its bare name: each host has a directory of those that checks may run".into()),
                false => Ok(Probe::Exec { command }),
            }
        }
        _ => Err(remedy.into()),
    }
}

/// Reads a number and `ms`, `s`, `m`, `h` or `d` as milliseconds; none by `0`.
pub(super) fn milliseconds(text: &str) -> Result<u32, String> {
    let remedy = "give a number and ms, s, m, h or d, such as 5s";
    if text == "0" {
        return Ok(0);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(remedy.into()),
    };
    let number: u64 = number.parse().map_err(|_| remedy.to_owned())?;
    u32::try_from(number.saturating_mul(unit)).map_err(|_| "give at most 49 days".into())
}

/// The same in seconds, rounded up.
pub(super) fn seconds(text: &str) -> Result<u32, String> {
    milliseconds(text).map(|milliseconds| milliseconds.div_ceil(1_000))
}

pub(super) fn number(text: &str) -> Result<NonZeroU16, String> {
    text.parse().map_err(|_| format!("{text:?} is no port: give one from 1 to 65535"))
}

pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is no IP address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a request asks for, as text: `IP HOST-LAST CONTAINER/PROTOCOL`.
    fn asked(text: &str) -> Result<Vec<String>, String> {
        let shown = |request: PortRequest| {
            let ip = request.host_ip.map_or_else(|| "*".into(), |ip| ip.to_string());
            let host = request.host_port.map_or_else(|| "?".into(), |port| port.to_string());
            let last = request.host_port_last.map_or_else(String::new, |last| format!("-{last}"));
            format!("{ip} {host}{last} {}/{}", request.container_port, request.protocol)
        };
        port_requests(text).map(|requests| requests.into_iter().map(shown).collect())
    }

    #[test]
    fn ports_of_a_container_are_written_as_in_docker() {
        for (text, expected) in [
            ("80", &["* ? 80/tcp"][..]),
            ("8080:80", &["* 8080 80/tcp"]),
            ("8080:80/udp", &["* 8080 80/udp"]),
            ("127.0.0.1:8080:80", &["127.0.0.1 8080 80/tcp"]),
            ("127.0.0.1::80", &["127.0.0.1 ? 80/tcp"]),
            ("127.0.0.1:0:80", &["127.0.0.1 ? 80/tcp"]),
            ("[::1]:8080:80/TCP", &["::1 8080 80/tcp"]),
            ("[::1]::80", &["::1 ? 80/tcp"]),
            ("7000-7002:80", &["* 7000-7002 80/tcp"]),
            ("7000-7001:80-81", &["* 7000 80/tcp", "* 7001 81/tcp"]),
            ("80-81/udp", &["* ? 80/udp", "* ? 81/udp"]),
        ] {
            assert_eq!(
                asked(text).as_deref(),
                Ok(&expected.iter().map(|s| s.to_string()).collect::<Vec<_>>()[..]),
                "{text}"
            );
        }
        for bad in
            ["", ":", "0", "65536", "80/sctp", "81-80", "1-3:1-2", "::1:80:80", "host:80:80", "80:"]
        {
            assert!(asked(bad).is_err(), "{bad}: {:?}", asked(bad));
        }
        assert_eq!(asked("1-1024:1-1024").map(|requests| requests.len()), Ok(1024));
        let refused = asked("1-65535").unwrap_err();
        assert!(refused.contains("65535") && refused.contains("at most 1024"), "{refused}");
    }

    #[test]
    fn a_service_is_published_in_docker_s_short_and_long_form() {
        let read = |text: &str| {
            publication(text).map(|its| {
                let Publication { protocol, port, target, mode, source, .. } = its;
                format!("{port}:{target}/{protocol} {mode:?} {source:?} {:?}", its.host_ip)
            })
        };
        assert_eq!(read("8080:80").unwrap(), "8080:80/tcp Ingress Preserve None");
        assert_eq!(read("53/udp").unwrap(), "53:53/udp Ingress Preserve None");
        assert_eq!(
            read("published=8080,target=80,mode=host,source=snat,host-ip=192.0.2.1").unwrap(),
            "8080:80/tcp Host Snat Some(192.0.2.1)"
        );
        for bad in ["", "a:b", "published=8080", "target=80,mode=x", "target=80,colour=red"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_port_of_a_service_may_lead_to_another_of_its_backends() {
        let read = |text: &str| {
            service_port(text).map(|p| (p.port.get(), p.target.get(), p.protocol.as_str()))
        };
        assert_eq!(read("80"), Ok((80, 80, "tcp")));
        assert_eq!(read("80:8080"), Ok((80, 8080, "tcp")));
        assert_eq!(read("53/udp"), Ok((53, 53, "udp")));
        assert!(read("80:").is_err() && read("0").is_err() && read("80/icmp").is_err());
    }

    #[test]
    fn a_check_is_a_kind_and_what_it_asks() {
        let port = NonZeroU16::new(80).unwrap();
        assert_eq!(probe("tcp:80"), Ok(Probe::Tcp { port }));
        let http = |path: &str| Probe::Http { port, path: path.into(), status: None, body: None };
        assert_eq!(probe("http:80/health?x=1"), Ok(http("/health?x=1")));
        assert_eq!(probe("http:80"), Ok(http("/")));
        assert_eq!(probe("engine"), Ok(Probe::Engine));
        let command = ["up", "-e", "/run/up"].map(String::from).into();
        assert_eq!(probe("exec:up -e  /run/up"), Ok(Probe::Exec { command }));
        for bad in ["", "tcp", "tcp:0", "http:x/", "exec:", "exec: ", "exec:/bin/up", "icmp:1"] {
            assert!(probe(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_have_a_unit() {
        assert_eq!(milliseconds("250ms"), Ok(250));
        assert_eq!(milliseconds("10m"), Ok(600_000));
        assert_eq!(seconds("10m"), Ok(600));
        assert_eq!(seconds("1ms"), Ok(1));
        assert_eq!(seconds("0"), Ok(0));
        for bad in ["", "5", "s", "1.5s", "-1s", "50d", "1é"] {
            assert!(milliseconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn virtual_addresses_are_given_picked_or_none() {
        assert_eq!(vip("auto"), Ok(Vip::Auto));
        assert_eq!(vip("none"), Ok(Vip::None));
        let both = ["10.1.0.100", "fd00::100"].map(|ip| ip.parse().unwrap());
        assert_eq!(vip("10.1.0.100,fd00::100"), Ok(Vip::Addresses(both.into())));
        assert!(vip("some").is_err());
    }
}
