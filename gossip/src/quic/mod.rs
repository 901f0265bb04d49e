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
mod enrolment;
mod join;
mod link;
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
use quinn::{Endpoint, EndpointConfig, ServerConfig, TokioRuntime, VarInt};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::NodeId;

use acceptor::{Context, canonical};
use enrolment::{Enrolment, Request};
use router::{Router, View};
use traffic::Counters;
use trust::{Anchor, Trust};

pub use clock::Clock;
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
    pub timing: Timing,
}

/// Carries messages over QUIC to whoever has a certificate of the cluster.
#[derive(Debug)]
pub struct QuicCarrier {
    address: SocketAddr,
    endpoint: Endpoint,
    sends: mpsc::Sender<(SocketAddr, Bytes)>,
    inbound: Mutex<mpsc::Receiver<Received>>,
    view: watch::Receiver<Arc<View>>,
    totals: Arc<Counters>,
    identity: watch::Sender<Identity>,
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
        let QuicConfig { identity, bind, advertise, clock, revoked, admission, timing } = config;
        let issuing = identity.issuer().cloned().zip(admission);
        let tokens = issuing.as_ref().map(|(issuer, _)| issuer.tokens.clone());
        let trust = Trust::new(&identity, clock.clone(), revoked.clone(), tokens);
        let presented = watch::Sender::new(tls::member_key(&identity));
        let present = || tls::Presented(presented.subscribe());

        let server = tls::server_config(trust.clone(), present(), &timing);
        let endpoint = bind_socket(tls::endpoint_config(identity.key()), Some(server), bind)
            .map_err(|source| BindError { bind, source })?;
        let local = endpoint.local_addr().map_err(|source| BindError { bind, source })?;

        let (sends, to_send) = mpsc::channel(QUEUED_SENDS);
        let (events, to_route) = mpsc::channel(QUEUED_EVENTS);
        let (inbound, received) = mpsc::channel(QUEUED_INBOUND);
        let (published, view) = watch::channel(Arc::default());
        let context = Context {
            own: identity.node(),
            client: tls::client_config(Arc::new(trust), present(), tls::ALPN_MEMBER, &timing),
            endpoint: endpoint.clone(),
            events,
            inbound,
            totals: Arc::default(),
            timing,
            clock: clock.clone(),
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
            identity: watch::Sender::new(identity),
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
            published,
            peers: BTreeMap::new(),
            logged: BTreeMap::new(),
        };
        context.tracker.spawn(router.run());
        context.tracker.clone().spawn(acceptor::accept(context));
        Ok(carrier)
    }

    /// The members that a connection leads to, in the order of their addresses.
    pub fn peers(&self) -> Vec<PeerStatus> {
        let view = self.view.borrow().clone();
        let peers = view.peers.iter().filter_map(|(&address, known)| {
            let link = known.link.as_ref()?;
            Some(PeerStatus {
                node: link.peer.node,
                name: link.peer.name.clone(),
                address,
                dialled: link.dialled,
                rtt: link.connection.rtt(),
                since: link.since_clock,
                certificate_expires: link.peer.validity.until,
                traffic: known.meter.read(),
            })
        });
        peers.collect()
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

    /// The live session with `node`, from which both ends can derive keys. Of several, which there
    /// are where the two reach each other at more than one address, both ends find the same.
    pub fn session(&self, node: NodeId) -> Option<Session> {
        let view = self.view.borrow();
        let links = view.peers.values().filter_map(|known| known.link.as_ref());
        let sessions = links.filter(|link| link.peer.node == node).map(Session::new);
        sessions
            .filter_map(|session| Some((session.id().ok()?, session)))
            .min_by_key(|(id, _)| *id)
            .map(|(_, session)| session)
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

    fn send(&self, to: SocketAddr, message: Bytes) {
        let to = canonical(to);
        if message.len() > MAX_MESSAGE_BYTES {
            self.totals.oversized();
        } else if to == self.address || self.sends.try_send((to, message)).is_err() {
            self.totals.not_sent();
        }
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
) -> io::Result<Endpoint> {
    let socket = UdpSocket::bind(bind)?;
    Endpoint::new(config, server, socket, Arc::new(TokioRuntime))
}

const QUEUED_SENDS: usize = 4096;
const QUEUED_EVENTS: usize = 256;
const QUEUED_INBOUND: usize = 1024;
const RENEWAL_LIMIT: Duration = Duration::from_secs(5);
