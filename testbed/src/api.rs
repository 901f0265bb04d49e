use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::Context as _;
use serde_json::Value;

use crate::Host;

/// What the agent's API answered.
#[derive(Clone, Debug)]
pub struct ApiAnswer {
    pub status: u16,
    /// `null` where there was none.
    pub body: Value,
}

/// Sends one request to the API socket of `host`, without the command line between.
///
/// # Errors
///
/// Nobody listens, or what answers does not speak HTTP and JSON.
pub fn api_call(host: &Host, method: &str, path: &str, body: &str) -> anyhow::Result<ApiAnswer> {
    exchange(host, "/run/weft/weft.sock", method, path, body)
}

/// Calls the agent's plugin as Docker does.
///
/// # Errors
///
/// As [`api_call`].
pub fn plugin_call(host: &Host, method: &str, body: &str) -> anyhow::Result<ApiAnswer> {
    exchange(host, "/run/docker/plugins/weft.sock", "POST", &format!("/{method}"), body)
}

fn exchange(
    host: &Host,
    socket: &str,
    method: &str,
    path: &str,
    body: &str,
) -> anyhow::Result<ApiAnswer> {
    let socket = format!("/proc/{}/root{socket}", host.pid()?);
    let mut stream = UnixStream::connect(&socket).with_context(|| format!("nobody at {socket}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: weft\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("{text:?}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let body = match body.trim() {
        "" => Value::Null,
        text => serde_json::from_str(text).with_context(|| format!("no JSON: {text:?}"))?,
    };
    Ok(ApiAnswer { status: status.with_context(|| format!("no status in {head:?}"))?, body })
}
