//! The joiner's side of admission.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use time::OffsetDateTime;
use weft_gossip::{
    identity::{Identity, Token},
    quic::{Join, JoinError},
};
use weft_model::Label;

use crate::advertise::Advertise;

/// How long all of a join may take.
const LIMIT: Duration = Duration::from_secs(15);

/// Asks the nodes that `token` names for a certificate; writes the identity upon success only.
pub async fn join(
    token: &Token,
    state_dir: &Path,
    name: Label,
    advertise: Option<Advertise>,
) -> Result<Identity, JoinError> {
    let unspecified = match token.seeds.first() {
        Some(SocketAddr::V6(_)) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        Some(SocketAddr::V4(_)) | None => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    let join = Join {
        token: token.clone(),
        state_dir: state_dir.to_owned(),
        name,
        bind: SocketAddr::new(advertise.map_or(unspecified, |advertise| advertise.ip), 0),
        now: OffsetDateTime::now_utc(),
        limit: LIMIT,
    };
    join.run().await
}
