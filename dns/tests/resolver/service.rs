//! A server on loopback, its client, and an upstream server whose answers the test chooses.

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use domain::base::{Message, MessageBuilder, iana::Rcode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::watch,
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_dns::{Config, Directory, QueryCounts, Server};

use crate::lab::*;

/// A server with one network, `app`, on 127.0.0.1. The client is 127.0.0.1 too.
pub(crate) struct Bench {
    pub(crate) server: Server,
    pub(crate) address: SocketAddr,
    pub(crate) directory: watch::Sender<Arc<Directory>>,
    pub(crate) upstream: watch::Sender<Vec<SocketAddr>>,
    pub(crate) tracker: TaskTracker,
    pub(crate) cancel: CancellationToken,
}

impl Bench {
    pub(crate) fn start(config: Config, upstream: Vec<SocketAddr>) -> Self {
        let (directory, directory_seen) = watch::channel(Arc::new(directory()));
        let (upstream, upstream_seen) = watch::channel(upstream);
        let (tracker, cancel) = (TaskTracker::new(), CancellationToken::new());
        let mut server =
            Server::start(config, directory_seen, upstream_seen, tracker.clone(), cancel.clone());
        let (udp, tcp) = socket_pair();
        let address = server.listen(network(APP), udp, tcp).unwrap();
        Self { server, address, directory, upstream, tracker, cancel }
    }

    pub(crate) fn counts(&self) -> QueryCounts {
        self.server.counters().snapshot().networks[&network(APP)]
    }

    /// Waits until the counts are as `wanted` says.
    pub(crate) async fn counted(&self, wanted: impl Fn(&QueryCounts) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(&self.counts()) {
            assert!(Instant::now() < deadline, "counts are {:?}", self.counts());
            tokio::task::yield_now().await;
        }
    }

    pub(crate) async fn ask_udp(&self, packet: &[u8]) -> Vec<u8> {
        within(ask_udp(self.address, packet)).await
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        within(TcpStream::connect(self.address)).await.unwrap()
    }

    pub(crate) async fn ask_tcp(&self, packet: &[u8]) -> Vec<u8> {
        let mut stream = self.connect().await;
        write_frame(&mut stream, packet).await;
        read_frame(&mut stream).await.expect("an answer")
    }
}

/// A UDP and a TCP socket on the same free port of 127.0.0.1.
pub(crate) fn socket_pair() -> (std::net::UdpSocket, std::net::TcpListener) {
    (0..100)
        .find_map(|_| {
            let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let udp = std::net::UdpSocket::bind(tcp.local_addr().unwrap()).ok()?;
            Some((udp, tcp))
        })
        .expect("a port free for both")
}

pub(crate) async fn ask_udp(server: SocketAddr, packet: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(packet).await.unwrap();
    let mut buffer = vec![0; 65_535];
    let len = socket.recv(&mut buffer).await.unwrap();
    buffer.truncate(len);
    buffer
}

pub(crate) async fn write_frame(stream: &mut TcpStream, message: &[u8]) {
    let len = u16::try_from(message.len()).unwrap();
    stream.write_all(&[len.to_be_bytes().as_slice(), message].concat()).await.unwrap();
}

/// Returns the next message, nothing if the server closed the connection.
pub(crate) async fn read_frame(stream: &mut TcpStream) -> Option<Vec<u8>> {
    within(async {
        let len = stream.read_u16().await.ok()?;
        let mut message = vec![0; len.into()];
        stream.read_exact(&mut message).await.unwrap();
        Some(message)
    })
    .await
}

pub(crate) async fn within<T>(work: impl Future<Output = T>) -> T {
    time::timeout(PATIENCE, work).await.expect("in time")
}

/// An upstream server: the test takes each query and answers as it likes, or not.
pub(crate) struct Stub {
    pub(crate) address: SocketAddr,
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Stub {
    pub(crate) fn start() -> Self {
        let (udp, tcp) = socket_pair();
        udp.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        Self {
            address: udp.local_addr().unwrap(),
            udp: UdpSocket::from_std(udp).unwrap(),
            tcp: TcpListener::from_std(tcp).unwrap(),
        }
    }

    pub(crate) async fn next_udp(&self) -> (Vec<u8>, SocketAddr) {
        let mut buffer = vec![0; 65_535];
        let (len, from) = within(self.udp.recv_from(&mut buffer)).await.unwrap();
        (buffer[..len].to_vec(), from)
    }

    pub(crate) async fn reply_udp(&self, message: &[u8], to: SocketAddr) {
        self.udp.send_to(message, to).await.unwrap();
    }

    /// Answers one UDP query with `reply`.
    pub(crate) async fn serve_udp(&self, reply: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
        let (query, from) = self.next_udp().await;
        self.reply_udp(&reply(&query), from).await;
        query
    }

    /// Answers one query by TCP with `reply`.
    pub(crate) async fn serve_tcp(&self, reply: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
        let (mut stream, _) = within(self.tcp.accept()).await.unwrap();
        let query = read_frame(&mut stream).await.expect("a query");
        write_frame(&mut stream, &reply(&query)).await;
        query
    }
}

/// A reply with `rcode` and, if that is no error, one address.
pub(crate) fn reply(query: &[u8], rcode: Rcode) -> Vec<u8> {
    reply_with(query, rcode, 1)
}

/// A reply with `rcode` and, if that is no error, `count` addresses.
pub(crate) fn reply_with(query: &[u8], rcode: Rcode, count: u8) -> Vec<u8> {
    use domain::{base::iana::Class, rdata::A};

    let message = Message::from_slice(query).unwrap();
    let name = message.sole_question().unwrap();
    let mut answer = MessageBuilder::new_vec().start_answer(message, rcode).unwrap();
    if rcode == Rcode::NOERROR {
        for last in 1..=count {
            answer.push((name.qname(), Class::IN, 60, A::from_octets(192, 0, 2, last))).unwrap();
        }
    }
    answer.finish()
}

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
