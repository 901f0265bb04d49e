//! Queries for names that are not ours, sent on to the host's resolvers as they came.
//!
//! Every attempt has a socket of its own, so a random port, chosen by the kernel, beside a random
//! id (RFC 5452 §9.2). The socket is connected, so the kernel drops what other addresses send.
//! Sockets are made on the runtime's threads: those must be in the host's network namespace, from
//! where resolvers on its loopback address can be reached.

use std::{
    collections::BTreeMap,
    fmt::Display,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use domain::base::{Message, iana::Rcode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::watch,
    time::{self, Instant},
};
use weft_model::NetworkId;

use crate::{
    answer::{Forward, Transport, truncated},
    counters::UpstreamCounters,
    fallback::Fallback,
    gate::{Gate, Permit},
};

/// How many queries go upstream at a time, and how long they may take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UpstreamLimits {
    /// Queries under way for one address of one network.
    pub per_asker: usize,
    /// Queries under way for all.
    pub total: usize,
    /// How long one server may take before the next is asked.
    pub attempt: Duration,
    /// How long a query may take in all. Clients ask again after 5 s (resolv.conf(5), `timeout`).
    pub deadline: Duration,
    /// How often the list of servers is gone through.
    pub rounds: usize,
}

impl Default for UpstreamLimits {
    fn default() -> Self {
        Self {
            per_asker: 64,
            total: 1024,
            attempt: Duration::from_millis(1500),
            deadline: Duration::from_millis(4500),
            rounds: 2,
        }
    }
}

/// The way to the host's resolvers.
#[derive(Debug)]
pub(crate) struct Upstream {
    limits: UpstreamLimits,
    gate: Gate,
    servers: watch::Receiver<Vec<SocketAddr>>,
    /// When a server that has not answered since was last asked in vain.
    silent: Mutex<BTreeMap<SocketAddr, Instant>>,
    counters: Arc<UpstreamCounters>,
}

impl Upstream {
    pub(crate) fn new(
        limits: UpstreamLimits,
        servers: watch::Receiver<Vec<SocketAddr>>,
        counters: Arc<UpstreamCounters>,
    ) -> Self {
        let gate = Gate::new(limits.per_asker, limits.total);
        Self { limits, gate, servers, silent: Mutex::default(), counters }
    }

    /// Takes a place among the queries under way; nothing if there is none left for this asker.
    pub(crate) fn admit(&self, network: NetworkId, asker: IpAddr) -> Option<Permit> {
        self.counters.queries.increment();
        let permit = self.gate.admit(network, asker);
        if permit.is_none() {
            self.counters.over_limit.increment();
        }
        permit
    }

    /// Returns what an upstream server answers; nothing if none did in time.
    ///
    /// The servers are asked in their order, except that one that was silent of late comes last: it
    /// must not delay each query anew. One that fails (SERVFAIL, REFUSED, NOTIMP) is passed
    /// over; if no other answers, its reply is returned.
    pub(crate) async fn resolve(
        &self,
        forward: &Forward,
        transport: Transport,
        _permit: Permit,
    ) -> Option<Vec<u8>> {
        let deadline = Instant::now() + self.limits.deadline;
        let mut servers = self.order(Instant::now());
        if servers.is_empty() {
            self.counters.without_server.increment();
        }

        for _ in 0..self.limits.rounds {
            let (mut failure, mut silent) = (None, Vec::new());
            for server in servers {
                let now = Instant::now();
                if now >= deadline {
                    break;
                }
                let until = deadline.min(now + self.limits.attempt);
                let replied = self.attempt(server, &forward.query, transport, until).await;
                self.remember(server, replied.is_some());
                match replied {
                    Some(reply) if is_failure(&reply) => failure = failure.or(Some(reply)),
                    Some(reply) => return Some(fit(reply, forward)),
                    None => silent.push(server),
                }
            }
            if let Some(reply) = failure {
                return Some(fit(reply, forward));
            }
            servers = silent;
        }
        None
    }

    /// Returns what a sandbox's own resolver answers; nothing if it does not in time. It asks several
    /// servers itself, so it gets all the time there is.
    pub(crate) async fn fall_through(
        &self,
        fallback: &Fallback,
        forward: &Forward,
        transport: Transport,
        _permit: Permit,
    ) -> Option<Vec<u8>> {
        let exchange = Exchange::new(&forward.query);
        let replied = time::timeout(self.limits.deadline, async {
            match transport {
                Transport::Udp => {
                    let socket = (fallback.udp)().await?;
                    socket.set_nonblocking(true)?;
                    let socket = UdpSocket::from_std(socket)?;
                    exchange.over_udp(&socket, &self.counters).await
                }
                Transport::Tcp => {
                    let stream = (fallback.tcp)().await?;
                    stream.set_nonblocking(true)?;
                    exchange.over_tcp(TcpStream::from_std(stream)?).await
                }
            }
        });
        let reply = self.count(replied.await, "the sandbox's own resolver")?;
        Some(fit(reply, forward))
    }

