//! Join tokens, as the API offers them.

use std::{net::SocketAddr, time::Duration};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::sync::watch;
use weft_gossip::identity::{Grant, Issuer, TokenId};

use crate::{
    api::types::{CreateToken, CreatedToken, TokenStatus},
    chain::Chain,
    refusal::{Refusal, RefusalKind},
};

/// The most that one token may admit, and for how long.
const MAX_USES: u32 = 1000;
const MAX_TTL: Duration = Duration::from_secs(30 * 86_400);
/// How many addresses a token names.
const SEEDS: usize = 3;

/// The tokens of this node, if it may admit others.
pub struct Tokens {
    issuer: Option<Issuer>,
    /// Where members of the cluster are reached, this node first.
    addresses: watch::Receiver<Vec<SocketAddr>>,
}

impl Tokens {
    pub fn new(issuer: Option<Issuer>, addresses: watch::Receiver<Vec<SocketAddr>>) -> Self {
        Self { issuer, addresses }
    }

    pub fn create(&self, request: &CreateToken) -> Result<CreatedToken, Refusal> {
        let issuer = self.issuer()?;
        let ttl = Duration::from_secs(request.ttl_seconds);
        if ttl.is_zero() || ttl > MAX_TTL {
            return Err(Refusal::field(
                "ttl_seconds",
                format!("{} is out of range: give 1 to {}", request.ttl_seconds, MAX_TTL.as_secs()),
            ));
        }
        if !(1..=MAX_USES).contains(&request.uses) {
            return Err(Refusal::field(
                "uses",
                format!("{} is out of range: give 1 to {MAX_USES}", request.uses),
            ));
        }
        let now = OffsetDateTime::now_utc();
        let seeds: Vec<_> = self.addresses.borrow().iter().copied().take(SEEDS).collect();
        let grant = Grant { ttl, uses: request.uses };
        let token = issuer
            .tokens
            .create(&issuer.authority, &seeds, grant, now)
            .map_err(|error| Refusal::new(RefusalKind::Failed, Chain(&error).to_string()))?;
        tracing::info!(token = %token.id, uses = request.uses, "join token created");
        Ok(CreatedToken {
            id: token.id.to_string(),
            token: token.to_string(),
            expires: rfc3339(now + ttl),
        })
    }

    pub fn list(&self) -> Result<Vec<TokenStatus>, Refusal> {
        let live = self.issuer()?.tokens.list(OffsetDateTime::now_utc());
        Ok(live
            .into_iter()
            .map(|(id, record)| TokenStatus {
                id: id.to_string(),
                expires: rfc3339(record.expires),
                uses_left: record.uses_left,
            })
            .collect())
    }

    pub fn remove(&self, id: &str) -> Result<(), Refusal> {
        let issuer = self.issuer()?;
        let parsed: TokenId =
            id.parse().map_err(|error| Refusal::field("token", Chain(&error).to_string()))?;
        let removed = issuer
            .tokens
            .remove(parsed, OffsetDateTime::now_utc())
            .map_err(|error| Refusal::new(RefusalKind::Failed, Chain(&error).to_string()))?;
        match removed {
            true => Ok(()),
            false => {
                Err(Refusal::missing(format!("there is no token {id}: weft token ls lists them")))
            }
        }
    }

    fn issuer(&self) -> Result<&Issuer, Refusal> {
        self.issuer.as_ref().ok_or_else(|| {
            Refusal::new(
                RefusalKind::Conflict,
                "this node has no authority key: run weft token on the node that made the cluster with weft init",
            )
        })
    }
}

/// A time as people and programs read it.
pub(crate) fn rfc3339(time: OffsetDateTime) -> String {
    time.replace_nanosecond(0)
        .expect("zero is a nanosecond")
        .format(&Rfc3339)
        .expect("UTC has a form in RFC 3339")
}
