//! What Prometheus is told to scrape, by its HTTP service discovery: every container of the cluster
//! that asks for it by label, and the agents themselves.

mod targets;

use axum::{Json, Router, extract::State, routing::get};
use serde::Deserialize;

pub use self::targets::{Role, Selection, TargetGroup, targets};
use crate::{
    api::extract::Params,
    refusal::{Refusal, RefusalKind},
    status::Report,
};

/// Serves `/v1/sd/prometheus`.
pub fn router(report: Report) -> Router {
    Router::new().route("/v1/sd/prometheus", get(discover)).with_state(report)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    network: Option<String>,
    role: Option<Role>,
}

/// An answer that is not known to be right is an error: Prometheus then keeps the targets that it
/// has, where it would drop those that are missing from a list.
async fn discover(
    State(report): State<Report>,
    Params(Asked { network, role }): Params<Asked>,
) -> Result<Json<Vec<TargetGroup>>, Refusal> {
    let snapshot = report.snapshot();
    if snapshot.warming_up {
        return Err(Refusal::new(
            RefusalKind::Unavailable,
            "this agent has just started and does not know all nodes yet: ask again in some seconds",
        ));
    }
    let network = match &network {
        None => None,
        Some(text) => {
            Some(snapshot.cluster.find_network(text).map(|found| found.id).ok_or_else(|| {
                Refusal::missing(format!("there is no network {text}: weft network ls lists them"))
            })?)
        }
    };
    Ok(Json(targets(&snapshot.cluster, Selection { network, role })))
}
