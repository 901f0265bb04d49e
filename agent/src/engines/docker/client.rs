//! A small client of Docker's API: JSON over HTTP on its unix socket.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::BytesMut;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time};
use tokio_util::task::TaskTracker;

use super::protocol::EngineId;

/// Docker's daemon behind one socket. Each call opens a connection of its own.
#[derive(Clone, Debug)]
pub(super) struct Client {
    socket: PathBuf,
    tracker: TaskTracker,
}

/// `GET /networks/ID`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NetworkInspect {
    pub(super) name: String,
    /// By container id, or by `ep-` and endpoint id while the container is being started.
    #[serde(default)]
    pub(super) containers: BTreeMap<String, Member>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Member {
    pub(super) name: String,
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: EngineId,
}

/// `GET /containers/ID/json`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ContainerInspect {
    pub(super) id: String,
    /// With a slash before it.
    pub(super) name: String,
    pub(super) config: ContainerConfig,
    pub(super) network_settings: NetworkSettings,
    #[serde(default)]
    pub(super) state: ContainerState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ContainerState {
    /// Absent where the container has no health check.
    #[serde(default)]
    pub(super) health: Option<Health>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Health {
    pub(super) status: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ContainerConfig {
    #[serde(default)]
    pub(super) labels: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NetworkSettings {
    #[serde(default)]
    pub(super) networks: BTreeMap<String, EndpointSettings>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct EndpointSettings {
    #[serde(rename = "EndpointID", default)]
    pub(super) endpoint_id: String,
    #[serde(default)]
    pub(super) aliases: Option<Vec<String>>,
    /// From API 1.44 on.
    #[serde(rename = "DNSNames", default)]
    pub(super) dns_names: Option<Vec<String>>,
}

/// One line of `GET /events`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Event {
    #[serde(rename = "Type")]
    pub(super) kind: String,
    pub(super) action: String,
    pub(super) actor: Actor,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Actor {
    #[serde(rename = "ID")]
    pub(super) id: String,
    #[serde(default)]
    pub(super) attributes: BTreeMap<String, String>,
}

impl Client {
    /// Connections are driven on `tracker`; each ends with its last answer.
    pub(super) fn new(socket: &Path, tracker: TaskTracker) -> Self {
        Self { socket: socket.into(), tracker }
    }

    /// Looks whether a daemon answers.
    pub(super) async fn ping(&self) -> Result<(), ClientError> {
        let connected = time::timeout(DEADLINE, self.connect()).await;
        connected.map_err(|_| ClientError::Late { path: "/_ping".into() })?.map(drop)
    }

    pub(super) async fn network(&self, id: &EngineId) -> Result<NetworkInspect, ClientError> {
        self.call(Method::GET, &format!("/networks/{}", id.as_str()), None).await
    }

    pub(super) async fn container(&self, id: &str) -> Result<ContainerInspect, ClientError> {
        self.call(Method::GET, &format!("/containers/{id}/json"), None).await
    }

    pub(super) async fn create_network(&self, body: &impl Serialize) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).expect("a request is plain data");
        let _: serde_json::Value =
            self.call(Method::POST, "/networks/create", Some(body.into())).await?;
        Ok(())
    }

    pub(super) async fn remove_network(&self, id: &EngineId) -> Result<(), ClientError> {
        let path = format!("/networks/{}", id.as_str());
        time::timeout(DEADLINE, async {
            let mut connection = self.connect().await?;
            let answer = connection.exchange(Method::DELETE, &path, None).await?;
            accept(answer).await.map(drop)
        })
        .await
        .map_err(|_| ClientError::Late { path: path.clone() })?
    }

    /// Stops a container, with the signal and the patience that it was made with. Succeeds where it
    /// has stopped already.
    pub(super) async fn stop_container(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("/containers/{id}/stop");
        time::timeout(STOP_DEADLINE, async {
            let mut connection = self.connect().await?;
            let answer = connection.exchange(Method::POST, &path, None).await?;
            match answer.status() {
                StatusCode::NOT_MODIFIED => Ok(()),
                _ => accept(answer).await.map(drop),
            }
        })
        .await
        .map_err(|_| ClientError::Late { path: path.clone() })?
    }

    /// Follows what happens to containers and networks from now on.
    pub(super) async fn events(&self) -> Result<Events, ClientError> {
        // {"type":["container","network"]}
        let path = "/events?filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%5D%7D";
        let connected = time::timeout(DEADLINE, async {
            let mut connection = self.connect().await?;
            let answer = connection.exchange(Method::GET, path, None).await?;
            Ok((accept_head(answer).await?, connection))
        });
        let (answer, connection) =
            connected.await.map_err(|_| ClientError::Late { path: path.into() })??;
        Ok(Events { body: answer.into_body(), pending: BytesMut::new(), _connection: connection })
    }

    async fn call<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<A, ClientError> {
        let answered = time::timeout(DEADLINE, async {
            let mut connection = self.connect().await?;
            let answer = connection.exchange(method, path, body).await?;
            accept(answer).await
        });
        let bytes = answered.await.map_err(|_| ClientError::Late { path: path.into() })??;
        serde_json::from_slice(&bytes)
            .map_err(|source| ClientError::Answer { path: path.into(), source })
    }

    /// Connects, and agrees on the version: daemons refuse ones that are too old or too new.
    async fn connect(&self) -> Result<Connection, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::Broken)?;
        self.tracker.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to Docker has ended");
            }
        });
        let mut connection = Connection { sender, version: None };
        let pong = connection.exchange(Method::HEAD, "/_ping", None).await?;
        let version = pong.headers().get("api-version").and_then(|value| value.to_str().ok());
        let version =
            version.ok_or_else(|| ClientError::NotDocker { socket: self.socket.clone() })?;
        connection.version = Some(negotiate(version).to_owned());
        Ok(connection)
    }
}

