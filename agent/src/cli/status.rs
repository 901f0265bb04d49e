use std::io::Write;

use clap::Args;

use super::{Client, Format, nodes, output};
use crate::api::types;

/// Show how this node and the cluster are
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft status")]
pub(super) struct Status {}

impl Status {
    pub(super) async fn run(
        self,
        agent: &Client,
        format: Format,
        out: &mut impl Write,
    ) -> anyhow::Result<()> {
        let status: types::Status = agent.get("/v1/status").await?;
        match format {
            Format::Json => output::json(out, &status)?,
            Format::Table => show(&status, out)?,
        }
        Ok(())
    }
}

fn show(status: &types::Status, out: &mut impl Write) -> anyhow::Result<()> {
    let node = &status.node;
    let nodes = status.nodes.iter().map(|(state, n)| format!("{n} {}", nodes::state(*state)));
    writeln!(out, "cluster      {}", status.cluster)?;
    writeln!(out, "node         {} ({})", node.name, node.id)?;
    writeln!(out, "version      {}", status.version)?;
    writeln!(out, "underlay     {} mtu {}", node.address, node.underlay_mtu)?;
    writeln!(out, "certificate  until {}", status.certificate_expires)?;
    writeln!(out, "nodes        {}", output::list(nodes))?;
    writeln!(out, "networks     {}", status.networks)?;
    writeln!(out, "endpoints    {} ({} here)", status.endpoints, status.local_endpoints)?;
    writeln!(out)?;
    output::table(
        out,
        ["TABLE", "NETWORK", "OPERATIONS", "DRIFT REPAIRED", "LAG", "ERROR"],
        status.tables.iter().map(|table| {
            [
                table.table.clone(),
                table.network.as_ref().map_or_else(|| "-".into(), ToString::to_string),
                table.operations.to_string(),
                table.drift_repaired.to_string(),
                format!("{:.1} ms", table.lag_ms),
                table.error.clone().unwrap_or_else(|| "-".into()),
            ]
        }),
    )?;
    for finding in &status.findings {
        writeln!(out, "\n! {finding}")?;
    }
    Ok(())
}
