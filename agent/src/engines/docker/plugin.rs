//! Docker's plugin protocol on a unix socket: reads bodies, calls the driver, writes answers.
//!
//! A call that is cut off is tried again by Docker with an empty body, so every body is checked. No
//! call waits for long: Docker itself has no limit, and a container's start would hang.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::post,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::time;

use super::{
    ADDRESS_SPACE,
    driver::Driver,
    protocol::{
        AllocateNetwork, CreateEndpoint, CreateNetwork, DeleteNetwork, EndpointNamed, Join,
        ProgramExternalConnectivity, ReleaseAddress, ReleasePool, RequestAddress, RequestPool,
    },
};
use crate::refusal::{Refusal, RefusalKind};

/// How long one call may take; longer than any wait inside.
const DEADLINE: Duration = Duration::from_secs(12);

/// How far a network of Docker's reaches.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    /// One daemon. The cluster's network reaches other hosts all the same.
    Local,
    /// A swarm, which knows the network on all its nodes by one id and gives out the addresses.
    Swarm,
}

/// All calls.
pub(super) fn router(driver: Arc<Driver>, scope: Scope) -> Router {
    Router::new()
        .route("/{method}", post(call))
        .fallback(no_such_method)
        .with_state((driver, scope))
}

async fn call(
    State((driver, scope)): State<(Arc<Driver>, Scope)>,
    Path(method): Path<String>,
    body: Bytes,
) -> Response {
    let answered = time::timeout(DEADLINE, answer(&driver, scope, &method, &body)).await;
    let refusal = match answered {
        Ok(Ok(Some(value))) => return Json(value).into_response(),
        Ok(Ok(None)) => return unimplemented(&method),
        Ok(Err(refusal)) => refusal,
        Err(_) => Refusal::new(
            RefusalKind::Unavailable,
            format!("{method} was not done within {DEADLINE:?}: see weft status, then try again"),
        ),
    };
    tracing::warn!(%method, %refusal, "a call of Docker's is refused");
    // With this status Docker shows the text as it is. Network drivers and IPAM drivers name the field
    // differently.
    Json(json!({"Err": refusal.message, "Error": refusal.message})).into_response()
}

async fn no_such_method() -> Response {
    unimplemented("what is not a POST of one method")
}

/// Docker takes this status for a method that the plugin does without.
fn unimplemented(method: &str) -> Response {
    let problem = json!({"Err": format!("weft does not implement {method}")});
    (StatusCode::NOT_FOUND, Json(problem)).into_response()
}

/// Makes one call; nothing if there is none of that name.
async fn answer(
    driver: &Driver,
    scope: Scope,
    method: &str,
    body: &[u8],
) -> Result<Option<Value>, Refusal> {
    match method {
        "Plugin.Activate" if scope == Scope::Swarm => {
            written(json!({"Implements": ["NetworkDriver"]}))
        }
        "Plugin.Activate" => written(json!({"Implements": ["NetworkDriver", "IpamDriver"]})),

        "NetworkDriver.GetCapabilities" => {
            let reach = if scope == Scope::Local { "local" } else { "global" };
            written(json!({"Scope": reach, "ConnectivityScope": "global"}))
        }
        "NetworkDriver.CreateNetwork" if scope == Scope::Swarm => {
            done(driver.create_swarm_network(read::<CreateNetwork>(method, body)?).await)
        }
        "NetworkDriver.AllocateNetwork" if scope == Scope::Swarm => {
            let options = driver.allocate_network(read::<AllocateNetwork>(method, body)?).await?;
            written(json!({"Options": options}))
        }
        "NetworkDriver.FreeNetwork" if scope == Scope::Swarm => {
            done(driver.free_network(read::<DeleteNetwork>(method, body)?).await)
        }
        "NetworkDriver.CreateNetwork" => {
            done(driver.create_network(read::<CreateNetwork>(method, body)?).await)
        }
        "NetworkDriver.DeleteNetwork" => {
            done(driver.delete_network(read::<DeleteNetwork>(method, body)?).await)
        }
        "NetworkDriver.AllocateNetwork" | "NetworkDriver.FreeNetwork" => Err(Refusal::new(
            RefusalKind::Invalid,
            "weft's networks are of local scope, and reach all hosts all the same: create them without --scope swarm",
        )),
        "NetworkDriver.CreateEndpoint" => {
            written(driver.create_endpoint(read::<CreateEndpoint>(method, body)?).await?)
        }
        "NetworkDriver.DeleteEndpoint" => {
            done(driver.delete_endpoint(read::<EndpointNamed>(method, body)?).await)
        }
        "NetworkDriver.EndpointOperInfo" => {
            read::<EndpointNamed>(method, body)?;
            written(json!({"Value": {}}))
        }
        "NetworkDriver.Join" => written(driver.join(read::<Join>(method, body)?).await?),
        "NetworkDriver.Leave" => done(driver.leave(read::<EndpointNamed>(method, body)?).await),
        "NetworkDriver.ProgramExternalConnectivity" => {
            done(driver.program_ports(read::<ProgramExternalConnectivity>(method, body)?).await)
        }
        "NetworkDriver.RevokeExternalConnectivity" => {
            done(driver.revoke_ports(read::<EndpointNamed>(method, body)?).await)
        }
        // Swarm tells of its nodes; weft knows its own.
        "NetworkDriver.DiscoverNew" | "NetworkDriver.DiscoverDelete" => written(json!({})),
        "NetworkDriver.GwAllocCheck" => written(json!({"SkipIPv4": false, "SkipIPv6": false})),

        "IpamDriver.GetCapabilities" => {
            written(json!({"RequiresMACAddress": false, "RequiresRequestReplay": false}))
        }
        "IpamDriver.GetDefaultAddressSpaces" => written(json!({
            "LocalDefaultAddressSpace": ADDRESS_SPACE,
            "GlobalDefaultAddressSpace": ADDRESS_SPACE,
        })),
        "IpamDriver.RequestPool" => {
            written(driver.request_pool(read::<RequestPool>(method, body)?).await?)
        }
        "IpamDriver.ReleasePool" => {
            done(driver.release_pool(read::<ReleasePool>(method, body)?).await)
        }
        "IpamDriver.RequestAddress" => {
            written(driver.request_address(read::<RequestAddress>(method, body)?).await?)
        }
        "IpamDriver.ReleaseAddress" => {
            done(driver.release_address(read::<ReleaseAddress>(method, body)?).await)
        }
        _ => Ok(None),
    }
}

fn read<T: DeserializeOwned>(method: &str, body: &[u8]) -> Result<T, Refusal> {
    let mut json = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let place = match error.path().to_string().as_str() {
            "." => "its body".to_owned(),
            path => path.to_owned(),
        };
        Refusal::new(
            RefusalKind::Invalid,
            format!("{method}: {place} does not fit: {}", error.inner()),
        )
    })
}

fn written(answer: impl Serialize) -> Result<Option<Value>, Refusal> {
    Ok(Some(serde_json::to_value(answer).expect("an answer is plain data")))
}

fn done(outcome: Result<(), Refusal>) -> Result<Option<Value>, Refusal> {
    outcome.map(|()| Some(json!({})))
}
