//! A network in memory, for tests and simulations: latency in tokio's (pausable) time, loss,
//! partitions, crashes, all drawn from one seed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{
    sync::Notify,
    time::{self, Instant},
};
use weft_model::NodeId;

use crate::{Carrier, MAX_MESSAGE_BYTES, Received};

/// Joins the carriers that were made from it. Clones are the same network.
#[derive(Clone, Debug)]
pub struct MemoryNetwork {
    state: Arc<Mutex<State>>,
}

impl MemoryNetwork {
    /// A network without loss whose messages take half a millisecond to two.
    pub fn new(seed: u64) -> Self {
        let state = State {
            hosts: BTreeMap::new(),
            islands: BTreeMap::new(),
            cut: BTreeSet::new(),
            latency: Duration::from_micros(500)..=Duration::from_millis(2),
            loss: 0.0,
            rng: StdRng::seed_from_u64(seed),
            traffic: Traffic::default(),
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Puts `node` at `address`. A carrier that was there before receives nothing any more.
    pub fn carrier(&self, node: NodeId, address: SocketAddr) -> MemoryCarrier {
        let host = Arc::new(Host { node, queue: Mutex::default(), arrival: Notify::new() });
        self.state().hosts.insert(address, Arc::clone(&host));
        MemoryCarrier { network: self.clone(), address, host }
    }

    /// Sets how long messages travel from now on: equally distributed over the range.
    pub fn set_latency(&self, latency: RangeInclusive<Duration>) {
        self.state().latency = latency;
    }

    /// Sets which share of the messages is lost from now on, 0 to 1.
    pub fn set_loss(&self, loss: f64) {
        self.state().loss = loss;
    }

    /// Cuts `island` off from all other addresses, but not from each other. Islands that were cut
    /// off before stay so.
    pub fn isolate(&self, island: impl IntoIterator<Item = SocketAddr>) {
        let mut state = self.state();
        let number = state.islands.values().max().map_or(1, |last| last + 1);
        state.islands.extend(island.into_iter().map(|address| (address, number)));
    }

    /// Cuts the way between `one` and `other`, which both go on to reach all others.
    pub fn cut(&self, one: SocketAddr, other: SocketAddr) {
        self.state().cut.insert((one.min(other), one.max(other)));
    }

    /// Ends all partitions.
    pub fn heal(&self) {
        let mut state = self.state();
        state.islands.clear();
        state.cut.clear();
    }

    /// Takes the host at `address` off the network, with all that is on the way to it.
    pub fn crash(&self, address: SocketAddr) {
        self.state().hosts.remove(&address);
    }

    /// What the hosts have sent so far.
    pub fn traffic(&self) -> Traffic {
        self.state().traffic
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }
}

/// Counts of what was given to the network.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Traffic {
    pub messages: u64,
    pub bytes: u64,
    /// Messages that did not arrive: lost, cut off, too long, or for nobody.
    pub dropped: u64,
}

/// The [`Carrier`] of one node in a [`MemoryNetwork`].
#[derive(Debug)]
pub struct MemoryCarrier {
    network: MemoryNetwork,
    address: SocketAddr,
    host: Arc<Host>,
}

impl Carrier for MemoryCarrier {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn send(&self, to: SocketAddr, message: Bytes) {
        let mut state = self.network.state();
        let alive =
            state.hosts.get(&self.address).is_some_and(|host| Arc::ptr_eq(host, &self.host));
        if alive {
            let received = Received { from: self.host.node, address: self.address, message };
            state.send(to, received);
        }
    }

