//! The connections that a namespace tracks (`include/uapi/linux/netfilter/nfnetlink_conntrack.h`).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use nix::errno::Errno;
use weft_model::{Family, Protocol};

use crate::{
    Frontend, HostPort, NetworkBalance, Pool,
    netfilter::{Netfilter, NetfilterError, Request},
    set::{Element, Kind},
    wire::{self, Writer, attribute, nested},
};

/// A tracked connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Connection {
    pub(crate) protocol: Protocol,
    pub(crate) client: SocketAddr,
    /// Where it was sent to.
    pub(crate) to: SocketAddr,
    /// Who answers: the backend, if it was translated.
    pub(crate) from: SocketAddr,
    /// Whether both ends agree that there is one; of UDP, whether there was an answer.
    pub(crate) established: bool,
    /// Whether anything came back.
    pub(crate) answered: bool,
    /// The attributes by which the kernel finds it again.
    pub(crate) identity: Identity,
}

/// What the kernel knows one connection by.
pub(crate) type Identity = Vec<u8>;

impl Connection {
    pub(crate) fn is_translated(&self) -> bool {
        self.to != self.from
    }

    fn request(&self, kind: u16) -> Request {
        let family = if self.client.is_ipv4() { AF_INET } else { AF_INET6 };
        Request { kind, flags: 0, family, body: Writer(self.identity.clone()) }
    }
}

/// Reads the connections of TCP and UDP, of both families.
pub(crate) fn read(netfilter: &mut Netfilter) -> Result<Vec<Connection>, NetfilterError> {
    let request = Request { kind: GET, flags: 0, family: 0, body: Writer::default() };
    let answers = netfilter.dump(&request)?;
    Ok(answers.iter().filter_map(|answer| parse(&answer.body)).collect())
}

/// Has the kernel forget `connections`; tells how many were there still.
///
/// Of TCP, those that nobody has answered: the answer may have come since they were read, and then
/// both ends rely on them.
pub(crate) fn forget(
    netfilter: &mut Netfilter,
    connections: &[&Connection],
) -> Result<u64, NetfilterError> {
    let (tcp, udp): (Vec<&Connection>, Vec<_>) =
        connections.iter().partition(|connection| connection.protocol == Protocol::Tcp);
    let requests: Vec<_> = udp.iter().map(|connection| connection.request(DELETE)).collect();
    let mut forgotten = netfilter.each(&requests, Errno::ENOENT)?;
    for connection in tcp {
        // The kernel has no message that deletes on a condition: between these two there is next to
        // no time.
        if is_unanswered(netfilter, connection)? {
            forgotten += netfilter.each(&[connection.request(DELETE)], Errno::ENOENT)?;
        }
    }
    Ok(forgotten)
}

