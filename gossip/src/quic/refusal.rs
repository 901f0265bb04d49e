use std::fmt;

use time::OffsetDateTime;
use weft_model::{ClusterId, Label, NodeId};

use crate::identity::{InvalidCertificate, TokenRefusal, Validity, instant};

/// Why one agent does not deal with another.
///
/// Its text goes to the other side as the reason of the close (RFC 9000 §19.19), so that both
/// operators read the same; it begins with the code of its [`FailureReason`].
#[derive(Debug)]
pub(crate) enum Refusal {
    WrongCluster { theirs: ClusterId, ours: ClusterId },
    WrongAuthority { ours: [u8; 32] },
    Clock { holder: NodeId, validity: Validity, now: OffsetDateTime },
    JoinerClock { theirs: OffsetDateTime, ours: OffsetDateTime, validity: Validity },
    Certificate(InvalidCertificate),
    ForeignKey { claimed: NodeId, actual: NodeId },
    NotOfThisKind,
    Revoked(NodeId),
    OwnIdentity(NodeId),
    Token(TokenRefusal),
    NotIssuer,
    Name { name: Label, why: String },
    Request(String),
    Busy,
    Internal(String),
}

impl Refusal {
    pub(crate) fn reason(&self) -> FailureReason {
        match self {
            Self::WrongCluster { .. } => FailureReason::WrongCluster,
            Self::WrongAuthority { .. } => FailureReason::WrongAuthority,
            Self::Clock { .. } | Self::JoinerClock { .. } => FailureReason::Clock,
            Self::Certificate(_) | Self::ForeignKey { .. } | Self::NotOfThisKind => {
                FailureReason::Certificate
            }
            Self::Revoked(_) => FailureReason::Revoked,
            Self::OwnIdentity(_) => FailureReason::OwnIdentity,
            Self::Token(TokenRefusal::Unknown(_)) => FailureReason::TokenUnknown,
            Self::Token(TokenRefusal::Expired { .. }) => FailureReason::TokenExpired,
            Self::Token(TokenRefusal::UsedUp(_)) => FailureReason::TokenUsedUp,
            Self::NotIssuer => FailureReason::NotIssuer,
            Self::Name { .. } => FailureReason::NameTaken,
            Self::Request(_) => FailureReason::Protocol,
            Self::Busy => FailureReason::Busy,
            Self::Internal(_) => FailureReason::Internal,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.reason())?;
        match self {
            Self::WrongCluster { theirs, ours } => {
                write!(f, "certificate is of cluster {theirs}, ours is {ours}")
            }
            Self::WrongAuthority { ours } => write!(
                f,
                "certificate is not signed by the authority with fingerprint {}",
                hex::encode(ours)
            ),
            Self::Clock { holder, validity, now } => write!(
                f,
                "certificate of node {holder} is valid {validity}, and the clock here says {}; \
                 set the clocks, or renew the certificate",
                instant(*now)
            ),
            Self::JoinerClock { theirs, ours, validity } => write!(
                f,
                "the joiner's clock says {}, ours {}, so that its certificate, valid {validity}, \
                 would be of no use; set the clocks",
                instant(*theirs),
                instant(*ours)
            ),
            Self::Certificate(error) => write!(f, "{error}"),
            Self::ForeignKey { claimed, actual } => {
                write!(f, "certificate is that of node {claimed}, but its key that of {actual}")
            }
            Self::NotOfThisKind => {
                f.write_str("the certificate is not of the kind that this protocol asks for")
            }
            Self::Revoked(node) => write!(f, "node {node} has been removed from the cluster"),
            Self::OwnIdentity(node) => write!(
                f,
                "both ends are node {node}: a copy of one host's state runs on another; \
                 remove it there and join again"
            ),
            Self::Token(TokenRefusal::Unknown(token)) => write!(
                f,
                "token {token} is not known here or its secret is wrong; \
                 create one with `weft token create`"
            ),
            Self::Token(TokenRefusal::Expired { token, expired, now }) => write!(
                f,
                "token {token} expired at {}, and it is {}; create one with `weft token create`",
                instant(*expired),
                instant(*now)
            ),
            Self::Token(TokenRefusal::UsedUp(token)) => write!(
                f,
                "token {token} has been used up by another node; \
                 create one with `weft token create`"
            ),
            Self::NotIssuer => f.write_str(
                "this node does not hold the authority's key; \
                 use a token with the address of the node that made the cluster",
            ),
            Self::Name { name, why } => {
                write!(f, "a node cannot join as {name}: {why}; choose another name")
            }
            Self::Request(what) => f.write_str(what),
            Self::Busy => f.write_str("too many nodes are joining at once; try again"),
            Self::Internal(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Refusal {}

impl From<TokenRefusal> for Refusal {
    fn from(refusal: TokenRefusal) -> Self {
        Self::Token(refusal)
    }
}

impl From<InvalidCertificate> for Refusal {
    fn from(error: InvalidCertificate) -> Self {
        Self::Certificate(error)
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// Why a connection could not be made or kept: a bounded set, fit for a metric's label.
        #[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
        pub enum FailureReason {
            $($(#[$doc])* $name,)*
        }

        impl FailureReason {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub fn code(self) -> &'static str {
                match self {
                    $(Self::$name => $code,)*
                }
            }
        }
    };
}

reasons! {
    /// A certificate of another cluster.
    WrongCluster = "wrong-cluster",
    /// A certificate that the cluster's authority has not signed.
    WrongAuthority = "wrong-authority",
    /// A certificate outside its time, or a joiner's clock that is far off.
    Clock = "clock",
    /// A certificate of no form that is accepted.
    Certificate = "certificate",
    NoCertificate = "no-certificate",
    Revoked = "revoked",
    /// The other side presents our own identity.
    OwnIdentity = "own-identity",
    TokenUnknown = "token-unknown",
    TokenExpired = "token-expired",
    TokenUsedUp = "token-used-up",
    NotIssuer = "not-issuer",
    NameTaken = "name-taken",
    Busy = "busy",
    Internal = "internal",
    /// No answer in time.
    Timeout = "timeout",
    /// The system cannot send there.
    Unreachable = "unreachable",
    /// The other side has stopped or restarted.
    Closed = "closed",
    /// Anything else that QUIC or TLS object to.
    Protocol = "protocol",
}

impl FailureReason {
    /// Reads the code at the head of a [`Refusal`]'s text.
    fn of_text(text: &str) -> Self {
        let code = text.split(':').next().unwrap_or_default();
        Self::ALL.iter().copied().find(|r| r.code() == code).unwrap_or(Self::Protocol)
    }

    /// Whether trying again soon is of no use.
    pub(crate) fn is_lasting(self) -> bool {
        match self {
            Self::Timeout | Self::Unreachable | Self::Closed | Self::Busy | Self::Internal => false,
            Self::WrongCluster
            | Self::WrongAuthority
            | Self::Clock
            | Self::Certificate
            | Self::NoCertificate
            | Self::Revoked
            | Self::OwnIdentity
            | Self::TokenUnknown
            | Self::TokenExpired
            | Self::TokenUsedUp
            | Self::NotIssuer
            | Self::NameTaken
            | Self::Protocol => true,
        }
    }
}

impl fmt::Display for FailureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// A connection that could not be made or was lost, and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure {
    pub reason: FailureReason,
    /// In words; says which side objects.
    pub text: String,
}

impl Failure {
    pub(crate) fn new(reason: FailureReason, text: impl Into<String>) -> Self {
        Self { reason, text: text.into() }
    }

    pub(crate) fn timeout(after: std::time::Duration) -> Self {
        Self::new(FailureReason::Timeout, format!("no answer within {:.1} s", after.as_secs_f64()))
    }

    pub(super) fn by_peer(text: &str) -> Self {
        Self::new(FailureReason::of_text(text), format!("the other side refuses: {text}"))
    }

    fn of_tls(text: &str) -> Self {
        let text = text.strip_prefix(FOREIGN_ERROR).unwrap_or(text);
        match text {
            "peer sent no certificates" => Self::new(FailureReason::NoCertificate, text),
            _ => Self::new(FailureReason::of_text(text), text),
        }
    }
}

impl From<quinn::ConnectionError> for Failure {
    fn from(error: quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as E;
        match error {
            E::TransportError(ref inner) if is_tls(inner.code) => Self::of_tls(&inner.reason),
            E::ConnectionClosed(ref close) if is_tls(close.error_code) => {
                let text = String::from_utf8_lossy(&close.reason);
                let refusal = Self::of_tls(&text);
                Self { text: Self::by_peer(&refusal.text).text, ..refusal }
            }
            E::ApplicationClosed(ref close) if !close.reason.is_empty() => {
                Self::by_peer(&String::from_utf8_lossy(&close.reason))
            }
            E::TimedOut => Self::new(FailureReason::Timeout, "the other side has fallen silent"),
            E::Reset => Self::new(FailureReason::Closed, "the other side has restarted"),
            E::LocallyClosed => Self::new(FailureReason::Closed, "closed here"),
            E::ApplicationClosed(_) => {
                Self::new(FailureReason::Closed, "the other side has closed")
            }
            E::VersionMismatch
            | E::TransportError(_)
            | E::ConnectionClosed(_)
            | E::CidsExhausted => Self::new(FailureReason::Protocol, error.to_string()),
        }
    }
}

impl From<&Refusal> for Failure {
    fn from(refusal: &Refusal) -> Self {
        Self::new(refusal.reason(), refusal.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What rustls writes before the text of a verifier's own error.
const FOREIGN_ERROR: &str = "other error: ";

/// RFC 9001 §4.8: TLS alerts are the codes 0x100 to 0x1ff.
fn is_tls(code: quinn::TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_read_from_the_text_that_carries_it() {
        let refusal = Refusal::WrongCluster {
            theirs: ClusterId::from([1; 16]),
            ours: ClusterId::from([2; 16]),
        };
        let text = format!("{FOREIGN_ERROR}{refusal}");
        let failure = Failure::of_tls(&text);
        assert_eq!(failure.reason, FailureReason::WrongCluster);
        assert!(failure.text.contains(&"01".repeat(16)) && failure.text.contains(&"02".repeat(16)));
    }

    #[test]
    fn every_code_is_read_back_and_an_unknown_one_is_a_protocol_error() {
        for reason in FailureReason::ALL {
            assert_eq!(FailureReason::of_text(&format!("{reason}: text")), *reason);
        }
        assert_eq!(FailureReason::of_text("some other text"), FailureReason::Protocol);
    }
}
