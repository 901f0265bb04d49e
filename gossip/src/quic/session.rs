use std::{fmt, sync::Arc};

use quinn::Connection;
use time::OffsetDateTime;

use super::{
    enrolment::{self, Admitted, Request},
    link::Link,
    refusal::Failure,
    trust::PeerIdentity,
};

/// A live, mutually authenticated TLS 1.3 session with a member.
///
/// Holding it does not keep the connection in use: it may be closed at any time, after which keys
/// can still be derived from it.
#[derive(Clone, Debug)]
pub struct Session {
    connection: Connection,
    peer: Arc<PeerIdentity>,
    dialled: bool,
    detoured: bool,
    established: OffsetDateTime,
    expires: OffsetDateTime,
}

impl Session {
    pub(super) fn new(link: &Link) -> Self {
        Self {
            connection: link.connection.clone(),
            peer: link.peer.clone(),
            dialled: link.dialled,
            detoured: link.detoured,
            established: link.since_clock,
            expires: link.expires(),
        }
    }

    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// Whether this node has dialled: of both ends exactly one has, so it tells them apart.
    pub fn dialled(&self) -> bool {
        self.dialled
    }

    /// Whether its packets are carried by a [`super::Detour`].
    pub fn detoured(&self) -> bool {
        self.detoured
    }

    /// When it was made, by this node's clock.
    pub fn established(&self) -> OffsetDateTime {
        self.established
    }

    /// When the first of the two certificates under which it was made expires: it is closed then,
    /// and keys that were derived from it are of no use any more.
    pub fn expires(&self) -> OffsetDateTime {
        self.expires
    }

    /// The same at both ends, and of no other session.
    pub fn id(&self) -> Result<SessionId, ExportError> {
        self.export("weft session id", b"").map(SessionId)
    }

    /// Derives `N` bytes that only the two ends of this session can compute (RFC 8446 §7.5).
    ///
    /// Both ends get the same for the same `label` and `context`, and unrelated bytes for any
    /// other. A new connection is a new session with other bytes: both ends may look at different
    /// ones for a moment while connections change, so tell the peer [`Self::id`] along with
    /// whatever was sealed.
    ///
    /// # Errors
    /// If `N` is more than 255 times 32.
    pub fn export<const N: usize>(
        &self,
        label: &str,
        context: &[u8],
    ) -> Result<[u8; N], ExportError> {
        let mut bytes = [0; N];
        self.connection
            .export_keying_material(&mut bytes, label.as_bytes(), context)
            .map_err(|_| ExportError { label: label.to_owned(), bytes: N })?;
        Ok(bytes)
    }

    pub fn is_live(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    pub(super) async fn ask(&self, request: &Request) -> Result<Admitted, Failure> {
        enrolment::ask(&self.connection, request).await
    }
}

/// Tells sessions apart.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
pub struct SessionId([u8; 16]);

impl SessionId {
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({})", hex::encode(self.0))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot derive {bytes} bytes for {label:?} from a TLS session: the limit is 8160")]
pub struct ExportError {
    label: String,
    bytes: usize,
}
