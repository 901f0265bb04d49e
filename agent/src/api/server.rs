mod services;

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use serde::Deserialize;
use weft_model::EndpointId;

use super::{
    extract::{Body, Params},
    types::{
        Attach, Attached, CreateNetwork, CreateToken, CreatedToken, Drain, DrainStatus,
        EndpointStatus, Expose, NetworkStatus, NodeStatus, Problem, Resolved, Sandbox, Status,
        TokenStatus,
    },
};
use crate::{
    engines::docker::Handle,
    health::drain::Drains,
    ledger::Ledger,
    refusal::{Refusal, RefusalKind, refuse},
    scrape,
    status::Report,
    tokens::Tokens,
};

/// What the API's handlers work with.
#[derive(Clone)]
pub struct Api {
    pub ledger: Ledger,
    pub tokens: Arc<Tokens>,
    pub report: Report,
    /// Absent where Docker is switched off.
    pub docker: Option<Handle>,
    pub drains: Drains,
}

type Answer<T> = Result<Json<T>, Refusal>;

/// All routes.
pub fn router(api: Api) -> Router {
    let discovery = scrape::router(api.report.clone());
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/nodes", get(nodes))
        .route("/v1/networks", get(networks).post(create_network))
        .route("/v1/networks/{network}", get(network).delete(remove_network))
        .route("/v1/docker/networks", post(create_docker_network))
        .route("/v1/endpoints", get(endpoints).post(attach))
        .route("/v1/endpoints/{endpoint}", get(endpoint).delete(detach))
        .merge(services::routes())
        .route("/v1/drain", get(draining).post(drain))
        .route("/v1/drain/undo", post(undo_drain))
        .route("/v1/drain/stop", post(stop_drained))
        .route("/v1/exposures", get(exposures).post(expose))
        .route("/v1/exposures/{network}", delete(hide))
        .route("/v1/resolve", get(resolve))
        .route("/v1/tokens", get(tokens).post(create_token))
        .route("/v1/tokens/{token}", delete(remove_token))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .with_state(api)
        .merge(discovery)
}

async fn status(State(api): State<Api>) -> Json<Status> {
    let mut status = api.report.status();
    status.findings.extend(api.docker.iter().flat_map(Handle::findings));
    Json(status)
}

async fn nodes(State(api): State<Api>) -> Json<Vec<NodeStatus>> {
    Json(api.report.nodes())
}

async fn networks(State(api): State<Api>) -> Answer<Vec<NetworkStatus>> {
    api.report.networks().await.map(Json)
}

async fn network(State(api): State<Api>, Path(network): Path<String>) -> Answer<NetworkStatus> {
    api.report.network(&network).await.map(Json)
}

async fn create_network(
    State(api): State<Api>,
    Body(request): Body<CreateNetwork>,
) -> Result<Response, Refusal> {
    let id = api.ledger.create_network(request).await?;
    let created = api.report.network(&id.to_string()).await?;
    Ok((StatusCode::CREATED, Json(created)).into_response())
}

