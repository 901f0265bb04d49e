use std::{fmt, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use quinn::{Endpoint, VarInt};
use time::OffsetDateTime;
use tokio::{sync::watch, time::Instant};
use weft_model::Label;

use super::{
    acceptor::SERVER_NAME,
    bind_socket,
    enrolment::{self, Admitted, Request},
    refusal::{Failure, FailureReason, Refusal},
    timing::Timing,
    tls::{ALPN_JOIN, Presented, certified, client_config, direct, endpoint_config},
    trust::{Anchor, TokenTrust},
};
use crate::identity::{
    Certificate, Identity, IdentityError, Membership, PendingKey, Token, refuse_existing,
};

/// What a node needs to join a cluster.
#[derive(Clone, Debug)]
pub struct Join {
    pub token: Token,
    pub state_dir: PathBuf,
    pub name: Label,
    /// Where to send from; port 0 lets the system choose.
    pub bind: SocketAddr,
    pub now: OffsetDateTime,
    /// How long all of it may take.
    pub limit: Duration,
}

impl Join {
    /// Asks the token's seeds, one after another, for a certificate, and writes the identity once
    /// it has one.
    ///
    /// Dropping the future leaves no identity. If the token was used up by then, the same token
    /// still works from the same state directory until it expires.
    ///
    /// # Errors
    /// If the directory holds an identity already, or no seed admits this node: then with what
    /// each of them said.
    pub async fn run(self) -> Result<Identity, JoinError> {
        refuse_existing(&self.state_dir)?;
        let pending = PendingKey::obtain(&self.state_dir, self.token.id)?;
        let end = Instant::now() + self.limit;
        let mut attempts = Vec::new();

        for (index, &seed) in self.token.seeds.iter().enumerate() {
            let left = end.saturating_duration_since(Instant::now());
            let share = left / (self.token.seeds.len() - index) as u32;
            match self.ask(seed, &pending, share).await {
                Ok(membership) => {
                    let identity = membership.store(&self.state_dir, None)?;
                    pending.discard()?;
                    return Ok(identity);
                }
                Err(failure) => {
                    let settled = settles(failure.reason);
                    attempts.push(Attempt { seed, failure });
                    if settled {
                        break;
                    }
                }
            }
        }
        // An answer that was lost may have used up the token; the key can fetch it again.
        if attempts.iter().all(|attempt| is_answer(attempt.failure.reason)) {
            pending.discard()?;
        }
        Err(JoinError::Refused { token: Box::new(self.token), attempts: Attempts(attempts) })
    }

    async fn ask(
        &self,
        seed: SocketAddr,
        pending: &PendingKey,
        limit: Duration,
    ) -> Result<Membership, Failure> {
        let endpoint = self.endpoint(seed, pending).map_err(|error| {
            Failure::new(FailureReason::Unreachable, format!("cannot bind {}: {error}", self.bind))
        })?;
        let asked = tokio::time::timeout(limit, self.converse(&endpoint, seed, pending)).await;
        let outcome = match asked {
            Ok(Ok(admitted)) => self.accept(admitted, pending),
            Ok(Err(failure)) if failure.reason == FailureReason::Timeout => {
                Err(Failure::timeout(limit))
            }
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure::timeout(limit)),
        };
        endpoint.close(VarInt::from_u32(0), b"closed: joined or given up");
        // The close is one packet; whether it arrives does not matter.
        let _ = tokio::time::timeout(CLOSE_LIMIT, endpoint.wait_idle()).await;
        outcome
    }

    async fn converse(
        &self,
        endpoint: &Endpoint,
        seed: SocketAddr,
        pending: &PendingKey,
    ) -> Result<Admitted, Failure> {
        let certificate = Certificate::for_joining(&pending.key, self.token.id, &self.token.secret);
        let (_sender, presented) = watch::channel(certified(&[&certificate], &pending.key));
        let trust = TokenTrust { token: self.token.clone(), now: self.now };
        let config = client_config(
            Arc::new(trust),
            Presented(presented),
            ALPN_JOIN,
            direct(&Timing::default()),
        );
        let connection = endpoint
            .connect_with(config, seed, SERVER_NAME)
            .map_err(|error| Failure::new(FailureReason::Unreachable, error.to_string()))?
            .await?;
        let request = Request { name: self.name.clone(), clock: self.now.unix_timestamp() };
        enrolment::ask(&connection, &request).await
    }

    /// Checks what the issuer gave: nothing is taken on its word.
    fn accept(&self, admitted: Admitted, pending: &PendingKey) -> Result<Membership, Failure> {
        let checked = || -> Result<Membership, Refusal> {
            let ca = Certificate::from_pem(admitted.authority.as_bytes())?;
            let certificate = Certificate::from_pem(admitted.certificate.as_bytes())?;
            let trust = TokenTrust { token: self.token.clone(), now: self.now };
            if !trust.accepts(&ca) {
                return Err(Refusal::WrongAuthority { ours: self.token.authority });
            }
            let node = Anchor::new(&ca).judge(self.token.cluster, &certificate, self.now)?;
            let own = pending.key.public_key().node_id();
            if node != own {
                return Err(Refusal::ForeignKey { claimed: node, actual: own });
            }
            let mut seeds = admitted.seeds.clone();
            seeds.extend(self.token.seeds.iter().filter(|s| !admitted.seeds.contains(s)));
            Ok(Membership {
                cluster: self.token.cluster,
                name: self.name.clone(),
                key: pending.key.clone(),
                certificate,
                ca,
                seeds,
            })
        };
        checked().map_err(|refusal| Failure::from(&refusal))
    }

    fn endpoint(&self, seed: SocketAddr, pending: &PendingKey) -> std::io::Result<Endpoint> {
        let bind = match (self.bind, seed) {
            (SocketAddr::V4(v4), SocketAddr::V6(_)) if v4.ip().is_unspecified() => {
                SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), v4.port())
            }
            (SocketAddr::V6(v6), SocketAddr::V4(_)) if v6.ip().is_unspecified() => {
                SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), v6.port())
            }
            (bind, _) => bind,
        };
        bind_socket(endpoint_config(&pending.key), None, bind, None)
    }
}

