use std::io::Write;

use clap::Args;

use super::{Client, Format, client::encode, output};
use crate::api::types::Resolved;

/// Look a name up as a container would
///
/// Fails with exit code 1 where the name has no address.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft resolve web --network app")]
pub(super) struct Resolve {
    /// A container's name, alias, service or short id
    name: String,
    /// Ask as a container of this network; of every network when absent
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
}

impl Resolve {
    pub(super) async fn run(
        self,
        agent: &Client,
        format: Format,
        out: &mut impl Write,
    ) -> anyhow::Result<()> {
        let mut path = format!("/v1/resolve?name={}", encode(&self.name));
        if let Some(network) = &self.network {
            path.push_str(&format!("&network={}", encode(network)));
        }
        let resolved: Resolved = agent.get(&path).await?;
        match format {
            Format::Json => output::json(out, &resolved)?,
            Format::Table => output::table(
                out,
                ["ADDRESS", "NETWORK", "ENDPOINT", "NODE"],
                resolved.answers.iter().map(|answer| {
                    [
                        answer.address.to_string(),
                        answer.network.to_string(),
                        answer.endpoint.to_string(),
                        answer.node.as_ref().map_or_else(|| "-".into(), ToString::to_string),
                    ]
                }),
            )?,
        }
        Ok(())
    }
}
