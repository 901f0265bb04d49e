use clap::Args;

use super::{
    Client,
    client::encode,
    output::{self, Output},
};
use crate::api::types::{Resolved, ResolvedAddress};

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
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let mut path = format!("/v1/resolve?name={}", encode(&self.name));
        if let Some(network) = &self.network {
            path.push_str(&format!("&network={}", encode(network)));
        }
        let resolved: Resolved = agent.get(&path).await?;
        let rows = resolved.answers.iter().map(row);
        Ok(out.show(&resolved, |out| out.table(["ADDRESS", "NETWORK", "ENDPOINT", "NODE"], rows))?)
    }
}

fn row(answer: &ResolvedAddress) -> [String; 4] {
    [
        answer.address.to_string(),
        answer.network.to_string(),
        answer.endpoint.to_string(),
        output::list(&answer.node),
    ]
}
