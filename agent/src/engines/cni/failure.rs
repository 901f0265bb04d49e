//! Errors as the CNI specification wants them.

use serde_json::{Value, json};

use crate::{
    api::client::ClientError,
    chain::Chain,
    engines::{interior::InteriorError, wanted::WantedError},
};

/// What a call did not do, and why.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) message: String,
    /// What an operator may want beyond the message; may be empty.
    pub(super) details: String,
}

/// The codes of CNI 1.1 (section *Error*), and from 100 on our own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Code {
    Version = 1,
    UnsupportedField = 2,
    UnknownContainer = 3,
    Environment = 4,
    Io = 5,
    Decode = 6,
    Configuration = 7,
    TryAgain = 11,
    NotAvailable = 50,
    LimitedConnectivity = 51,
    /// An address, a MAC address, a name, an interface or a port is in use already.
    Conflict = 100,
    /// CHECK found something else than ADD had answered.
    Changed = 101,
}

impl Failure {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    pub(super) fn to_json(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code as u32,
            "msg": self.message,
            "details": self.details,
        })
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let code = match error.refusal() {
            None => Code::TryAgain,
            Some((status, problem)) => match (status.as_u16(), problem.field.as_deref()) {
                (400, Some("sandbox")) => Code::Environment,
                (409, Some("network")) => Code::Configuration,
                (409, _) => Code::Conflict,
                (400 | 404 | 405, _) => Code::Configuration,
                (503, _) => Code::TryAgain,
                (_, _) => Code::Io,
            },
        };
        Self::new(code, Chain(&error).to_string())
    }
}

impl From<WantedError> for Failure {
    fn from(error: WantedError) -> Self {
        match error {
            WantedError::Agent(error) => error.into(),
            WantedError::Missing { .. }
            | WantedError::Differs { .. }
            | WantedError::Name { .. } => Self::new(Code::Configuration, Chain(&error).to_string()),
        }
    }
}

impl From<InteriorError> for Failure {
    fn from(error: InteriorError) -> Self {
        let code = match &error {
            InteriorError::Namespace(weft_vxlan::NamespaceError::Missing { .. }) => {
                Code::UnknownContainer
            }
            InteriorError::Namespace(_) => Code::Environment,
            InteriorError::Unreadable { .. } => Code::Io,
        };
        Self::new(code, format!("CNI_NETNS: {}", Chain(&error)))
    }
}