/// What one seed said.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub seed: SocketAddr,
    pub failure: Failure,
}

/// What each seed said that was asked.
#[derive(Clone, Debug)]
pub struct Attempts(pub Vec<Attempt>);

impl fmt::Display for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, attempt) in self.0.iter().enumerate() {
            let separator = if index > 0 { "; " } else { "" };
            write!(f, "{separator}{}: {}", attempt.seed, attempt.failure)?;
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("could not join cluster {} with token {}: {attempts}", token.cluster, token.id)]
    Refused { token: Box<Token>, attempts: Attempts },
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Whether no other seed would say otherwise.
fn settles(reason: FailureReason) -> bool {
    match reason {
        FailureReason::TokenExpired
        | FailureReason::TokenUsedUp
        | FailureReason::NameTaken
        | FailureReason::Clock => true,
        FailureReason::WrongCluster
        | FailureReason::WrongAuthority
        | FailureReason::Certificate
        | FailureReason::NoCertificate
        | FailureReason::Revoked
        | FailureReason::OwnIdentity
        | FailureReason::TokenUnknown
        | FailureReason::NotIssuer
        | FailureReason::Busy
        | FailureReason::Internal
        | FailureReason::Timeout
        | FailureReason::Unreachable
        | FailureReason::Closed
        | FailureReason::Protocol => false,
    }
}

/// Whether the failure is what an issuer, or this node, decided; not a break on the way.
fn is_answer(reason: FailureReason) -> bool {
    match reason {
        FailureReason::TokenExpired
        | FailureReason::TokenUsedUp
        | FailureReason::TokenUnknown
        | FailureReason::NameTaken
        | FailureReason::Clock
        | FailureReason::WrongCluster
        | FailureReason::WrongAuthority
        | FailureReason::Certificate
        | FailureReason::NoCertificate
        | FailureReason::Revoked
        | FailureReason::OwnIdentity
        | FailureReason::NotIssuer => true,
        FailureReason::Busy
        | FailureReason::Internal
        | FailureReason::Timeout
        | FailureReason::Unreachable
        | FailureReason::Closed
        | FailureReason::Protocol => false,
    }
}

const CLOSE_LIMIT: Duration = Duration::from_millis(500);
