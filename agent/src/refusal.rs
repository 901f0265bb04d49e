/// Why a request is not met: what is wrong, and what to do about it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub kind: RefusalKind,
    /// The field of the request that is to blame, where one is.
    pub field: Option<&'static str>,
    pub message: String,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RefusalKind {
    /// The request itself is wrong.
    Invalid,
    /// What it names does not exist.
    Missing,
    /// It does not fit what there is.
    Conflict,
    /// It may work later: somebody cannot be reached, or something is used up.
    Unavailable,
    /// This host could not do it.
    Failed,
}

impl Refusal {
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self { kind, field: None, message: message.into() }
    }

    pub fn field(field: &'static str, message: impl Into<String>) -> Self {
        Self { kind: RefusalKind::Invalid, field: Some(field), message: message.into() }
    }

    pub fn conflict(field: &'static str, message: impl Into<String>) -> Self {
        Self { kind: RefusalKind::Conflict, field: Some(field), message: message.into() }
    }

    pub fn missing(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Missing, message)
    }
}

/// Refuses a request because of one of its fields.
pub(crate) fn refuse<T>(field: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::field(field, message))
}
