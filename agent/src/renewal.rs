//! Keeps this node's certificate valid: asks an issuer for a new one at two thirds of its life.

use std::{sync::Arc, time::Duration};

use time::OffsetDateTime;
use tokio::{sync::watch, time as clock};
use tokio_util::sync::CancellationToken;
use weft_gossip::{
    ClusterView,
    identity::{Identity, NODE_VALIDITY, Validity},
    quic::QuicCarrier,
};
use weft_model::NodeId;

use crate::chain::Chain;

/// How often it is looked at, and so the wait after a failure.
const INTERVAL: Duration = Duration::from_secs(60);

/// Renews until `stop`.
pub async fn keep_valid(
    carrier: Arc<QuicCarrier>,
    view: watch::Receiver<Arc<ClusterView>>,
    stop: CancellationToken,
) {
    let mut interval = clock::interval(INTERVAL);
    while stop.run_until_cancelled(interval.tick()).await.is_some() {
        let identity = carrier.identity();
        if OffsetDateTime::now_utc() < identity.certificate().validity().renew_at() {
            continue;
        }
        match renew(&carrier, &identity, &view).await {
            Ok(until) => tracing::info!(%until, "the certificate was renewed"),
            Err(why) => tracing::warn!(why, "the certificate could not be renewed; will try again"),
        }
    }
}

async fn renew(
    carrier: &QuicCarrier,
    identity: &Identity,
    view: &watch::Receiver<Arc<ClusterView>>,
) -> Result<OffsetDateTime, String> {
    let certificate = match identity.issuer() {
        Some(issuer) => {
            let validity = Validity::starting(OffsetDateTime::now_utc(), NODE_VALIDITY);
            let key = identity.key().public_key();
            issuer.authority.issue(&key, identity.name(), validity)
        }
        None => {
            let members: Vec<NodeId> = view.borrow().members.keys().copied().collect();
            let mut last = String::from("no member can be reached");
            let mut found = None;
            for node in members.into_iter().filter(|node| *node != identity.node()) {
                match carrier.renew(node).await {
                    Ok(certificate) => {
                        found = Some(certificate);
                        break;
                    }
                    Err(failure) => last = failure.to_string(),
                }
            }
            found.ok_or(last)?
        }
    };
    let until = certificate.validity().until;
    carrier.present(certificate).map_err(|error| Chain(&error).to_string())?;
    Ok(until)
}
