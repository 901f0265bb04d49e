use std::path::PathBuf;

use clap::Args;

use crate::{
    config::{self, Config},
    daemon,
};

/// Run the agent in the foreground
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft agent --config /etc/weft/weft.toml")]
pub(super) struct Agent {
    /// The configuration file; /etc/weft/weft.toml, if it exists, when absent
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Identity, tokens and the node's own records
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where the networks' namespaces are named
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// Where Prometheus finds /metrics; `none` switches it off
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_metrics)]
    metrics: Option<Metrics>,
}

#[derive(Clone, Copy, Debug)]
struct Metrics(Option<std::net::SocketAddr>);

impl Agent {
    /// Runs until the process is told to stop. A socket given as a flag goes before the file's.
    pub(super) fn run(self, socket: PathBuf) -> anyhow::Result<()> {
        let mut config = Config::load(self.config.as_deref())?;
        if socket.as_os_str() != config::DEFAULT_SOCKET {
            config.socket = socket;
        }
        if let Some(state_dir) = self.state_dir {
            config.state_dir = state_dir;
        }
        if let Some(runtime_dir) = self.runtime_dir {
            config.runtime_dir = runtime_dir;
        }
        if let Some(Metrics(metrics)) = self.metrics {
            config.metrics = metrics;
        }
        daemon::run(config)
    }
}

fn parse_metrics(text: &str) -> Result<Metrics, String> {
    match text {
        "none" => Ok(Metrics(None)),
        _ => text
            .parse()
            .map(|address| Metrics(Some(address)))
            .map_err(|_| "give ADDRESS:PORT, such as 127.0.0.1:9480, or none".into()),
    }
}
