use serde::{Deserialize, Serialize};
use weft_model::{EndpointId, Label, NodeId};

/// `POST /v1/drain`, `POST /v1/drain/undo`, `POST /v1/drain/stop`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// An endpoint of this host by name or id, a container of this host's Docker by id, or this node
    /// by name or id.
    pub target: String,
    /// Of an endpoint's networks only this one.
    #[serde(default)]
    pub network: Option<String>,
    /// Refuses what weft does not know how to stop.
    #[serde(default)]
    pub to_stop: bool,
}

/// How far the draining of an endpoint has got: `GET /v1/drain` lists those of this host.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DrainStatus {
    pub id: EndpointId,
    pub name: Label,
    pub network: Label,
    /// The nodes that may still send it new connections.
    pub waits_for: Vec<WaitedFor>,
    /// TCP connections to it that are open.
    pub connections: usize,
}

#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct WaitedFor {
    pub node: String,
    pub node_id: NodeId,
}
