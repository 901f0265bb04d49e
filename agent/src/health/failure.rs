use std::{io, mem, net::SocketAddr, path::PathBuf};

use weft_vxlan::NamespaceError;

use crate::chain::Chain;

/// Why a probe did not succeed, in words for people.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    #[error("no success within {milliseconds} ms")]
    Late { milliseconds: u32 },
    #[error("cannot connect to {address}: {why}")]
    Connect { address: SocketAddr, why: String },
    #[error("{address} does not speak HTTP: {why}")]
    NotHttp { address: SocketAddr, why: String },
    #[error("GET {path} is no path: begin it with a slash")]
    Path { path: String },
    #[error("GET {path} was answered with status {status}, not {wanted}")]
    Status { path: String, status: u16, wanted: String },
    #[error("the answer to GET {path} does not contain {text:?} in its first {limit} bytes")]
    Body { path: String, text: String, limit: usize },
    #[error("the check ended with {status}{}{output}", if output.is_empty() { "" } else { ": " })]
    Exit { status: String, output: String },
    #[error(
        "there is no program {name} in {} on this host, where the programs of checks are: put it there",
        directory.display()
    )]
    NoProgram { name: String, directory: PathBuf },
    #[error("cannot run {}: {why}", program.display())]
    NotRun { program: PathBuf, why: String },
    #[error(
        "its container is no container of Docker's or podman's, and no other engine has checks that weft reads: choose a tcp, http or exec check"
    )]
    NoEngine,
    #[error(
        "its container has no health check in Docker: give it one, or the service another check"
    )]
    NoEngineCheck,
    #[error("Docker calls it unhealthy")]
    Engine,
    #[error("its network namespace cannot be entered: {why}")]
    Namespace { why: String },
}

impl Failure {
    pub(super) fn connect(address: SocketAddr, error: &io::Error) -> Self {
        Self::Connect { address, why: error.to_string() }
    }

    pub(super) fn namespace(error: &NamespaceError) -> Self {
        Self::Namespace { why: Chain(error).to_string() }
    }

    /// Whether both are the same to somebody who looks for the cause.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            // What a program prints may differ each time.
            (Self::Exit { status, .. }, Self::Exit { status: other, .. }) => status == other,
            (Self::Status { status, .. }, Self::Status { status: other, .. }) => status == other,
            _ => mem::discriminant(self) == mem::discriminant(other),
        }
    }
}

impl From<NamespaceError> for Failure {
    fn from(error: NamespaceError) -> Self {
        Self::namespace(&error)
    }
}
