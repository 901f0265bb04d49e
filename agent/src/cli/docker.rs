use std::io::Write;

use clap::{Args, Subcommand};

use super::{Client, Format, network::Create};

/// Work with Docker on all hosts of the cluster
#[derive(Args, Debug)]
pub(super) struct Docker {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create networks in Docker on all hosts
    Network(Network),
}

#[derive(Args, Debug)]
struct Network {
    #[command(subcommand)]
    command: NetworkCommand,
}

#[derive(Debug, Subcommand)]
enum NetworkCommand {
    /// Create a network on all hosts of the cluster, in their Docker too, and print its id
    ///
    /// Hosts that join later get it as well. `weft network rm` removes it from every Docker.
    #[command(after_help = "Example:
  weft docker network create app --subnet 10.40.0.0/24
  docker run --network app --name web nginx")]
    Create(Create),
}

impl Docker {
    pub(super) async fn run(
        self,
        agent: &Client,
        format: Format,
        out: &mut impl Write,
    ) -> anyhow::Result<()> {
        let Command::Network(Network { command: NetworkCommand::Create(create) }) = self.command;
        create.run("/v1/docker/networks", agent, format, out).await
    }
}