fn is_unanswered(
    netfilter: &mut Netfilter,
    connection: &Connection,
) -> Result<bool, NetfilterError> {
    match netfilter.ask(&connection.request(GET)) {
        Ok(answer) => Ok(parse(&answer.body).is_some_and(|found| !found.answered)),
        Err(NetfilterError::Refused { errno: Errno::ENOENT, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a connection keeps its client from a backend: of UDP any, because the client goes on
/// sending, so that it would never end by itself; of TCP one that nobody has answered, because its
/// client, or another one from the same port, tries again in vain for two minutes.
///
/// It goes to somebody who is no backend any more, or it was let through untranslated when the
/// frontend did not exist.
pub(crate) fn is_stale(connection: &Connection, balance: &NetworkBalance) -> bool {
    if connection.protocol == Protocol::Tcp && connection.answered {
        return false;
    }
    let Some((frontend, pool)) = frontend(balance, connection.protocol, connection.to) else {
        return false;
    };
    let port = |backend: Option<u16>| match frontend.port {
        Some(port) => backend.unwrap_or(port),
        None => connection.to.port(),
    };
    !pool.backends.values().any(|backend| {
        let address = SocketAddr::new(backend.ip, port(backend.port));
        backend.weight > 0 && address == connection.from
    })
}

/// Whether a connection of UDP is translated still for one of the frontends that are `gone`, and
/// for none of those that there are.
pub(crate) fn is_left_over(
    connection: &Connection,
    frontends: &BTreeMap<Frontend, Arc<Pool>>,
    gone: &BTreeSet<Frontend>,
) -> bool {
    let Connection { protocol, to, .. } = *connection;
    let keys = || keys(protocol, to).into_iter();
    protocol == Protocol::Udp
        && connection.is_translated()
        && keys().any(|frontend| gone.contains(&frontend))
        && !keys().any(|frontend| frontends.contains_key(&frontend))
}

/// Whether a connection of UDP to the host keeps its client from where `ports` lead: it began before
/// they did, or when they led elsewhere. Or it goes still where those led that are `gone`.
pub(crate) fn is_astray(
    connection: &Connection,
    ports: &BTreeMap<HostPort, SocketAddr>,
    gone: &BTreeMap<HostPort, SocketAddr>,
    is_local: impl Fn(IpAddr) -> bool,
) -> bool {
    let Connection { protocol, to, from, .. } = *connection;
    let (family, port) = (Family::of(to.ip()), to.port());
    let keys = [Some(to.ip()), None].map(|ip| HostPort { ip, family, protocol, port });
    let lead = |ports: &BTreeMap<_, _>| keys.iter().find_map(|key| ports.get(key).copied());
    protocol == Protocol::Udp
        && is_local(to.ip())
        && match lead(ports) {
            Some(wanted) => wanted != from,
            None => lead(gone) == Some(from),
        }
}

/// The frontend that connections to `to` come to.
pub(crate) fn frontend(
    balance: &NetworkBalance,
    protocol: Protocol,
    to: SocketAddr,
) -> Option<(Frontend, &Pool)> {
    keys(protocol, to)
        .into_iter()
        .find_map(|frontend| balance.frontends.get(&frontend).map(|pool| (frontend, &**pool)))
}

/// What a frontend may be called that connections to `to` come to: its own port goes first.
fn keys(protocol: Protocol, to: SocketAddr) -> [Frontend; 2] {
    [Some(to.port()), None].map(|port| Frontend { ip: to.ip(), protocol, port })
}

/// What the translation of answers takes, by the connections that there are.
pub(crate) fn used(connections: &[Connection]) -> BTreeSet<Element> {
    let translated = connections.iter().filter(|connection| connection.is_translated());
    translated
        .flat_map(|connection| {
            let (ip, port) = (connection.from.ip(), connection.from.port());
            [Kind::Replies, Kind::AddressReplies, Kind::Fragments]
                .map(|kind| Element::new(kind, ip, connection.protocol, port))
        })
        .collect()
}

/// How many connections each backend has, by the frontend they came to.
pub(crate) fn counts(
    connections: &[Connection],
    balance: &NetworkBalance,
) -> BTreeMap<Frontend, BTreeMap<SocketAddr, u64>> {
    let mut counts: BTreeMap<Frontend, BTreeMap<SocketAddr, u64>> = BTreeMap::new();
    for connection in connections.iter().filter(|c| c.established && c.is_translated()) {
        if let Some((key, _)) = frontend(balance, connection.protocol, connection.to) {
            *counts.entry(key).or_default().entry(connection.from).or_default() += 1;
        }
    }
    counts
}

fn parse(body: &[u8]) -> Option<Connection> {
    let (original, reply) = (attribute(body, TUPLE_ORIGINAL)?, attribute(body, TUPLE_REPLY)?);
    let protocol = match nested(original, &[TUPLE_PROTOCOL, PROTOCOL_NUMBER])? {
        [6] => Protocol::Tcp,
        [17] => Protocol::Udp,
        _ => return None,
    };
    let status = attribute(body, STATUS).and_then(wire::number)?;
    let answered = status & SEEN_REPLY != 0;
    let established = match protocol {
        Protocol::Udp => answered,
        Protocol::Tcp => {
            nested(body, &[PROTOCOL_INFO, INFO_TCP, TCP_STATE]) == Some(&[TCP_ESTABLISHED])
        }
    };
    let mut identity = Writer::default();
    identity.bytes(TUPLE_ORIGINAL | NESTED, original);
    for kind in [ZONE, ID] {
        if let Some(value) = attribute(body, kind) {
            identity.bytes(kind, value);
        }
    }
    Some(Connection {
        protocol,
        client: end(original, [IP_V4_SOURCE, IP_V6_SOURCE], SOURCE_PORT)?,
        to: end(original, [IP_V4_DESTINATION, IP_V6_DESTINATION], DESTINATION_PORT)?,
        from: end(reply, [IP_V4_SOURCE, IP_V6_SOURCE], SOURCE_PORT)?,
        established,
        answered,
        identity: identity.0,
    })
}

fn end(tuple: &[u8], [v4, v6]: [u16; 2], port: u16) -> Option<SocketAddr> {
    let addresses = attribute(tuple, TUPLE_IP)?;
    let ip: IpAddr = match (attribute(addresses, v4), attribute(addresses, v6)) {
        (Some(octets), _) => <[u8; 4]>::try_from(octets).ok()?.into(),
        (None, Some(octets)) => <[u8; 16]>::try_from(octets).ok()?.into(),
        (None, None) => return None,
    };
    let port = nested(tuple, &[TUPLE_PROTOCOL, port])?;
    Some(SocketAddr::new(ip, u16::from_be_bytes(port.try_into().ok()?)))
}

/// `IPCTNL_MSG_CT_GET`, `IPCTNL_MSG_CT_DELETE` of `NFNL_SUBSYS_CTNETLINK`.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const NESTED: u16 = 0x8000;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IP_V4_SOURCE: u16 = 1;
const IP_V4_DESTINATION: u16 = 2;
const IP_V6_SOURCE: u16 = 3;
const IP_V6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const INFO_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
const TCP_ESTABLISHED: u8 = 3;
/// `IPS_SEEN_REPLY` of `nf_conntrack_common.h`.
const SEEN_REPLY: u32 = 1 << 1;

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        process::Command,
        thread,
        time::Duration,
    };

    use nix::sched::{CloneFlags, unshare};
    use weft_vxlan::Namespace;

    use super::*;

    fn udp(to: &str, from: &str) -> Connection {
        Connection {
            protocol: Protocol::Udp,
            client: "198.51.100.7:4000".parse().unwrap(),
            to: to.parse().unwrap(),
            from: from.parse().unwrap(),
            established: false,
            answered: false,
            identity: Vec::new(),
        }
    }

    #[test]
    fn who_sends_to_a_port_since_before_it_was_published_is_led_anew() {
        let port = |ip: Option<&str>, port| HostPort {
            ip: ip.map(|ip| ip.parse().unwrap()),
            family: Family::V4,
            protocol: Protocol::Udp,
            port,
        };
        let to = |to: &str| to.parse::<SocketAddr>().unwrap();
        let ports = BTreeMap::from([
            (port(None, 53), to("169.254.192.1:100")),
            (port(Some("203.0.113.5"), 514), to("169.254.192.1:200")),
        ]);
        let gone = BTreeMap::from([(port(None, 161), to("169.254.192.3:300"))]);
        let own = ["192.0.2.1", "203.0.113.5"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let is_local = |ip: IpAddr| own.contains(&ip);
        let astray = |to: &str, from: &str| is_astray(&udp(to, from), &ports, &gone, is_local);

        assert!(astray("192.0.2.1:53", "192.0.2.1:53"), "it began before the port was published");
        assert!(astray("192.0.2.1:53", "169.254.192.3:7"), "the port led elsewhere then");
        assert!(!astray("192.0.2.1:53", "169.254.192.1:100"), "as it should be");
        assert!(!astray("8.8.8.8:53", "8.8.8.8:53"), "not to this host");
        assert!(!astray("192.0.2.1:514", "192.0.2.1:514"), "not at that address");
        assert!(astray("203.0.113.5:514", "203.0.113.5:514"), "at that address");
        assert!(astray("192.0.2.1:161", "169.254.192.3:300"), "the port has been withdrawn");
        assert!(!astray("192.0.2.1:161", "192.0.2.1:161"), "the host's own");
        let tcp = Connection { protocol: Protocol::Tcp, ..udp("192.0.2.1:53", "192.0.2.1:53") };
        assert!(!is_astray(&tcp, &ports, &gone, is_local));
    }

    #[test]
    fn what_goes_to_a_frontend_that_has_gone_is_left_over_unless_another_takes_its_place() {
        let frontend =
            |port| Frontend { ip: [10, 1, 0, 200].into(), protocol: Protocol::Udp, port };
        let pool = Arc::new(Pool {
            service: "web".parse().unwrap(),
            backends: BTreeMap::new(),
            spread: weft_model::Spread::Hash,
            affinity: None,
            source: weft_model::Source::Preserve,
        });
        let gone = BTreeSet::from([frontend(Some(53))]);
        let left_over = |to: &str, from: &str, now: Option<Option<u16>>| {
            let now = now.into_iter().map(|port| (frontend(port), Arc::clone(&pool))).collect();
            is_left_over(&udp(to, from), &now, &gone)
        };
        let (vip, backend) = ("10.1.0.200:53", "10.1.0.7:53");
        assert!(left_over(vip, backend, None));
        assert!(left_over(vip, backend, Some(Some(54))));
        assert!(!left_over(vip, backend, Some(None)));
        assert!(!left_over(vip, vip, None));
        assert!(!left_over("10.1.0.200:54", backend, None));
    }

    #[test]
    fn who_has_been_answered_since_is_not_forgotten() {
        let test = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("run the tests as root");
            let rules = "ip link set lo up && nft 'add table inet t; \
                         add chain inet t c { type filter hook output priority 0; }; \
                         add rule inet t c ct state invalid accept; \
                         add chain inet t d { type filter hook input priority 0; }; \
                         add rule inet t d tcp dport 9 drop'";
            assert!(Command::new("sh").args(["-c", rules]).status().unwrap().success());
            let mut netfilter = Netfilter::open(&Namespace::current().unwrap()).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let _served = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let silent = "127.0.0.1:9".parse().unwrap();
            let waited = TcpStream::connect_timeout(&silent, Duration::from_millis(1));
            assert!(waited.is_err(), "{waited:?}");
            let connections = read(&mut netfilter).unwrap();
            assert_eq!(connections.len(), 2, "{connections:?}");
            // Both were unanswered when they were looked at.
            let earlier: Vec<_> = connections
                .into_iter()
                .map(|connection| Connection { answered: false, ..connection })
                .collect();
            let forgotten = forget(&mut netfilter, &earlier.iter().collect::<Vec<_>>());
            assert_eq!(forgotten.unwrap(), 1);
            let left = read(&mut netfilter).unwrap();
            assert_eq!(left.len(), 1, "{left:?}");
            assert_eq!(left[0].to, listener.local_addr().unwrap());
            assert_eq!(forget(&mut netfilter, &earlier.iter().collect::<Vec<_>>()).unwrap(), 0);
        };
        thread::spawn(test).join().unwrap();
    }

    #[test]
    fn what_follows_a_refused_request_has_its_own_answers() {
        let test = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("run the tests as root");
            let mut netfilter = Netfilter::open(&Namespace::current().unwrap()).unwrap();
            let mut missing = Writer::default();
            missing.nest(TUPLE_ORIGINAL, |tuple| {
                tuple.nest(TUPLE_IP, |addresses| {
                    addresses.bytes(IP_V4_SOURCE, &[10, 1, 0, 1]);
                    addresses.bytes(IP_V4_DESTINATION, &[10, 1, 0, 2]);
                });
                tuple.nest(TUPLE_PROTOCOL, |ports| {
                    ports.bytes(PROTOCOL_NUMBER, &[17]);
                    ports.bytes(SOURCE_PORT, &1000u16.to_be_bytes());
                    ports.bytes(DESTINATION_PORT, &53u16.to_be_bytes());
                });
            });
            let delete = |body| Request { kind: DELETE, flags: 0, family: AF_INET, body };
            let requests = [(); 3].map(|()| delete(missing.clone()));
            match netfilter.each(&requests, Errno::EEXIST) {
                Err(NetfilterError::Refused { errno: Errno::ENOENT, .. }) => {}
                other => panic!("{other:?}"),
            }
            // One that names no connection is about all of them, and succeeds.
            let all = netfilter.each(&[delete(Writer::default())], Errno::ENOENT);
            assert_eq!(all.unwrap(), 1);
        };
        thread::spawn(test).join().unwrap();
    }
}
