use std::io::{self, Write};

use clap::Args;

use super::{
    Client, nodes,
    output::{self, Output},
};
use crate::api::types::{self, EncryptionStatus, SealedNetwork, SealedPeer};

/// Show how this node and the cluster are
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft status")]
pub(super) struct Status {}

impl Status {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let status: types::Status = agent.get("/v1/status").await?;
        Ok(out.show(&status, |out| show(&status, out))?)
    }
}

fn show(status: &types::Status, out: &mut Output<'_>) -> io::Result<()> {
    let node = &status.node;
    let nodes = status.nodes.iter().map(|(state, n)| format!("{n} {}", nodes::state(*state)));
    writeln!(out, "cluster      {}", status.cluster)?;
    writeln!(out, "node         {} ({})", node.name, node.id)?;
    writeln!(out, "version      {}", status.version)?;
    writeln!(out, "underlay     {} mtu {}", node.address, node.underlay_mtu)?;
    writeln!(out, "certificate  until {}", status.certificate_expires)?;
    writeln!(out, "nodes        {}", output::list(nodes))?;
    writeln!(out, "networks     {}", status.networks)?;
    writeln!(out, "encryption   {}", offer(&status.encryption))?;
    writeln!(out, "endpoints    {} ({} here)", status.endpoints, status.local_endpoints)?;
    writeln!(out)?;
    out.table(
        ["TABLE", "NETWORK", "OPERATIONS", "DRIFT REPAIRED", "LAG", "ERROR"],
        status.tables.iter().map(|table| {
            [
                table.table.clone(),
                output::list(&table.network),
                table.operations.to_string(),
                table.drift_repaired.to_string(),
                format!("{:.1} ms", table.lag_ms),
                output::list(&table.error),
            ]
        }),
    )?;
    encryption(&status.encryption, out)?;
    for finding in &status.findings {
        writeln!(out, "\n! {finding}")?;
    }
    Ok(())
}

fn encryption(encryption: &EncryptionStatus, out: &mut Output<'_>) -> io::Result<()> {
    if !encryption.offloads.is_empty() {
        writeln!(out)?;
        out.table(
            ["OFFLOAD", "STATE", "USED", "REFUSED"],
            encryption.offloads.iter().map(|offload| {
                [
                    offload.offload.clone(),
                    offload.state.clone(),
                    offload.used.to_string(),
                    offload.refused.to_string(),
                ]
            }),
        )?;
    }
    if !encryption.peers.is_empty() {
        writeln!(out)?;
        out.table(
            ["PEER", "SESSION", "PATH", "RTT", "PATH MTU", "REKEYS", "FAULT"],
            encryption.peers.iter().map(peer),
        )?;
    }
    if !encryption.networks.is_empty() {
        writeln!(out)?;
        out.table(
            ["ENCRYPTED NETWORK", "STATE", "SEALED", "OPENED", "DROPPED", "FAULT"],
            encryption.networks.iter().map(network),
        )?;
    }
    Ok(())
}

/// What this node offers, in a line.
fn offer(encryption: &EncryptionStatus) -> String {
    let Some(offer) = &encryption.offer else {
        let reason = encryption.reason.as_deref().unwrap_or("the agent does not say why");
        return format!("not available: {reason}");
    };
    let relay = if offer.relay { "relays for others" } else { "does not relay" };
    let suites = offer.suites.iter().map(|suite| suite.as_str());
    format!("{} at {}, {relay}", output::list(suites), output::list(&encryption.sockets))
}

fn peer(peer: &SealedPeer) -> [String; 7] {
    let path = match (&peer.address, &peer.via) {
        (Some(address), _) => format!("{} {address}", peer.path),
        (None, Some(via)) => format!("{} via {via}", peer.path),
        (None, None) => peer.path.clone(),
    };
    [
        peer.node.to_string(),
        match (peer.confirmed, peer.suite) {
            (true, Some(suite)) => suite.as_str().into(),
            (true, None) => "-".into(),
            (false, _) => "no".into(),
        },
        path,
        peer.rtt_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.2} ms")),
        peer.path_mtu.map_or_else(|| "-".into(), |mtu| mtu.to_string()),
        peer.rekeys.to_string(),
        output::list(&peer.fault),
    ]
}

fn network(network: &SealedNetwork) -> [String; 6] {
    [
        network.network.to_string(),
        if network.carried { "carried" } else { "failed closed" }.into(),
        network.sealed_packets.to_string(),
        network.opened_packets.to_string(),
        output::list(network.drops.iter().map(|(why, n)| format!("{n} {why}"))),
        match &network.fault {
            Some(fault) => fault.clone(),
            None => output::list(network.unreachable.values()),
        },
    ]
}