/// The version to ask for: the daemon's newest, but none that came after this client.
fn negotiate(daemon: &str) -> &str {
    let number = |text: &str| -> Option<(u32, u32)> {
        let (major, minor) = text.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    if number(daemon) > number(NEWEST) { NEWEST } else { daemon }
}

/// One connection to the daemon.
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    version: Option<String>,
}

impl Connection {
    async fn exchange(
        &mut self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Response<Incoming>, ClientError> {
        let version = self.version.as_ref().map(|version| format!("/v{version}"));
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", version.unwrap_or_default()))
            .header("host", "docker")
            .header("content-type", "application/json")
            .body(Full::new(body.unwrap_or_default()))
            .expect("paths are made of identifiers");
        self.sender.ready().await.map_err(ClientError::Broken)?;
        self.sender.send_request(request).await.map_err(ClientError::Broken)
    }
}

/// Events as they come, one JSON value a line.
pub(super) struct Events {
    body: Incoming,
    pending: BytesMut,
    _connection: Connection,
}

impl Events {
    /// Waits for the next one. Cancel-safe.
    ///
    /// # Errors
    ///
    /// The daemon has gone.
    pub(super) async fn next(&mut self) -> Result<Event, ClientError> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line = self.pending.split_to(end + 1);
                match serde_json::from_slice(&line) {
                    Ok(event) => return Ok(event),
                    Err(_) => continue,
                }
            }
            let frame = self.body.frame().await.ok_or(ClientError::Ended)?;
            if let Ok(data) = frame.map_err(ClientError::Broken)?.into_data() {
                self.pending.extend_from_slice(&data);
            }
        }
    }
}

async fn accept(answer: Response<Incoming>) -> Result<Bytes, ClientError> {
    let answer = accept_head(answer).await?;
    Ok(answer.into_body().collect().await.map_err(ClientError::Broken)?.to_bytes())
}

async fn accept_head(answer: Response<Incoming>) -> Result<Response<Incoming>, ClientError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let body = answer.into_body().collect().await.map_err(ClientError::Broken)?.to_bytes();
    let message = serde_json::from_slice::<Problem>(&body).map_or_else(
        |_| String::from_utf8_lossy(&body).trim().to_owned(),
        |problem| problem.message,
    );
    Err(ClientError::Refused { status, message })
}

#[derive(Deserialize)]
struct Problem {
    message: String,
}

/// Why Docker could not be asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("no daemon answers at {}: start Docker, or change docker_socket", socket.display())]
    Unreachable { socket: PathBuf, source: io::Error },
    #[error("what answers at {} is not Docker: change docker_socket", socket.display())]
    NotDocker { socket: PathBuf },
    #[error("Docker refused ({status}): {message}")]
    Refused { status: StatusCode, message: String },
    #[error("Docker did not answer {path} in time")]
    Late { path: String },
    #[error("Docker broke off the answer")]
    Broken(#[source] hyper::Error),
    #[error("Docker ended the stream of events")]
    Ended,
    #[error("Docker's answer to {path} is not understood")]
    Answer { path: String, source: serde_json::Error },
}

impl ClientError {
    /// Whether what was asked for is not there.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { status: StatusCode::NOT_FOUND, .. })
    }
}

/// The newest version of the API whose answers this client was tried with.
const NEWEST: &str = "1.45";
/// How long one call may take. An inspection waits until the container's start is done.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a container may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_spoken_to_in_its_own_version_unless_that_is_newer_than_ours() {
        for (daemon, spoken) in
            [("1.41", "1.41"), ("1.45", "1.45"), ("1.52", "1.45"), ("2.0", "1.45")]
        {
            assert_eq!(negotiate(daemon), spoken);
        }
    }
}
