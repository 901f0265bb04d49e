//! Mutually authenticated QUIC between agents.
//!
//! One UDP socket per agent serves to dial and to accept. Both ends of a connection present a
//! certificate of the same cluster's authority (TLS 1.3, ALPN `weft/1`); a node without one can do
//! nothing but ask to join, with the proof that it holds a live token (ALPN `weft-join/1`).
//!
//! A message goes in a datagram of its own if it fits, else on a stream of its own, so neither
//! order nor delivery is promised. Who speaks first opens a stream with one byte 0: the acceptor
//! thereby says that it has judged the dialler's certificate.

mod acceptor;
mod clock;
mod detour;
mod directory;
mod enrolment;
mod join;
mod lane;
mod link;
mod links;
mod peer;
mod refusal;
mod router;
mod session;
mod timing;
mod tls;
mod traffic;
mod trust;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use quinn::{Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime, VarInt};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::NodeId;

use acceptor::{Context, canonical};
use detour::DetourSocket;
use directory::Directory;
use enrolment::{Enrolment, Request};
use router::{Receiver, Router, View};
use traffic::Counters;
use trust::{Anchor, Trust};

pub use clock::Clock;
pub use detour::{DETOURED_BYTES, Detour};
pub use enrolment::{Admission, Admit};
pub use join::{Attempt, Attempts, Join, JoinError};
pub use refusal::{Failure, FailureReason};
pub use router::LastFailure;
pub use session::{ExportError, Session, SessionId};
pub use timing::Timing;
pub use traffic::Traffic;
pub use trust::PeerIdentity;

use crate::{
    Carrier, MAX_MESSAGE_BYTES, Received,
    identity::{Certificate, Identity, IdentityError, Validity},
};

/// How a carrier is set up.
#[derive(Debug)]
pub struct QuicConfig {
    pub identity: Identity,
    pub bind: SocketAddr,
    /// Where peers reach this node, if that is not the address it is bound to.
    pub advertise: Option<SocketAddr>,
    pub clock: Clock,
    /// Nodes that have been removed: their connections are closed and none is made.
    pub revoked: watch::Receiver<BTreeSet<NodeId>>,
    /// Set on a node that is to admit others; it needs the authority's key for that.
    pub admission: Option<Admission>,
    /// The way to members that are not reached directly, if there is one. It is used only for
    /// members that were introduced: see [`QuicCarrier::introduce`].
    pub detour: Option<Detour>,
    pub timing: Timing,
}

