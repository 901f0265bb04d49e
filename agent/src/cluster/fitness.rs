//! Whether an endpoint gets new connections of a service.

use weft_gossip::{Liveness, Member};
use weft_model::{Condition, Endpoint, Label, Service, Verdict};

/// Whether a backend gets new connections, and why it does not.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BackendState {
    Ready,
    /// The service has a check, and no verdict has come yet.
    Starting,
    /// With the check's reason, for people.
    Unhealthy(String),
    Draining,
    /// Its node is not heard.
    Unreachable,
}

impl BackendState {
    pub fn is_ready(&self) -> bool {
        *self == Self::Ready
    }

    /// The word in status and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Starting => "starting",
            Self::Unhealthy(_) => "unhealthy",
            Self::Draining => "draining",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A check that is declared fails closed: without a verdict there are no connections.
pub(super) fn state(
    member: &Member,
    endpoint: &Endpoint,
    name: &Label,
    service: Option<&Service>,
) -> BackendState {
    match member.liveness {
        Liveness::Alive => fitness(condition(member, endpoint), name, service),
        Liveness::Suspect | Liveness::Left => BackendState::Unreachable,
    }
}

pub(super) fn fitness(
    condition: Option<&Condition>,
    name: &Label,
    service: Option<&Service>,
) -> BackendState {
    let checked = service.is_some_and(|service| service.check.is_some());
    let verdict = condition.and_then(|condition| condition.verdicts.get(name));
    match verdict {
        _ if condition.is_some_and(|condition| condition.draining) => BackendState::Draining,
        _ if !checked => BackendState::Ready,
        None => BackendState::Starting,
        Some(Verdict::Healthy) => BackendState::Ready,
        Some(Verdict::Unhealthy(reason)) => BackendState::Unhealthy(reason.clone()),
    }
}

pub(super) fn condition<'a>(member: &'a Member, endpoint: &Endpoint) -> Option<&'a Condition> {
    member.conditions.get(&endpoint.network)?.get(&endpoint.id)
}
