use std::io::Write;

use clap::Args;

use super::{Client, Format, output};
use crate::api::types::EndpointStatus;

/// List the endpoints of the cluster
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
    pub(super) async fn run(
        self,
        agent: &Client,
        format: Format,
        out: &mut impl Write,
    ) -> anyhow::Result<()> {
        let mut endpoints: Vec<EndpointStatus> = agent.get("/v1/endpoints").await?;
        endpoints.retain(|endpoint| {
            let is = |wanted: &Option<String>, name: &str, id: String| {
                wanted.as_ref().is_none_or(|wanted| *wanted == name || *wanted == id)
            };
            is(&self.network, endpoint.network.as_str(), endpoint.network_id.to_string())
                && is(&self.node, endpoint.node.as_str(), endpoint.node_id.to_string())
        });
        match format {
            Format::Json => output::json(out, &endpoints)?,
            Format::Table => output::table(
                out,
                ["ENDPOINT", "NAME", "NETWORK", "ADDRESS", "MAC", "NODE", "STATE"],
                endpoints.iter().map(row),
            )?,
        }
        Ok(())
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
