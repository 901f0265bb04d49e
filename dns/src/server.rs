//! The listeners of all networks of this host.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, UdpSocket},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::NetworkId;

use crate::{
    answer::{Asker, Forward, Outcome, Reply, Transport, answer, denies, is_truncated, servfail},
    counters::{Counters, QueryCounters},
    fallback::Fallback,
    gate::{Gate, Permit},
    tcp, udp,
    upstream::{Upstream, UpstreamLimits},
    zone::Directory,
};

/// How a server answers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// How long a client may keep an answer of ours, in whole seconds.
    pub ttl: Duration,
    pub upstream: UpstreamLimits,
    pub tcp: TcpLimits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(5),
            upstream: UpstreamLimits::default(),
            tcp: TcpLimits::default(),
        }
    }
}

/// What a TCP client may take up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TcpLimits {
    /// Connections of one address of one network.
    pub per_asker: usize,
    /// Connections of all.
    pub total: usize,
    /// Queries of one connection that are under way upstream; the next is read when one is done.
    pub pipelined: usize,
    /// How long a connection may be without a whole query, and a client may take for an answer.
    pub idle: Duration,
}

impl Default for TcpLimits {
    fn default() -> Self {
        Self { per_asker: 16, total: 256, pipelined: 16, idle: Duration::from_secs(10) }
    }
}

/// Serves any number of networks, each on sockets that the caller made in its namespace.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    tracker: TaskTracker,
    cancel: CancellationToken,
    listeners: BTreeMap<NetworkId, BTreeMap<ListenerKey, Listener>>,
}

impl Server {
    /// Makes a server without listeners. `directory` and `upstream` (the host's resolvers, in the
    /// order in which to ask them) may change at any time; the next query sees it. All tasks are
    /// in `tracker` and end with `cancel`.
    pub fn start(
        config: Config,
        directory: watch::Receiver<Arc<Directory>>,
        upstream: watch::Receiver<Vec<SocketAddr>>,
        tracker: TaskTracker,
        cancel: CancellationToken,
    ) -> Self {
        let counters = Counters::default();
        let shared = Shared {
            upstream: Upstream::new(config.upstream.clone(), upstream, counters.upstream.clone()),
            connections: Gate::new(config.tcp.per_asker, config.tcp.total),
            config,
            directory,
            counters,
        };
        Self { shared: Arc::new(shared), tracker, cancel, listeners: BTreeMap::new() }
    }

    /// Serves `network` on a pair of sockets, which must be bound to one address of the network's
    /// gateway: answers leave from the address that was asked only because the socket has no other.
    /// A network may have several pairs, one for each gateway address. Who asks in this network is
    /// told apart by source address: the network must not let a sandbox send from another's.
    ///
    /// Call from within the runtime.
    ///
    /// # Errors
    ///
    /// The sockets cannot be used by the runtime, or are served already.
    pub fn listen(
        &mut self,
        network: NetworkId,
        udp: std::net::UdpSocket,
        tcp: std::net::TcpListener,
    ) -> Result<SocketAddr, ListenError> {
        self.serve(network, None, None, udp, tcp)
    }

    /// Serves one sandbox on a pair of sockets inside its own namespace, such as behind Docker's
    /// 127.0.0.11. Whoever asks there is the sandbox with `address` in `network`, whatever the
    /// source address. Names that are not ours go to `fallback` if there is one.
    ///
    /// # Errors
    ///
    /// As [`Server::listen`].
    pub fn listen_in_sandbox(
        &mut self,
        network: NetworkId,
        address: IpAddr,
        fallback: Option<Fallback>,
        udp: std::net::UdpSocket,
        tcp: std::net::TcpListener,
    ) -> Result<SocketAddr, ListenError> {
        self.serve(network, Some(address), fallback, udp, tcp)
    }

    fn serve(
        &mut self,
        network: NetworkId,
        sandbox: Option<IpAddr>,
        fallback: Option<Fallback>,
        udp: std::net::UdpSocket,
        tcp: std::net::TcpListener,
    ) -> Result<SocketAddr, ListenError> {
        let unusable = |source| ListenError::Socket { network, source };
        let address = udp.local_addr().map_err(unusable)?;
        udp.set_nonblocking(true).map_err(unusable)?;
        tcp.set_nonblocking(true).map_err(unusable)?;
        let udp = UdpSocket::from_std(udp).map_err(unusable)?;
        let tcp = TcpListener::from_std(tcp).map_err(unusable)?;

        let listeners = self.listeners.entry(network).or_default();
        let key = ListenerKey { sandbox, address };
        if listeners.contains_key(&key) {
            return Err(ListenError::Served { network, address });
        }
        let listener = Listener { cancel: self.cancel.child_token(), tasks: TaskTracker::new() };
        let service = Service {
            network,
            sandbox,
            fallback,
            counters: self.shared.counters.network(network),
            shared: self.shared.clone(),
            tasks: listener.tasks.clone(),
            cancel: listener.cancel.clone(),
        };
        listener.tasks.spawn(udp::serve(Arc::new(udp), service.clone()));
        listener.tasks.spawn(tcp::serve(tcp, service));
        self.tracker.spawn(listener.clone().ended());
        listeners.insert(key, listener);
        Ok(address)
    }

    /// Stops serving `network` and its sandboxes. When this returns all sockets are closed, also
    /// those of connections, and the counts are gone.
    pub async fn unlisten(&mut self, network: NetworkId) {
        for listener in self.listeners.remove(&network).unwrap_or_default().into_values() {
            listener.stop().await;
        }
        self.shared.counters.forget(network);
    }

