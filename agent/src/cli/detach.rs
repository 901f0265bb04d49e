use std::io::Write;

use clap::Args;

use super::{Client, client::encode};

/// Detach an endpoint of this host
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft detach box --network app")]
pub(super) struct Detach {
    /// The endpoint's name or id
    #[arg(value_name = "NAME")]
    endpoint: String,
    /// Its network; needed where the name is on several
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
}

impl Detach {
    pub(super) async fn run(self, agent: &Client, out: &mut impl Write) -> anyhow::Result<()> {
        let mut path = format!("/v1/endpoints/{}", encode(&self.endpoint));
        if let Some(network) = &self.network {
            path.push_str(&format!("?network={}", encode(network)));
        }
        let () = agent.delete(&path).await?;
        writeln!(out, "{}", self.endpoint)?;
        Ok(())
    }
}