    fn order(&self, now: Instant) -> Vec<SocketAddr> {
        let mut servers = self.servers.borrow().clone();
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.retain(|server, since| {
            servers.contains(server) && now.duration_since(*since) < SILENCE
        });
        servers.sort_by_key(|server| silent.contains_key(server));
        servers
    }

    fn remember(&self, server: SocketAddr, replied: bool) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match replied {
            true => drop(silent.remove(&server)),
            false => drop(silent.insert(server, Instant::now())),
        }
    }

    /// Asks one server once.
    async fn attempt(
        &self,
        server: SocketAddr,
        query: &[u8],
        transport: Transport,
        until: Instant,
    ) -> Option<Vec<u8>> {
        let started = Instant::now();
        let exchange = Exchange::new(query);
        let replied = time::timeout_at(until, async {
            match transport {
                Transport::Udp => {
                    let any: IpAddr = match server {
                        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                    };
                    let socket = UdpSocket::bind((any, 0)).await?;
                    socket.connect(server).await?;
                    exchange.over_udp(&socket, &self.counters).await
                }
                Transport::Tcp => exchange.over_tcp(TcpStream::connect(server).await?).await,
            }
        });
        let reply = self.count(replied.await, server)?;
        self.counters.reply(started.elapsed());
        Some(reply)
    }

    /// Counts why there is no reply.
    fn count(
        &self,
        replied: Result<io::Result<Vec<u8>>, time::error::Elapsed>,
        server: impl Display,
    ) -> Option<Vec<u8>> {
        match replied {
            Ok(Ok(reply)) => Some(reply),
            Ok(Err(error)) => {
                tracing::debug!(%server, %error, "an upstream resolver cannot be asked");
                self.counters.errors.increment();
                None
            }
            Err(_) => {
                tracing::debug!(%server, "an upstream resolver did not answer in time");
                self.counters.timeouts.increment();
                None
            }
        }
    }
}

/// One query to one server, over a socket that is connected to it.
struct Exchange<'a> {
    /// As the client sent it.
    asked: &'a [u8],
    /// The same with an id of ours.
    sent: Vec<u8>,
}

impl<'a> Exchange<'a> {
    fn new(asked: &'a [u8]) -> Self {
        let mut sent = asked.to_vec();
        sent[..ID_LEN].copy_from_slice(&rand::random::<[u8; ID_LEN]>());
        Self { asked, sent }
    }

    async fn over_udp(
        &self,
        socket: &UdpSocket,
        counters: &UpstreamCounters,
    ) -> io::Result<Vec<u8>> {
        socket.send(&self.sent).await?;

        let mut buffer = vec![0; MAX_UDP_REPLY];
        loop {
            let len = socket.recv(&mut buffer).await?;
            match self.accept(&buffer[..len]) {
                Some(reply) => return Ok(reply),
                None => counters.mismatches.increment(),
            }
        }
    }

    async fn over_tcp(&self, mut stream: TcpStream) -> io::Result<Vec<u8>> {
        stream.write_all(&crate::tcp::frame(&self.sent)).await?;

        let mut reply = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut reply).await?;
        self.accept(&reply).ok_or_else(|| io::Error::other("the reply is not to what was asked"))
    }

    /// Returns `reply` with the client's id and spelling of the name, if it belongs to the query.
    ///
    /// Some servers leave out the question when they report an error; no other reply may.
    fn accept(&self, reply: &[u8]) -> Option<Vec<u8>> {
        let message = Message::from_slice(reply).ok()?;
        let same_id = reply[..ID_LEN] == self.sent[..ID_LEN];
        let question = question_bytes(&self.sent)?;
        let mut reply = reply.to_vec();
        match message.header_counts().qdcount() {
            _ if !same_id || !message.header().qr() => return None,
            1 if question_bytes(message.as_slice())?.eq_ignore_ascii_case(question) => {
                reply[HEADER_LEN..HEADER_LEN + question.len()].copy_from_slice(question);
            }
            0 if message.header().rcode() != Rcode::NOERROR => {}
            _ => return None,
        }
        reply[..ID_LEN].copy_from_slice(&self.asked[..ID_LEN]);
        Some(reply)
    }
}

/// The question section of `message`.
fn question_bytes(message: &[u8]) -> Option<&[u8]> {
    let end = Message::from_slice(message).ok()?.answer().ok()?.pos();
    message.get(HEADER_LEN..end)
}

fn is_failure(reply: &[u8]) -> bool {
    Message::from_slice(reply).is_ok_and(|message| {
        matches!(message.header().rcode(), Rcode::SERVFAIL | Rcode::REFUSED | Rcode::NOTIMP)
    })
}

/// Returns `reply`, or a truncated answer if it is larger than what the client takes.
fn fit(reply: Vec<u8>, forward: &Forward) -> Vec<u8> {
    match reply.len() <= forward.limit {
        true => reply,
        false => truncated(&forward.query),
    }
}

/// How long a silent server is asked after the others.
const SILENCE: Duration = Duration::from_secs(30);
const ID_LEN: usize = 2;
const HEADER_LEN: usize = 12;
/// More than what is asked for: a larger reply is cut off, and then made a truncated answer.
const MAX_UDP_REPLY: usize = 4096;