/// Carries messages over QUIC to whoever has a certificate of the cluster.
#[derive(Debug)]
pub struct QuicCarrier {
    address: SocketAddr,
    endpoint: Endpoint,
    sends: mpsc::Sender<(Receiver, Bytes)>,
    inbound: Mutex<mpsc::Receiver<Received>>,
    view: watch::Receiver<Arc<View>>,
    totals: Arc<Counters>,
    introduced: watch::Sender<BTreeMap<NodeId, SocketAddr>>,
    kept: watch::Sender<BTreeSet<NodeId>>,
    identity: watch::Sender<Identity>,
    revoked: watch::Receiver<BTreeSet<NodeId>>,
    presented: watch::Sender<Arc<CertifiedKey>>,
    clock: Clock,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl QuicCarrier {
    /// Binds the socket and begins to accept. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn bind(config: QuicConfig) -> Result<Self, BindError> {
        let QuicConfig { identity, bind, advertise, clock, revoked, admission, detour, timing } =
            config;
        let issuing = identity.issuer().cloned().zip(admission);
        let tokens = issuing.as_ref().map(|(issuer, _)| issuer.tokens.clone());
        let trust = Trust::new(&identity, clock.clone(), revoked.clone(), tokens);
        let presented = watch::Sender::new(tls::member_key(&identity));
        let present = || tls::Presented(presented.subscribe());

        let server = |transport| tls::server_config(trust.clone(), present(), transport);
        let verifier = Arc::new(trust.clone());
        let client = |transport| {
            tls::client_config(verifier.clone(), present(), tls::ALPN_MEMBER, transport)
        };
        let has_detour = detour.is_some();
        let direct = server(tls::direct(&timing));
        let endpoint_config = tls::endpoint_config(identity.key());
        let endpoint = bind_socket(endpoint_config, Some(direct), bind, detour)
            .map_err(|source| BindError { bind, source })?;
        let local = endpoint.local_addr().map_err(|source| BindError { bind, source })?;

        let (sends, to_send) = mpsc::channel(QUEUED_SENDS);
        let (events, to_route) = mpsc::channel(QUEUED_EVENTS);
        let (inbound, received) = mpsc::channel(QUEUED_INBOUND);
        let (published, view) = watch::channel(Arc::default());
        let (introduced, introductions) = watch::channel(BTreeMap::new());
        let (kept, to_keep) = watch::channel(BTreeSet::new());
        let own = identity.node();
        let identity = watch::Sender::new(identity);
        let context = Context {
            own,
            client: client(tls::direct(&timing)),
            detoured_client: client(tls::detoured(&timing)),
            detoured_server: Arc::new(server(tls::detoured(&timing))),
            has_detour,
            endpoint: endpoint.clone(),
            events,
            inbound,
            totals: Arc::default(),
            timing,
            clock: clock.clone(),
            identity: identity.subscribe(),
            enrolment: issuing.map(|(issuer, how)| Arc::new(Enrolment::new(issuer, how))),
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        let carrier = Self {
            address: canonical(advertise.unwrap_or(local)),
            endpoint,
            sends,
            inbound: Mutex::new(received),
            view,
            totals: context.totals.clone(),
            introduced,
            kept,
            identity,
            revoked: revoked.clone(),
            presented,
            clock,
            tracker: context.tracker.clone(),
            stop: context.stop.clone(),
        };
        let router = Router {
            context: context.clone(),
            sends: to_send,
            events: to_route,
            revoked,
            introductions,
            to_keep,
            published,
            peers: BTreeMap::new(),
            directory: Directory::default(),
            logged: BTreeMap::new(),
        };
        context.tracker.spawn(router.run());
        context.tracker.clone().spawn(acceptor::accept(context));
        Ok(carrier)
    }

    /// The members that a connection leads to, in the order of their addresses.
    pub fn peers(&self) -> Vec<PeerStatus> {
        let view = self.view.borrow().clone();
        let peers = view.peers.values().filter_map(|known| {
            let link = known.links.first()?;
            let address = match link.detoured {
                true => known.addresses.first().copied().unwrap_or(link.address),
                false => canonical(link.connection.remote_address()),
            };
            Some(PeerStatus {
                node: link.peer.node,
                name: link.peer.name.clone(),
                address,
                dialled: link.dialled,
                rtt: link.connection.rtt(),
                detoured: link.detoured,
                since: link.since_clock,
                certificate_expires: link.peer.validity.until,
                traffic: known.meter.read(),
            })
        });
        let mut peers: Vec<_> = peers.collect();
        peers.sort_by_key(|peer| peer.address);
        peers
    }

    /// Follows who is connected: wakes whenever a connection comes or goes.
    pub fn changes(&self) -> Changes {
        Changes(self.view.clone())
    }

    /// Totals since the carrier was bound.
    pub fn traffic(&self) -> Traffic {
        self.totals.read()
    }

    /// How often connections failed, in both directions.
    pub fn failures(&self) -> BTreeMap<FailureReason, u64> {
        self.view.borrow().failures.clone()
    }

    /// The last failure per address, unless a connection has been made since.
    pub fn last_failures(&self) -> BTreeMap<SocketAddr, LastFailure> {
        self.view.borrow().last.clone()
    }

    /// Tells that `node` says it is reached at `address`. Messages to that address then go over any
    /// connection with the node, such as one that it has dialled from behind a NAT; and where the
    /// address does not answer, the [`Detour`] is tried. Gossip introduces all members.
    ///
    /// It is no proof of anything: who is at an address is known by its certificate.
    pub fn introduce(&self, node: NodeId, address: SocketAddr) {
        let address = canonical(address);
        self.introduced.send_if_modified(|all| all.insert(node, address) != Some(address));
    }

    /// Sets the members to which a connection is kept, even if there is nothing to say; those
    /// among them that were not introduced are dialled once they are.
    pub fn keep(&self, nodes: BTreeSet<NodeId>) {
        self.kept.send_if_modified(|kept| {
            let changed = *kept != nodes;
            *kept = nodes;
            changed
        });
    }

    /// All live sessions with `node`, the oldest first: more than one for some seconds after one
    /// was replaced, because it became old, or the peer restarted, or the way to it changed. Keys
    /// of any of them may be in use by the peer.
    pub fn sessions(&self, node: NodeId) -> Vec<Session> {
        if self.revoked.borrow().contains(&node) {
            return Vec::new();
        }
        let now = self.clock.now();
        let mut links = self.view.borrow().links(node).to_vec();
        links.sort_by_key(|link| link.since);
        let sessions = links.iter().map(Session::new);
        sessions.filter(|session| session.is_live() && now < session.expires()).collect()
    }

    /// The session with `node` that is in use. Both ends find the same, but for a moment while
    /// connections change.
    pub fn session(&self, node: NodeId) -> Option<Session> {
        let view = self.view.borrow();
        let mut sessions = view.links(node).iter().map(Session::new);
        sessions.find(Session::is_live)
    }

    /// This node as it presents itself.
    pub fn identity(&self) -> Identity {
        self.identity.borrow().clone()
    }

    /// Writes `certificate` to the disk and presents it from the next connection on.
    pub fn present(&self, certificate: Certificate) -> Result<(), IdentityError> {
        let identity = self.identity.borrow().renewed(certificate)?;
        self.presented.send_replace(tls::member_key(&identity));
        self.identity.send_replace(identity);
        Ok(())
    }

    /// A newer certificate for this node: from its own authority if it has the key, else from the
    /// node `issuer`, to which there must be a connection.
    ///
    /// # Errors
    /// If there is no connection, or the issuer refuses.
    pub async fn renew(&self, issuer: NodeId) -> Result<Certificate, Failure> {
        let identity = self.identity();
        let now = self.clock.now();
        if let Some(own) = identity.issuer() {
            let length = identity.certificate().validity().length();
            let validity = Validity::starting(now, length);
            return Ok(own.authority.issue(
                &identity.key().public_key(),
                identity.name(),
                validity,
            ));
        }
        let session = self.session(issuer).ok_or_else(|| {
            Failure::new(FailureReason::Unreachable, format!("no connection to node {issuer}"))
        })?;
        let request = Request { name: identity.name().clone(), clock: now.unix_timestamp() };
        let asked = tokio::time::timeout(RENEWAL_LIMIT, session.ask(&request)).await;
        let admitted = asked.unwrap_or_else(|_| Err(Failure::timeout(RENEWAL_LIMIT)))?;
        let certificate = Certificate::from_pem(admitted.certificate.as_bytes())
            .map_err(|error| Failure::from(&error.into()))?;
        Anchor::new(identity.ca())
            .judge(identity.cluster(), &certificate, now)
            .map_err(|refusal| Failure::from(&refusal))?;
        Ok(certificate)
    }

    fn enqueue(&self, to: Receiver, message: Bytes) {
        if message.len() > MAX_MESSAGE_BYTES {
            self.totals.oversized();
        } else if self.sends.try_send((to, message)).is_err() {
            self.totals.not_sent();
        }
    }

    /// Closes all connections and waits, at most `grace`, until peers have been told.
    pub async fn shutdown(&self, grace: Duration) {
        self.stop.cancel();
        self.tracker.close();
        let stopped = async {
            self.tracker.wait().await;
            self.endpoint.close(VarInt::from_u32(0), b"closed: the agent stops");
            self.endpoint.wait_idle().await;
        };
        if tokio::time::timeout(grace, stopped).await.is_err() {
            tracing::warn!(
                tasks = self.tracker.len(),
                connections = self.endpoint.open_connections(),
                "the carrier did not stop in time"
            );
            self.endpoint.close(VarInt::from_u32(0), b"closed: the agent stops");
        }
    }
}

impl Carrier for QuicCarrier {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn introduce(&self, node: NodeId, address: SocketAddr) {
        self.introduce(node, address);
    }

