use std::io::Write;

use clap::Args;
use time::OffsetDateTime;
use weft_gossip::identity::{Identity, NODE_VALIDITY};
use weft_model::Label;

use super::join::{NodeOptions, host_label};

/// Make a new cluster, with this host as its first node
///
/// Needs no running agent: it writes the cluster's authority and this node's identity into the
/// state directory. Start the agent afterwards.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft init --advertise 192.0.2.11
  systemctl start weft")]
pub(super) struct Init {
    #[command(flatten)]
    node: NodeOptions,
}

impl Init {
    pub(super) fn run(self, out: &mut impl Write) -> anyhow::Result<()> {
        let NodeOptions { name, advertise, state_dir } = self.node;
        let name: Label = name.map_or_else(host_label, Ok)?;
        let now = OffsetDateTime::now_utc();
        let identity = Identity::init(&state_dir, name, NODE_VALIDITY, now)?;
        if let Some(advertise) = advertise {
            advertise.save(&state_dir)?;
        }
        writeln!(out, "cluster {}", identity.cluster())?;
        writeln!(out, "node {} ({})", identity.name(), identity.node())?;
        writeln!(out, "start the agent, then let others in: weft token create")?;
        Ok(())
    }
}
