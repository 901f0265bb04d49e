use anyhow::Context as _;
use clap::Args;

use serde_json::{Value, json};

use super::{
    Client,
    output::{self, Output},
    run::UNATTACHED,
    unattached::Unattached,
};
use crate::api::types::{EndpointStatus, NodeStatus};

/// List the endpoints of the cluster, and what `weft run` has put on no network of its own here
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft ps --network app")]
pub(super) struct Ps {
    /// Only those of this network
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// Only those of this node
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

impl Ps {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let is = |wanted: &Option<String>, name: &str, id: String| {
            wanted.as_ref().is_none_or(|wanted| *wanted == name || *wanted == id)
        };
        let mut endpoints: Vec<EndpointStatus> = agent.get("/v1/endpoints").await?;
        endpoints.retain(|endpoint| {
            is(&self.network, endpoint.network.as_str(), endpoint.network_id.to_string())
                && is(&self.node, endpoint.node.as_str(), endpoint.node_id.to_string())
        });
        let mut others = Unattached::all(&agent.directory().join(UNATTACHED));
        others.retain(|other| is(&self.network, &other.network, String::new()));
        let mut others: Vec<(Unattached, NodeStatus)> = match others.is_empty() {
            true => Vec::new(),
            false => {
                let nodes: Vec<NodeStatus> = agent.get("/v1/nodes").await?;
                let this =
                    nodes.into_iter().find(|node| node.this).context("no node is this one")?;
                others.into_iter().map(|other| (other, this.clone())).collect()
            }
        };
        others.retain(|(_, node)| is(&self.node, node.name.as_str(), node.id.to_string()));
        let all = endpoints.iter().map(|endpoint| json!(endpoint));
        let all: Vec<_> = all.chain(others.iter().map(described)).collect();
        Ok(out.show(&all, |out| {
            out.table(
                ["ENDPOINT", "NAME", "NETWORK", "ADDRESS", "MAC", "NODE", "STATE"],
                endpoints.iter().map(row).chain(others.iter().map(row_of_other)),
            )
        })?)
    }
}

fn row(endpoint: &EndpointStatus) -> [String; 7] {
    [
        endpoint.id.short(),
        endpoint.name.to_string(),
        endpoint.network.to_string(),
        output::list(&endpoint.addresses),
        endpoint.mac.to_string(),
        endpoint.node.to_string(),
        if endpoint.reachable { "up" } else { "hidden" }.into(),
    ]
}

fn row_of_other((other, node): &(Unattached, NodeStatus)) -> [String; 7] {
    let (name, network) = (other.name.to_string(), other.network.clone());
    ["-".into(), name, network, "-".into(), "-".into(), node.name.to_string(), "up".into()]
}

/// As an endpoint, as far as it is one.
fn described((other, node): &(Unattached, NodeStatus)) -> Value {
    json!({
        "name": other.name,
        "network": other.network,
        "node": node.name,
        "node_id": node.id,
        "pid": other.pid,
        "addresses": [],
        "aliases": [],
        "labels": {},
        "reachable": true,
    })
}