    async fn recv(&self) -> Received {
        loop {
            let arrival = self.host.arrival.notified();
            let next = match self.host.take_due(Instant::now()) {
                Ok(received) => return received,
                Err(next) => next,
            };
            match next {
                None => arrival.await,
                Some(due) => tokio::select! {
                    () = arrival => {}
                    () = time::sleep_until(due) => {}
                },
            }
        }
    }
}

#[derive(Debug)]
struct State {
    hosts: BTreeMap<SocketAddr, Arc<Host>>,
    /// Who is cut off, and with whom. Addresses that are not listed are the mainland.
    islands: BTreeMap<SocketAddr, u32>,
    /// Pairs that do not reach each other, the smaller address first.
    cut: BTreeSet<(SocketAddr, SocketAddr)>,
    latency: RangeInclusive<Duration>,
    loss: f64,
    rng: StdRng,
    traffic: Traffic,
}

impl State {
    fn send(&mut self, to: SocketAddr, received: Received) {
        self.traffic.messages += 1;
        self.traffic.bytes += received.message.len() as u64;
        let from = received.address;
        let cut = self.islands.get(&to) != self.islands.get(&from)
            || self.cut.contains(&(from.min(to), from.max(to)));
        let lost = self.rng.random_bool(self.loss);
        let travel = self.rng.random_range(self.latency.clone());
        match self.hosts.get(&to) {
            Some(host) if !cut && !lost && received.message.len() <= MAX_MESSAGE_BYTES => {
                host.put(Instant::now() + travel, received, self.traffic.messages);
            }
            Some(_) | None => self.traffic.dropped += 1,
        }
    }
}

#[derive(Debug)]
struct Host {
    node: NodeId,
    /// By time of arrival; the number tells apart what arrives at the same instant.
    queue: Mutex<BTreeMap<(Instant, u64), Received>>,
    arrival: Notify,
}

impl Host {
    fn put(&self, due: Instant, received: Received, number: u64) {
        self.queue().insert((due, number), received);
        self.arrival.notify_one();
    }

    /// The message that has arrived first, or when the next one will.
    fn take_due(&self, now: Instant) -> Result<Received, Option<Instant>> {
        let mut queue = self.queue();
        match queue.first_entry() {
            Some(first) if first.key().0 <= now => Ok(first.remove()),
            Some(first) => Err(Some(first.key().0)),
            None => Err(None),
        }
    }

    fn queue(&self) -> MutexGuard<'_, BTreeMap<(Instant, u64), Received>> {
        self.queue.lock().expect("no holder of this lock panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_message_arrives_after_its_latency_with_its_senders_name() {
        let network = MemoryNetwork::new(1);
        network.set_latency(Duration::from_millis(30)..=Duration::from_millis(30));
        let (a, b) = (network.carrier(node(1), address(1)), network.carrier(node(2), address(2)));
        let start = Instant::now();
        a.send(b.address(), Bytes::from_static(b"hello"));
        let received = b.recv().await;
        assert_eq!((received.from, received.address), (node(1), address(1)));
        assert_eq!(&received.message[..], b"hello");
        assert!(start.elapsed().abs_diff(Duration::from_millis(30)) <= Duration::from_millis(1));
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_same_island_is_reached_until_the_partition_heals() {
        let network = MemoryNetwork::new(1);
        let hosts: Vec<_> = (1..=3).map(|n| network.carrier(node(n), address(n))).collect();
        network.isolate([address(1), address(2)]);
        hosts[0].send(address(2), Bytes::from_static(b"in"));
        hosts[0].send(address(3), Bytes::from_static(b"out"));
        assert_eq!(&hosts[1].recv().await.message[..], b"in");
        assert!(time::timeout(Duration::from_secs(1), hosts[2].recv()).await.is_err());
        network.heal();
        hosts[0].send(address(3), Bytes::from_static(b"again"));
        assert_eq!(&hosts[2].recv().await.message[..], b"again");
        assert_eq!(network.traffic().dropped, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_set_share_of_messages_is_lost() {
        let network = MemoryNetwork::new(7);
        network.set_loss(0.2);
        let a = network.carrier(node(1), address(1));
        let _b = network.carrier(node(2), address(2));
        for _ in 0..1000 {
            a.send(address(2), Bytes::new());
        }
        let dropped = network.traffic().dropped;
        assert!((150..250).contains(&dropped), "{dropped}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_crashed_host_neither_receives_nor_sends() {
        let network = MemoryNetwork::new(1);
        let (a, b) = (network.carrier(node(1), address(1)), network.carrier(node(2), address(2)));
        a.send(address(2), Bytes::new());
        network.crash(address(2));
        let reborn = network.carrier(node(2), address(2));
        b.send(address(1), Bytes::new());
        assert!(time::timeout(Duration::from_secs(1), reborn.recv()).await.is_err());
        assert!(time::timeout(Duration::from_secs(1), a.recv()).await.is_err());
    }

    fn node(n: u8) -> NodeId {
        NodeId::from([n; 16])
    }

    fn address(n: u8) -> SocketAddr {
        ([10, 0, 0, n], 4789).into()
    }
}
