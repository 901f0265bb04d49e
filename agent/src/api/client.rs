//! Speaks JSON over HTTP to the agent's unix socket.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::types::Problem;

/// The agent behind one socket. Each call opens a connection of its own.
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    /// Where the agent's sockets are.
    pub(crate) fn directory(&self) -> &Path {
        self.socket.parent().unwrap_or_else(|| Path::new("/"))
    }

    pub(crate) async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    pub(crate) async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, ClientError> {
        let body = serde_json::to_vec(body).expect("a request is plain data");
        self.call(Method::POST, path, body.into()).await
    }

    pub(crate) async fn patch<A: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, ClientError> {
        let body = serde_json::to_vec(body).expect("a request is plain data");
        self.call(Method::PATCH, path, body.into()).await
    }

    pub(crate) async fn delete<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    async fn call<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<A, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let (status, body) = exchange(stream, method, path, body).await?;
        if !status.is_success() {
            let problem = serde_json::from_slice(&body).unwrap_or_else(|_| Problem {
                error: format!("{status}: {}", String::from_utf8_lossy(&body)),
                field: None,
            });
            return Err(ClientError::Refused { status, problem });
        }
        serde_json::from_slice(&body).map_err(ClientError::Answer)
    }
}

async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), ClientError> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "weft")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .expect("paths are percent-encoded by their makers");
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::Broken)?;
    let send = async {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        Ok((status, body))
    };
    // The connection makes progress only while it is polled; it ends with the answer.
    tokio::pin!(connection, send);
    let mut open = true;
    loop {
        tokio::select! {
            answer = &mut send => return answer.map_err(ClientError::Broken),
            _ = &mut connection, if open => open = false,
        }
    }
}

/// Percent-encodes one path segment or query value (RFC 3986 §2.3).
pub(crate) fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error(
        "no agent answers at {}: start it (systemctl start weft, or weft agent), or name its socket with --socket",
        socket.display()
    )]
    Unreachable { socket: PathBuf, source: io::Error },
    #[error("{}", .problem.error)]
    Refused { status: StatusCode, problem: Problem },
    #[error("the agent broke off the answer; see its log, then try again")]
    Broken(#[source] hyper::Error),
    #[error("the agent's answer is not understood: agent and command are of different versions")]
    Answer(#[source] serde_json::Error),
}

impl ClientError {
    /// The status and the words of a refusal; none where the agent did not refuse.
    pub(crate) fn refusal(&self) -> Option<(StatusCode, &Problem)> {
        match self {
            Self::Refused { status, problem } => Some((*status, problem)),
            Self::Unreachable { .. } | Self::Broken(_) | Self::Answer(_) => None,
        }
    }

    /// Whether what was named does not exist.
    pub(crate) fn is_missing(&self) -> bool {
        self.refusal().is_some_and(|(status, _)| status == StatusCode::NOT_FOUND)
    }

    /// Whether it does not fit what there is.
    pub(crate) fn is_conflict(&self) -> bool {
        self.refusal().is_some_and(|(status, _)| status == StatusCode::CONFLICT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_cannot_break_out_of_its_place() {
        assert_eq!(encode("a/b?c d"), "a%2Fb%3Fc%20d");
        assert_eq!(encode("shop_web-1.x~"), "shop_web-1.x~");
    }
}