    fn send(&self, to: SocketAddr, message: Bytes) {
        let to = canonical(to);
        if to == self.address {
            self.totals.not_sent();
        } else {
            self.enqueue((None, to), message);
        }
    }

    fn send_to(&self, node: NodeId, address: SocketAddr, message: Bytes) {
        self.enqueue((Some(node), canonical(address)), message);
    }

    async fn recv(&self) -> Received {
        // Two callers at once would each get a part of the messages; one waits for the other.
        match self.inbound.lock().await.recv().await {
            Some(received) => received,
            None => std::future::pending().await,
        }
    }
}

impl Drop for QuicCarrier {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// One member that a connection leads to.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    pub node: NodeId,
    /// The name in its certificate.
    pub name: Option<String>,
    pub address: SocketAddr,
    /// Whether this node has made the connection.
    pub dialled: bool,
    pub rtt: Duration,
    /// Whether its packets are carried by the [`Detour`].
    pub detoured: bool,
    pub since: OffsetDateTime,
    pub certificate_expires: OffsetDateTime,
    pub traffic: Traffic,
}

/// Wakes when a connection comes, goes or fails.
#[derive(Clone, Debug)]
pub struct Changes(watch::Receiver<Arc<View>>);

impl Changes {
    /// Waits for the next change; cancel-safe. Pends for ever once the carrier has stopped.
    pub async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

/// The carrier's socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "failed to bind UDP {bind}: another process may hold the port, or no interface has the address"
)]
pub struct BindError {
    bind: SocketAddr,
    #[source]
    source: io::Error,
}

fn bind_socket(
    config: EndpointConfig,
    server: Option<ServerConfig>,
    bind: SocketAddr,
    detour: Option<Detour>,
) -> io::Result<Endpoint> {
    let real = TokioRuntime.wrap_udp_socket(UdpSocket::bind(bind)?)?;
    let socket = match detour {
        Some(detour) => Arc::new(DetourSocket::new(real, detour)?),
        None => real,
    };
    Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
}

const QUEUED_SENDS: usize = 4096;
const QUEUED_EVENTS: usize = 256;
const QUEUED_INBOUND: usize = 1024;
const RENEWAL_LIMIT: Duration = Duration::from_secs(5);
