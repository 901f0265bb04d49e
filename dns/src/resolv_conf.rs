//! The host's `/etc/resolv.conf` (resolv.conf(5)).

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, SocketAddrV6},
};

/// What a `resolv.conf` says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ResolvConf {
    /// In the order of the file, port 53, without duplicates and without the excluded addresses.
    pub servers: Vec<SocketAddr>,
    /// The last `search` or `domain` line's domains.
    pub search: Vec<String>,
    /// All `options`, in order.
    pub options: Vec<String>,
}

/// Reads the text of a `resolv.conf`. Lines that say nothing we know are skipped, as the C library
/// does. `own` are addresses that this agent listens on: to forward to them would be a loop.
///
/// An address with a zone index is kept only if the index is a number (`fe80::1%2`).
pub fn parse(text: &str, own: &BTreeSet<IpAddr>) -> ResolvConf {
    let mut conf = ResolvConf::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let server = words.next().and_then(server).filter(|s| !own.contains(&s.ip()));
                conf.servers.extend(server.filter(|server| !conf.servers.contains(server)));
            }
            Some("search" | "domain") => conf.search = words.map(str::to_owned).collect(),
            Some("options") => conf.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    conf
}

fn server(text: &str) -> Option<SocketAddr> {
    match text.split_once('%') {
        Some((ip, zone)) => {
            Some(SocketAddrV6::new(ip.parse().ok()?, DNS_PORT, 0, zone.parse().ok()?).into())
        }
        None => Some(SocketAddr::new(text.parse().ok()?, DNS_PORT)),
    }
}

const DNS_PORT: u16 = 53;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolv_conf_is_read_as_the_c_library_reads_it() {
        let text = "# made by hand\n\
            nameserver 127.0.0.53 # stub\n\
            nameserver 10.32.0.1\n\
            nameserver not-an-address\n\
            nameserver\n\
            \tnameserver fe80::1%2\n\
            nameserver 127.0.0.53\n\
            domain old.example\n\
            search corp.example lab.example\n\
            options edns0 ndots:2\n\
            options rotate\n\
            sortlist 10.0.0.0";
        let own = BTreeSet::from(["10.32.0.1".parse().unwrap()]);
        assert_eq!(
            parse(text, &own),
            ResolvConf {
                servers: vec!["127.0.0.53:53".parse().unwrap(), "[fe80::1%2]:53".parse().unwrap()],
                search: vec!["corp.example".into(), "lab.example".into()],
                options: vec!["edns0".into(), "ndots:2".into(), "rotate".into()],
            }
        );
    }

    #[test]
    fn an_empty_file_names_no_server() {
        assert_eq!(parse("", &BTreeSet::new()), ResolvConf::default());
    }
}
