use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use time::OffsetDateTime;
use tokio::time::Instant;
use weft_model::NodeId;

use super::{
    acceptor::{Context, canonical},
    detour::node_behind,
    enrolment,
    refusal::{Failure, Refusal},
    traffic::{Meter, Way},
    trust::PeerIdentity,
};
use crate::{
    MAX_MESSAGE_BYTES, Received,
    identity::{Certificate, Validity},
};

/// One live connection to a member.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    /// Where the peer was when the connection was made.
    pub(super) address: SocketAddr,
    pub(super) peer: Arc<PeerIdentity>,
    /// Whether this side has dialled.
    pub(super) dialled: bool,
    pub(super) since: Instant,
    pub(super) since_clock: OffsetDateTime,
    pub(super) detoured: bool,
    /// Of the certificate that this node has presented, or of an older one.
    own: Validity,
}

impl Link {
    pub(super) fn new(
        connection: Connection,
        own: Validity,
        now: OffsetDateTime,
    ) -> Result<Self, Refusal> {
        let certificate = presented(&connection)?;
        let address = canonical(connection.remote_address());
        let peer = PeerIdentity {
            node: certificate.public_key().node_id(),
            name: certificate.name().map(str::to_owned),
            public_key: certificate.public_key(),
            validity: certificate.validity(),
        };
        Ok(Self {
            dialled: connection.side().is_client(),
            peer: Arc::new(peer),
            since: Instant::now(),
            since_clock: now,
            address,
            detoured: node_behind(address).is_some(),
            own,
            connection,
        })
    }

    /// Why the connection may not go on at the time `now`, if one of the certificates has expired.
    pub(super) fn expired(&self, own: NodeId, now: OffsetDateTime) -> Option<Refusal> {
        let both = [(self.peer.node, self.peer.validity), (own, self.own)];
        let (holder, validity) = both.into_iter().find(|(_, validity)| validity.until <= now)?;
        Some(Refusal::Clock { holder, validity, now })
    }

    /// When the first of both certificates expires.
    pub(super) fn expires(&self) -> OffsetDateTime {
        self.own.until.min(self.peer.validity.until)
    }

    pub(super) fn id(&self) -> usize {
        self.connection.stable_id()
    }

    /// Waits for the peer to say that it has accepted us. In TLS 1.3 a client is done before the
    /// server has judged its certificate (RFC 8446 §4.4.2), so the handshake does not tell.
    pub(super) async fn accepted(&self) -> Result<(), Failure> {
        let mut stream = self.connection.accept_uni().await?;
        match stream.read_to_end(1).await {
            Ok(head) if head == [HELLO] => Ok(()),
            Ok(_) | Err(_) => Err(match self.connection.close_reason() {
                Some(error) => error.into(),
                None => Failure::from(&Refusal::Request("the peer does not say hello".into())),
            }),
        }
    }

    /// Says that the other side is accepted.
    pub(super) async fn greet(&self) -> Result<(), Failure> {
        self.write(&[HELLO], Bytes::new()).await.map(drop)
    }

    /// Sends `message` on a stream of its own, and waits until the peer has all of it or does not
    /// want it. False if the connection was lost before.
    pub(super) async fn send_on_stream(&self, message: Bytes, meter: &Meter) -> bool {
        let bytes = message.len();
        let Ok(stream) = self.write(&[MESSAGE], message).await else { return false };
        meter.sent(Way::Stream, bytes);
        stream.stopped().await.is_ok()
    }

    async fn write(&self, head: &[u8], body: Bytes) -> Result<SendStream, Failure> {
        let lost = |_| match self.connection.close_reason() {
            Some(error) => Failure::from(error),
            None => Failure::from(&Refusal::Request("the peer stopped a stream".into())),
        };
        let mut stream = self.connection.open_uni().await?;
        stream.write_all(head).await.map_err(lost)?;
        stream.write_chunk(body).await.map_err(lost)?;
        // A stream that is closed already belongs to a lost connection, which is noticed there.
        let _ = stream.finish();
        Ok(stream)
    }

