//! One `GET`, and what is expected of its answer.

use std::net::SocketAddr;

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use memchr::memmem;
use tokio::io::{AsyncRead, AsyncWrite};

use super::failure::Failure;

/// What is asked for, and which answer is a success.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) path: &'a str,
    /// From 200 to 399 where absent.
    pub(super) status: Option<u16>,
    /// What the body must contain.
    pub(super) body: Option<&'a str>,
}

/// Asks over `stream`, which leads to `address`.
///
/// # Errors
///
/// The answer is not the one wanted, or there is none.
pub(super) async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send,
    address: SocketAddr,
    wanted: Wanted<'_>,
) -> Result<(), Failure> {
    let not_http = |error: hyper::Error| Failure::NotHttp { address, why: error.to_string() };
    let request = Request::get(wanted.path)
        .header("host", address.to_string())
        .header("user-agent", concat!("weft/", env!("CARGO_PKG_VERSION")))
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|_| Failure::Path { path: wanted.path.to_owned() })?;
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(BODY_LIMIT)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(not_http)?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(not_http)?;
        wanted.judge_status(answer.status().as_u16())?;
        match wanted.body {
            Some(text) => {
                let body = beginning(answer.into_body()).await.map_err(not_http)?;
                wanted.judge_body(&body, text)
            }
            None => Ok(()),
        }
    };
    // The connection makes progress only while it is polled.
    tokio::pin!(connection, exchange);
    let mut open = true;
    loop {
        tokio::select! {
            judged = &mut exchange => return judged,
            _ = &mut connection, if open => open = false,
        }
    }
}

impl Wanted<'_> {
    fn judge_status(&self, status: u16) -> Result<(), Failure> {
        let (good, wanted) = match self.status {
            Some(only) => (status == only, only.to_string()),
            None => ((200..400).contains(&status), "200 to 399".to_owned()),
        };
        let path = self.path.to_owned();
        if good { Ok(()) } else { Err(Failure::Status { path, status, wanted }) }
    }

    fn judge_body(&self, body: &[u8], text: &str) -> Result<(), Failure> {
        match memmem::find(body, text.as_bytes()) {
            Some(_) => Ok(()),
            None => Err(Failure::Body {
                path: self.path.to_owned(),
                text: text.to_owned(),
                limit: BODY_LIMIT,
            }),
        }
    }
}

/// The first bytes of a body.
async fn beginning(mut body: Incoming) -> Result<Vec<u8>, hyper::Error> {
    let mut bytes = Vec::new();
    while bytes.len() < BODY_LIMIT {
        let Some(frame) = body.frame().await else { break };
        if let Ok(data) = frame?.into_data() {
            let room = BODY_LIMIT - bytes.len();
            bytes.extend_from_slice(&data[..data.len().min(room)]);
        }
    }
    Ok(bytes)
}

/// Bytes of a body that are looked at.
const BODY_LIMIT: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirection_is_a_success_unless_another_status_is_wanted() {
        let any = Wanted { path: "/", status: None, body: None };
        let only = Wanted { status: Some(204), ..any };
        for (status, by_any, by_only) in
            [(200, true, false), (204, true, true), (301, true, false), (404, false, false)]
        {
            assert_eq!(any.judge_status(status).is_ok(), by_any, "{status}");
            assert_eq!(only.judge_status(status).is_ok(), by_only, "{status}");
        }
    }

    #[test]
    fn a_body_must_contain_the_text() {
        let wanted = Wanted { path: "/", status: None, body: Some("ready") };
        assert!(wanted.judge_body(b"all is ready now", "ready").is_ok());
        let missing = wanted.judge_body(b"starting", "ready").unwrap_err();
        assert!(missing.to_string().contains("\"ready\""), "{missing}");
    }
}
