use std::collections::BTreeMap;

use weft_model::EndpointId;

/// The engine's containers behind this host's endpoints.
pub type EngineContainers = BTreeMap<EndpointId, EngineContainer>;

/// What an engine that tells of itself says of a container.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EngineContainer {
    /// As the engine knows it.
    pub id: String,
    pub health: EngineHealth,
}

/// What an engine's own check of a container has found.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum EngineHealth {
    /// It has none.
    #[default]
    Unchecked,
    Starting,
    Healthy,
    Unhealthy,
}

impl EngineHealth {
    /// Reads Docker's word for it.
    pub(crate) fn from_docker(status: &str) -> Self {
        match status {
            "starting" => Self::Starting,
            "healthy" => Self::Healthy,
            "unhealthy" => Self::Unhealthy,
            _ => Self::Unchecked,
        }
    }
}
