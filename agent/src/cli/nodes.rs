use clap::Args;

use super::{Client, output::Output};
use crate::api::types::{NodeLiveness, NodeStatus};

/// List the nodes of the cluster
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft nodes --format json")]
pub(super) struct Nodes {}

impl Nodes {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let nodes: Vec<NodeStatus> = agent.get("/v1/nodes").await?;
        Ok(out.show_all(&nodes, HEADINGS, row)?)
    }
}

const HEADINGS: [&str; 9] =
    ["NODE", "NAME", "STATE", "ADDRESS", "VTEP", "RTT", "ENCRYPTION", "ENDPOINTS", "VERSION"];

fn row(node: &NodeStatus) -> [String; 9] {
    [
        node.id.short(),
        format!("{}{}", node.name, if node.this { " *" } else { "" }),
        state(node.state).into(),
        node.address.to_string(),
        node.vtep.to_string(),
        node.rtt_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.2} ms")),
        if node.sealing.is_some() { "yes" } else { "no" }.into(),
        node.endpoints.to_string(),
        node.version.clone(),
    ]
}

pub(super) fn state(state: NodeLiveness) -> &'static str {
    match state {
        NodeLiveness::Alive => "alive",
        NodeLiveness::Suspect => "suspect",
        NodeLiveness::Left => "left",
    }
}