async fn create_docker_network(
    State(api): State<Api>,
    Body(request): Body<CreateNetwork>,
) -> Result<Response, Refusal> {
    let docker = api.docker.as_ref().ok_or_else(|| {
        Refusal::missing(
            "this agent does not serve Docker: set docker = true, or ask the agent of a host with Docker",
        )
    })?;
    if request.driver.is_local() {
        return refuse(
            "driver",
            format!(
                "a network with driver {driver} is of one host alone, and this makes one in every host's Docker: docker network create -d {driver} makes one of Docker's own",
                driver = request.driver
            ),
        );
    }
    let id = docker.create_everywhere(request).await?;
    let created = api.report.network(&id.to_string()).await?;
    Ok((StatusCode::CREATED, Json(created)).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Removal {
    #[serde(default)]
    force: bool,
}

async fn remove_network(
    State(api): State<Api>,
    Path(network): Path<String>,
    Params(removal): Params<Removal>,
) -> Answer<()> {
    api.ledger.remove_network(network, removal.force).await.map(Json)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Selection {
    /// Those of this host alone, also those that come or go at this moment.
    #[serde(default)]
    here: bool,
    /// `KEY` or `KEY=VALUE`.
    label: Option<String>,
}

async fn endpoints(
    State(api): State<Api>,
    Params(Selection { here, label }): Params<Selection>,
) -> Json<Vec<EndpointStatus>> {
    let mut endpoints = match here {
        true => api.report.endpoints_here(),
        false => api.report.endpoints(),
    };
    if let Some(label) = label {
        endpoints.retain(|endpoint| match label.split_once('=') {
            Some((key, value)) => endpoint.labels.get(key).is_some_and(|own| own == value),
            None => endpoint.labels.contains_key(&label),
        });
    }
    Json(endpoints)
}

async fn endpoint(State(api): State<Api>, Path(endpoint): Path<String>) -> Answer<Attached> {
    api.report.attached(endpoint_id(&endpoint)?).map(Json)
}

fn endpoint_id(text: &str) -> Result<EndpointId, Refusal> {
    text.parse().map_err(|error| {
        Refusal::new(RefusalKind::Invalid, format!("{error}: weft ps --format json shows ids"))
    })
}

async fn attach(
    State(api): State<Api>,
    Body(request): Body<Attach>,
) -> Result<(StatusCode, Json<Attached>), Refusal> {
    match &request.sandbox {
        Sandbox::Pid(_) | Sandbox::Path(_) => {}
        Sandbox::Engine(path) => {
            let path = path.display();
            let why = format!("engine {path} is for container engines alone: give pid or path");
            return Err(Refusal::field("sandbox", why));
        }
        Sandbox::Host => {
            let why = "the host is put on a network by POST /v1/exposures: give pid or path";
            return Err(Refusal::field("sandbox", why));
        }
    }
    let id = api.ledger.attach(request).await?;
    Ok((StatusCode::CREATED, Json(api.report.attached(id)?)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Detachment {
    network: Option<String>,
}

async fn detach(
    State(api): State<Api>,
    Path(endpoint): Path<String>,
    Params(Detachment { network }): Params<Detachment>,
) -> Answer<()> {
    api.ledger.detach(endpoint, network).await.map(Json)
}

async fn draining(State(api): State<Api>) -> Answer<Vec<DrainStatus>> {
    api.drains.list().await.map(Json)
}

async fn drain(State(api): State<Api>, Body(request): Body<Drain>) -> Answer<Vec<DrainStatus>> {
    api.drains.begin(&request).await.map(Json)
}

async fn undo_drain(
    State(api): State<Api>,
    Body(request): Body<Drain>,
) -> Answer<BTreeSet<EndpointId>> {
    api.drains.undo(&request).await.map(Json)
}

async fn stop_drained(State(api): State<Api>, Body(request): Body<Drain>) -> Answer<()> {
    api.drains.stop(&request).await.map(Json)
}

async fn exposures(State(api): State<Api>) -> Json<Vec<EndpointStatus>> {
    Json(api.report.exposures())
}

async fn expose(
    State(api): State<Api>,
    Body(Expose { network, addresses }): Body<Expose>,
) -> Answer<Attached> {
    let id = api.ledger.expose(network, addresses).await?;
    api.report.attached(id).map(Json)
}

async fn hide(State(api): State<Api>, Path(network): Path<String>) -> Answer<()> {
    api.ledger.hide(network).await.map(Json)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    name: String,
    network: Option<String>,
}

async fn resolve(
    State(api): State<Api>,
    Params(Question { name, network }): Params<Question>,
) -> Answer<Resolved> {
    api.report.resolve(&name, network.as_deref()).map(Json)
}

async fn tokens(State(api): State<Api>) -> Answer<Vec<TokenStatus>> {
    api.tokens.list().map(Json)
}

async fn create_token(
    State(api): State<Api>,
    Body(request): Body<CreateToken>,
) -> Result<(StatusCode, Json<CreatedToken>), Refusal> {
    Ok((StatusCode::CREATED, Json(api.tokens.create(&request)?)))
}

async fn remove_token(State(api): State<Api>, Path(token): Path<String>) -> Answer<()> {
    api.tokens.remove(&token).map(Json)
}

async fn no_such_path(uri: Uri) -> Refusal {
    Refusal::missing(format!("there is nothing at {}: see docs/api.md", uri.path()))
}

async fn no_such_method(uri: Uri) -> Response {
    let error = format!("{} does not take this method: see docs/api.md", uri.path());
    let problem = Problem { error, field: None };
    (StatusCode::METHOD_NOT_ALLOWED, Json(problem)).into_response()
}