    /// Stops serving the sandbox with `address` in `network` inside its own namespace.
    pub async fn unlisten_in_sandbox(&mut self, network: NetworkId, address: IpAddr) {
        let Some(listeners) = self.listeners.get_mut(&network) else {
            return;
        };
        let gone: Vec<_> =
            listeners.keys().copied().filter(|key| key.sandbox == Some(address)).collect();
        for key in gone {
            if let Some(listener) = listeners.remove(&key) {
                listener.stop().await;
            }
        }
    }

    /// The networks that are served, and on which addresses.
    pub fn listening(&self) -> impl Iterator<Item = (NetworkId, SocketAddr)> {
        self.listeners
            .iter()
            .flat_map(|(network, listeners)| listeners.keys().map(|key| (*network, key.address)))
    }

    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }
}

/// A network cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("the DNS sockets of network {network} cannot be used")]
    Socket {
        network: NetworkId,
        #[source]
        source: io::Error,
    },
    #[error("network {network} is served on {address} already: unlisten it first")]
    Served { network: NetworkId, address: SocketAddr },
}

/// A pair of sockets. Sandboxes have the same addresses, each in its own namespace.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct ListenerKey {
    sandbox: Option<IpAddr>,
    address: SocketAddr,
}

/// The tasks of one pair of sockets.
#[derive(Clone, Debug)]
struct Listener {
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Listener {
    async fn stop(self) {
        self.cancel.cancel();
        self.ended().await;
    }

    async fn ended(self) {
        self.cancel.cancelled().await;
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// What all listeners have in common.
#[derive(Debug)]
struct Shared {
    config: Config,
    directory: watch::Receiver<Arc<Directory>>,
    upstream: Upstream,
    connections: Gate,
    counters: Counters,
}

/// What the tasks of one listener work with.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    network: NetworkId,
    /// Who asks, where that is known without looking at the source address.
    sandbox: Option<IpAddr>,
    /// Where else than at the host's resolvers names that are not ours are asked.
    fallback: Option<Fallback>,
    counters: Arc<QueryCounters>,
    shared: Arc<Shared>,
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
}

/// How a query goes on.
pub(crate) enum Step {
    Send(Vec<u8>),
    /// To be answered by [`Service::forward`].
    Wait(Pending),
    Nothing,
}

/// A query that has its place among those under way upstream.
pub(crate) struct Pending {
    forward: Forward,
    transport: Transport,
    permit: Permit,
}

impl Service {
    pub(crate) fn tcp_limits(&self) -> &TcpLimits {
        &self.shared.config.tcp
    }

    pub(crate) fn counters(&self) -> &QueryCounters {
        &self.counters
    }

    /// Takes a place for a connection; nothing if there is none left for this asker.
    pub(crate) fn admit_connection(&self, address: IpAddr) -> Option<Permit> {
        let permit = self.shared.connections.admit(self.network, self.asker(address));
        if permit.is_none() {
            self.counters.connections_refused.increment();
        }
        permit
    }

    /// Decides about a query and counts it.
    pub(crate) fn take(&self, packet: &[u8], address: IpAddr, transport: Transport) -> Step {
        let address = self.asker(address);
        let directory = self.shared.directory.borrow().clone();
        let falls_through = self.fallback.is_some();
        let asker = Asker { network: self.network, address, transport, falls_through };
        match answer(packet, &asker, &directory, self.shared.config.ttl, &mut rand::rng()) {
            Reply::Drop => {
                self.counters.dropped.increment();
                Step::Nothing
            }
            Reply::Answer { message, outcome, truncated } => {
                self.count(outcome, truncated);
                Step::Send(message)
            }
            Reply::Forward(forward) => match self.shared.upstream.admit(self.network, address) {
                Some(permit) => Step::Wait(Pending { forward, transport, permit }),
                None => {
                    self.counters.failed.increment();
                    Step::Send(servfail(&forward.query))
                }
            },
        }
    }

    /// Returns the upstream servers' answer, SERVFAIL if there is none.
    pub(crate) async fn forward(&self, pending: Pending) -> Vec<u8> {
        let Pending { forward, transport, permit } = pending;
        let upstream = &self.shared.upstream;
        let resolved = match &self.fallback {
            Some(fallback) => upstream.fall_through(fallback, &forward, transport, permit).await,
            None => upstream.resolve(&forward, transport, permit).await,
        };
        match resolved.filter(|reply| !(forward.doubtful && denies(reply))) {
            Some(reply) => {
                self.counters.forwarded.increment();
                if transport == Transport::Udp && is_truncated(&reply) {
                    self.counters.truncated.increment();
                }
                reply
            }
            None => {
                self.counters.failed.increment();
                servfail(&forward.query)
            }
        }
    }

    fn asker(&self, source: IpAddr) -> IpAddr {
        self.sandbox.unwrap_or(source).to_canonical()
    }

    fn count(&self, outcome: Outcome, truncated: bool) {
        let counter = match outcome {
            Outcome::Answered => &self.counters.answered,
            Outcome::NoData => &self.counters.nodata,
            Outcome::NxDomain => &self.counters.nxdomain,
            Outcome::Refused => &self.counters.refused,
            Outcome::Failed => &self.counters.failed,
        };
        counter.increment();
        if truncated {
            self.counters.truncated.increment();
        }
    }
}
