use std::{io::Write, path::PathBuf};

use anyhow::Context;
use clap::Args;
use weft_gossip::identity::Token;
use weft_model::Label;

use crate::{advertise::Advertise, config, joining};

/// Join this host to a cluster
///
/// Needs no running agent here: it asks a node that the token names for a certificate and writes
/// this node's identity into the state directory. Start the agent afterwards.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft join weft1-… --advertise 192.0.2.12
  systemctl start weft")]
pub(super) struct Join {
    /// What `weft token create` printed on another host
    token: Token,
    #[command(flatten)]
    node: NodeOptions,
}

/// What `init` and `join` say about this host.
#[derive(Args, Debug)]
pub(super) struct NodeOptions {
    /// This host's name in the cluster; the host name's first label when absent
    #[arg(long, value_name = "NODE")]
    pub(super) name: Option<Label>,
    /// The underlay address by which other hosts reach this one; that of the default route when
    /// absent
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub(super) advertise: Option<Advertise>,
    /// Where the identity is kept
    #[arg(long, value_name = "DIR", default_value = config::DEFAULT_STATE_DIR)]
    pub(super) state_dir: PathBuf,
}

impl Join {
    pub(super) async fn run(self, out: &mut impl Write) -> anyhow::Result<()> {
        let NodeOptions { name, advertise, state_dir } = self.node;
        let name: Label = name.map_or_else(host_label, Ok)?;
        let identity = joining::join(&self.token, &state_dir, name, advertise).await?;
        if let Some(advertise) = advertise {
            advertise.save(&state_dir)?;
        }
        writeln!(out, "cluster {}", identity.cluster())?;
        writeln!(out, "node {} ({})", identity.name(), identity.node())?;
        writeln!(out, "start the agent")?;
        Ok(())
    }
}

/// This host's name, up to the first dot.
pub(super) fn host_label() -> anyhow::Result<Label> {
    let name = nix::unistd::gethostname().context("cannot read the host's name")?;
    let name = name.to_string_lossy();
    let first = name.split('.').next().unwrap_or_default();
    first.parse().context("the host's name does not fit: give one with --name")
}
