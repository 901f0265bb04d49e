use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    net::UdpSocket,
    sync::{mpsc, watch},
    task::JoinSet,
};
use weft_gossip::quic::QuicConfig;

use crate::cluster::LOOPBACK;

/// A router before one host that translates the addresses of whoever sends through it: the host
/// sees each sender at a port of the gateway's, and reaches it there.
pub(crate) struct Gateway {
    /// Where the host is reached by way of the gateway.
    pub(crate) address: SocketAddr,
    rules: Arc<Mutex<Rules>>,
    host: watch::Sender<SocketAddr>,
    _task: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Rules {
    blocked: BTreeSet<SocketAddr>,
    all_blocked: bool,
    /// Counts the times at which all mappings were forgotten.
    generation: u64,
}

impl Gateway {
    /// A gateway for a host that is not known yet.
    pub(crate) async fn start() -> Self {
        let inner = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = inner.local_addr().unwrap();
        let rules = Arc::new(Mutex::new(Rules::default()));
        let host = watch::Sender::new(address);
        let mut task = JoinSet::new();
        task.spawn(translate(inner, rules.clone(), host.subscribe()));
        Self { address, rules, host, _task: task }
    }

    /// Sets an agent up behind the gateway: it tells others to reach it there.
    pub(crate) fn shelter(&self, config: &mut QuicConfig) {
        // Free at this moment; the system hands it to nobody else so soon.
        let free = std::net::UdpSocket::bind(LOOPBACK).and_then(|socket| socket.local_addr());
        config.bind = free.unwrap();
        config.advertise = Some(self.address);
        self.host.send_replace(config.bind);
    }

    /// Where the sheltered agent sends from.
    pub(crate) fn host(&self) -> SocketAddr {
        *self.host.borrow()
    }

    /// Lets nothing through between the host and `sender` any more.
    pub(crate) fn block(&self, sender: SocketAddr) {
        self.rules.lock().unwrap().blocked.insert(sender);
    }

    /// Lets nothing through any more.
    pub(crate) fn block_all(&self) {
        self.rules.lock().unwrap().all_blocked = true;
    }

    pub(crate) fn unblock_all(&self) {
        let mut rules = self.rules.lock().unwrap();
        rules.blocked.clear();
        rules.all_blocked = false;
    }

    /// Forgets who has which port: from now on the host sees all senders at other ones.
    pub(crate) fn forget_mappings(&self) {
        self.rules.lock().unwrap().generation += 1;
    }
}

async fn translate(
    inner: Arc<UdpSocket>,
    rules: Arc<Mutex<Rules>>,
    host: watch::Receiver<SocketAddr>,
) {
    let mut mappings: BTreeMap<SocketAddr, mpsc::Sender<Vec<u8>>> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    let mut generation = 0;
    let mut packet = [0; 65_536];
    loop {
        let Ok((length, sender)) = inner.recv_from(&mut packet).await else { continue };
        let now = rules.lock().unwrap().generation;
        if now != generation {
            generation = now;
            mappings.clear();
        }
        let mapping = mappings.entry(sender).or_insert_with(|| {
            let (packets, to_send) = mpsc::channel(1024);
            let mapping =
                Mapping { sender, inner: inner.clone(), rules: rules.clone(), generation };
            tasks.spawn(mapping.run(to_send, *host.borrow()));
            packets
        });
        // A full queue loses packets, as a router does.
        let _ = mapping.try_send(packet[..length].to_vec());
    }
}

/// The port that one sender has.
struct Mapping {
    sender: SocketAddr,
    inner: Arc<UdpSocket>,
    rules: Arc<Mutex<Rules>>,
    generation: u64,
}

impl Mapping {
    async fn run(self, mut to_send: mpsc::Receiver<Vec<u8>>, host: SocketAddr) {
        let outer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut packet = [0; 65_536];
        loop {
            tokio::select! {
                out = to_send.recv() => {
                    let Some(out) = out else { return };
                    if self.is_open() {
                        let _ = outer.send_to(&out, host).await;
                    }
                }
                // An error tells that a packet before was refused.
                Ok((length, from)) = outer.recv_from(&mut packet) => {
                    if from == host && self.is_open() {
                        let _ = self.inner.send_to(&packet[..length], self.sender).await;
                    }
                }
            }
        }
    }

    fn is_open(&self) -> bool {
        let rules = self.rules.lock().unwrap();
        let blocked = rules.all_blocked || rules.blocked.contains(&self.sender);
        rules.generation == self.generation && !blocked
    }
}

/// An address where packets vanish, and how many have.
pub(crate) struct Sink {
    socket: std::net::UdpSocket,
}

impl Sink {
    pub(crate) fn open() -> Self {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// How many packets have come since the last call.
    pub(crate) fn packets(&self) -> usize {
        std::iter::from_fn(|| self.socket.recv_from(&mut [0; 2048]).ok()).count()
    }
}
