use std::path::PathBuf;

use clap::{Args, Subcommand};
use tokio::{io, net::UnixStream};
use tokio_util::task::TaskTracker;

use super::{Client, network::Create, output::Output};
use crate::api;

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
    Relay(Relay),
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

/// Pass on what Docker asks of a plugin that it runs itself to the agent of its host
#[derive(Args, Debug)]
#[command(after_help = "Example, as the plugin's image starts it:
  weft docker relay --listen /run/docker/plugins/weft.sock --to /run/weft/swarm.sock")]
struct Relay {
    /// Where Docker connects to
    #[arg(long, value_name = "PATH", default_value = "/run/docker/plugins/weft.sock")]
    listen: PathBuf,
    /// The agent's socket for swarms
    #[arg(long, value_name = "PATH", default_value = "/run/weft/swarm.sock")]
    to: PathBuf,
}

impl Relay {
    /// Passes on connections for as long as it lives.
    async fn run(self) -> anyhow::Result<()> {
        let listener = api::bind(&self.listen, None).await?;
        let tracker = TaskTracker::new();
        loop {
            let (mut from, _) = listener.accept().await?;
            let to = self.to.clone();
            tracker.spawn(async move {
                // Docker sees a connection that ends, and tries again.
                if let Ok(mut agent) = UnixStream::connect(&to).await {
                    let _ = io::copy_bidirectional(&mut from, &mut agent).await;
                }
            });
        }
    }
}

impl Docker {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        match self.command {
            Command::Network(Network { command: NetworkCommand::Create(create) }) => {
                create.run("/v1/docker/networks", agent, out).await
            }
            Command::Relay(relay) => relay.run().await,
        }
    }
}
