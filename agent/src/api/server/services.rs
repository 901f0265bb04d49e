use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use serde::Deserialize;
use weft_model::{Label, Protocol, Publication};

use super::{
    super::types::{CreateService, PublishedPort, ServiceStatus, UpdateService},
    Answer, Api, Body, Params,
};
use crate::{
    ledger::{ServiceName, ServiceOrder},
    refusal::Refusal,
};

/// The routes of services and published ports.
pub(super) fn routes() -> Router<Api> {
    Router::new()
        .route("/v1/services", get(services).post(create))
        .route("/v1/services/{service}", get(service).patch(update).delete(remove))
        .route("/v1/services/{service}/publications", post(publish).delete(unpublish))
        .route("/v1/endpoints/{endpoint}/ports", get(ports))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    network: Option<String>,
}

fn named(service: &str, network: Option<String>) -> Result<ServiceName, Refusal> {
    Ok(ServiceName { service: label(service)?, network })
}

fn label(service: &str) -> Result<Label, Refusal> {
    service.parse().map_err(|error| Refusal::field("service", format!("{error}")))
}

async fn services(
    State(api): State<Api>,
    Params(Place { network }): Params<Place>,
) -> Answer<Vec<ServiceStatus>> {
    let mut services = api.report.services();
    if let Some(network) = network {
        let id = api.report.network(&network).await?.network.id;
        services.retain(|service| service.network_id == id);
    }
    Ok(Json(services))
}

async fn service(
    State(api): State<Api>,
    Path(service): Path<String>,
    Params(Place { network }): Params<Place>,
) -> Answer<ServiceStatus> {
    let name = label(&service)?;
    api.report.service_with_connections(&name, network.as_deref()).await.map(Json)
}

async fn create(
    State(api): State<Api>,
    Body(request): Body<CreateService>,
) -> Result<(StatusCode, Json<ServiceStatus>), Refusal> {
    let key = api.ledger.service(ServiceOrder::Create(request)).await?;
    Ok((StatusCode::CREATED, Json(api.report.service_of(&key)?)))
}

async fn update(
    State(api): State<Api>,
    Path(service): Path<String>,
    Params(Place { network }): Params<Place>,
    Body(update): Body<UpdateService>,
) -> Answer<ServiceStatus> {
    let name = named(&service, network)?;
    let key = api.ledger.service(ServiceOrder::Update { name, update }).await?;
    api.report.service_of(&key).map(Json)
}

async fn remove(
    State(api): State<Api>,
    Path(service): Path<String>,
    Params(Place { network }): Params<Place>,
) -> Answer<()> {
    api.ledger.service(ServiceOrder::Remove(named(&service, network)?)).await?;
    Ok(Json(()))
}

async fn publish(
    State(api): State<Api>,
    Path(service): Path<String>,
    Params(Place { network }): Params<Place>,
    Body(publication): Body<Publication>,
) -> Answer<ServiceStatus> {
    let name = named(&service, network)?;
    let key = api.ledger.service(ServiceOrder::Publish { name, publication }).await?;
    api.report.service_of(&key).map(Json)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Withdrawal {
    network: Option<String>,
    target: u16,
    /// Every port of hosts that leads to the target where absent.
    port: Option<u16>,
    #[serde(default)]
    protocol: Protocol,
}

async fn unpublish(
    State(api): State<Api>,
    Path(service): Path<String>,
    Params(Withdrawal { network, target, port, protocol }): Params<Withdrawal>,
) -> Answer<ServiceStatus> {
    let name = named(&service, network)?;
    let order = ServiceOrder::Unpublish { name, port, target, protocol };
    let key = api.ledger.service(order).await?;
    api.report.service_of(&key).map(Json)
}

async fn ports(State(api): State<Api>, Path(endpoint): Path<String>) -> Answer<Vec<PublishedPort>> {
    api.report.ports(&endpoint).map(Json)
}