    /// Waits until everything that was sent before has been acknowledged, within `limit`.
    pub(super) async fn flush(&self, limit: Duration) {
        let flushed = async {
            let mut stream = self.connection.open_uni().await.ok()?;
            stream.write_all(&[HELLO]).await.ok()?;
            stream.finish().ok()?;
            stream.stopped().await.ok()
        };
        // Whatever is not acknowledged by then is lost, as any message may be.
        let _ = tokio::time::timeout(limit, flushed).await;
    }

    pub(super) fn close(&self, reason: &str) {
        self.connection.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Takes in what the peer sends until the connection ends.
    pub(super) async fn read(self, context: Context, meter: Arc<Meter>) {
        let reader = Reader { link: self, context, meter };
        reader.run().await;
    }
}

/// The certificate that the other end of `connection` has presented.
pub(super) fn presented(connection: &Connection) -> Result<Certificate, Refusal> {
    let chain = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok());
    let leaf = chain.as_deref().and_then(|chain| chain.first()).ok_or(Refusal::NotOfThisKind)?;
    Ok(Certificate::from_der(leaf)?)
}

struct Reader {
    link: Link,
    context: Context,
    meter: Arc<Meter>,
}

enum Wake {
    Datagram(Bytes),
    Stream(RecvStream),
    Request(SendStream, RecvStream),
    Done,
    Lost,
}

impl Reader {
    async fn run(self) {
        let connection = &self.link.connection;
        let mut streams = FuturesUnordered::new();
        let mut requests = FuturesUnordered::new();
        loop {
            let wake = tokio::select! {
                datagram = connection.read_datagram() => datagram.map_or(Wake::Lost, Wake::Datagram),
                stream = connection.accept_uni(), if streams.len() < STREAMS_AT_ONCE => {
                    stream.map_or(Wake::Lost, Wake::Stream)
                }
                request = connection.accept_bi(), if requests.is_empty() => {
                    request.map_or(Wake::Lost, |(send, receive)| Wake::Request(send, receive))
                }
                Some(()) = streams.next() => Wake::Done,
                Some(()) = requests.next() => Wake::Done,
            };
            match wake {
                Wake::Datagram(message) => {
                    self.meter.received(Way::Datagram, message.len());
                    if self.context.inbound.try_send(self.received(message)).is_err() {
                        self.meter.not_taken();
                    }
                }
                Wake::Stream(stream) => streams.push(self.read_stream(stream)),
                Wake::Request(send, receive) => {
                    requests.push(enrolment::renew(&self.context, &self.link, send, receive));
                }
                Wake::Done => {}
                Wake::Lost => return,
            }
        }
    }

    async fn read_stream(&self, mut stream: RecvStream) {
        let whole = stream.read_to_end(MAX_MESSAGE_BYTES + 1);
        match tokio::time::timeout(STREAM_LIMIT, whole).await {
            Ok(Ok(bytes)) if bytes.first() == Some(&MESSAGE) => {
                let message = Bytes::from(bytes).slice(1..);
                self.meter.received(Way::Stream, message.len());
                // Waiting here stops the stream, and by flow control the sender.
                let _ = self.context.inbound.send(self.received(message)).await;
            }
            // A hello, or a kind that only a newer agent knows.
            Ok(Ok(_)) => {}
            Ok(Err(quinn::ReadToEndError::TooLong)) => {
                self.meter.oversized();
                tracing::warn!(peer = %self.link.peer.node, address = %self.link.address,
                    limit_bytes = MAX_MESSAGE_BYTES, "dropped an oversized message");
            }
            Ok(Err(quinn::ReadToEndError::Read(_))) | Err(_) => {}
        }
    }

    fn received(&self, message: Bytes) -> Received {
        Received { from: self.link.peer.node, address: self.link.address, message }
    }
}

/// The first byte of a stream: the server accepts the client, or a flush.
const HELLO: u8 = 0;
/// The first byte of a stream: a message follows.
const MESSAGE: u8 = 1;

const STREAMS_AT_ONCE: usize = 32;
const STREAM_LIMIT: Duration = Duration::from_secs(10);
