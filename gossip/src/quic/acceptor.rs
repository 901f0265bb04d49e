use std::{net::SocketAddr, sync::Arc, time::Duration};

use quinn::{Connection, Endpoint, Incoming, crypto::rustls::HandshakeData};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::NodeId;

use super::{
    clock::Clock,
    detour::node_behind,
    enrolment::{self, Enrolment},
    link::{Link, presented},
    refusal::{Failure, FailureReason, Refusal},
    router::Event,
    timing::Timing,
    tls::ALPN_JOIN,
    traffic::Counters,
};
use crate::{
    Received,
    identity::{Identity, Subject, Validity},
};

/// What all tasks of one carrier share. Nothing in it is state of theirs.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) own: NodeId,
    pub(super) endpoint: Endpoint,
    pub(super) client: quinn::ClientConfig,
    pub(super) detoured_client: quinn::ClientConfig,
    pub(super) detoured_server: Arc<quinn::ServerConfig>,
    pub(super) has_detour: bool,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) inbound: mpsc::Sender<Received>,
    pub(super) totals: Arc<Counters>,
    pub(super) timing: Timing,
    pub(super) clock: Clock,
    pub(super) identity: watch::Receiver<Identity>,
    pub(super) enrolment: Option<Arc<Enrolment>>,
    pub(super) tracker: TaskTracker,
    pub(super) stop: CancellationToken,
}

impl Context {
    /// Dials `address`; the other side has not accepted us yet on return.
    pub(super) async fn connect(&self, address: SocketAddr) -> Result<Link, Failure> {
        self.refuse_other_family(address)?;
        let client = match node_behind(address) {
            Some(_) => &self.detoured_client,
            None => &self.client,
        };
        // Read before it is presented: so a link never seems to last longer than it does.
        let own = self.own_validity();
        let connecting = self
            .endpoint
            .connect_with(client.clone(), address, SERVER_NAME)
            .map_err(|error| Failure::new(FailureReason::Unreachable, error.to_string()))?;
        let connection = connecting.await?;
        Link::new(connection, own, self.clock.now()).map_err(|refusal| Failure::from(&refusal))
    }

    /// A socket of IPv4 that has a detour is one of IPv6 to quinn, which so does not refuse.
    fn refuse_other_family(&self, address: SocketAddr) -> Result<(), Failure> {
        let local = self.endpoint.local_addr().map(canonical);
        match local {
            Ok(local) if local.is_ipv4() && address.is_ipv6() && node_behind(address).is_none() => {
                let text = format!("{address} is of IPv6, and this node is bound to {local}");
                Err(Failure::new(FailureReason::Unreachable, text))
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn own_validity(&self) -> Validity {
        self.identity.borrow().certificate().validity()
    }
}

/// Takes in connections until the carrier stops.
pub(super) async fn accept(context: Context) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_AT_ONCE));
    loop {
        let incoming = tokio::select! {
            () = context.stop.cancelled() => return,
            incoming = context.endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { return };
        // RFC 9000 §8.1.2: an address is shown to be the sender's before anything is done for it.
        // So nobody can use us to flood another, for one round trip more.
        if !incoming.remote_address_validated() {
            // A client that cannot be answered dials again.
            let _ = incoming.retry();
            continue;
        }
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.ignore();
            continue;
        };
        context.tracker.spawn(welcome(context.clone(), incoming, permit));
    }
}

async fn welcome(context: Context, incoming: Incoming, permit: OwnedSemaphorePermit) {
    let address = canonical(incoming.remote_address());
    if let Err(failure) = admit(&context, incoming, address, permit).await {
        // The router ends only when the carrier does.
        let _ = context.events.send(Event::Failed { address, failure, connected: false }).await;
    }
}

async fn admit(
    context: &Context,
    incoming: Incoming,
    address: SocketAddr,
    permit: OwnedSemaphorePermit,
) -> Result<(), Failure> {
    let own = context.own_validity();
    let handshake = async {
        let connecting = match node_behind(address) {
            Some(_) => incoming.accept_with(context.detoured_server.clone())?,
            None => incoming.accept()?,
        };
        connecting.await
    };
    let connection = tokio::time::timeout(HANDSHAKE_LIMIT, handshake)
        .await
        .map_err(|_| Failure::timeout(HANDSHAKE_LIMIT))??;
    drop(permit);

    let certificate = presented(&connection).map_err(|refusal| refuse(&connection, &refusal))?;
    let joining = protocol(&connection).is_some_and(|alpn| alpn == ALPN_JOIN);
    match (certificate.subject(), joining) {
        (Subject::Node { .. }, false) => {
            let link = Link::new(connection.clone(), own, context.clock.now())
                .map_err(|refusal| refuse(&connection, &refusal))?;
            link.greet().await?;
            // The router ends only when the carrier does.
            let met = Event::Met { link, waiting: Vec::new() };
            let _ = context.events.send(met).await;
            Ok(())
        }
        (Subject::Joiner { token, .. }, true) => {
            enrolment::serve(context, &connection, *token, certificate.public_key(), address).await;
            Ok(())
        }
        (Subject::Node { .. } | Subject::Joiner { .. } | Subject::Authority, _) => {
            Err(refuse(&connection, &Refusal::NotOfThisKind))
        }
    }
}

fn refuse(connection: &Connection, refusal: &Refusal) -> Failure {
    connection.close(quinn::VarInt::from_u32(1), refusal.to_string().as_bytes());
    Failure::from(refusal)
}

fn protocol(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// The address as operators write it: an IPv4 peer of a dual-stack socket is an IPv4 peer.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Not sent (there is no SNI), but quinn wants one.
pub(super) const SERVER_NAME: &str = "weft";

const HANDSHAKES_AT_ONCE: usize = 256;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(3);
