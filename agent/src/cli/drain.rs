use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    time::Duration,
};

use clap::Args;
use serde::Serialize;
use tokio::time::{self, Instant};
use weft_model::EndpointId;

use super::{
    Client, Format,
    client::ClientError,
    duration,
    output::{self, Output},
};
use crate::api::types::{self, DrainStatus};

/// Let an endpoint, a container or this node finish its work
///
/// No host sends it new connections any more; the command returns when all hosts have said so and
/// the TCP connections that it has are closed, or when the time is over. It goes on draining, also if
/// the agent starts anew, until it ends or --undo.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft drain web-1 --stop
  weft drain web-1 --timeout 2m && docker stop web-1
  weft drain h2
  weft drain h2 --undo

Exit status: 0 when nothing is left, 4 when connections were left or a host did not answer.")]
pub(super) struct Drain {
    /// An endpoint of this host by name or id, with all networks of its container; a container of
    /// Docker's by id; or this node by name
    #[arg(value_name = "ENDPOINT|CONTAINER|NODE")]
    target: String,
    /// Only on this network
    #[arg(long, value_name = "NETWORK", conflicts_with = "stop")]
    network: Option<String>,
    /// How long to wait: a number and ms, s or m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration::parse)]
    timeout: Duration,
    /// Let it have new connections again
    #[arg(long, conflicts_with_all = ["stop", "timeout"])]
    undo: bool,
    /// Stop it then: Docker's container by Docker, one that is known by its process by SIGTERM
    #[arg(long)]
    stop: bool,
}

/// What is left at the end of the time.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub(super) struct Undrained(Vec<String>);

/// A step of one endpoint's draining, as it is printed.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(super) struct Step<'a> {
    #[serde(flatten)]
    status: &'a DrainStatus,
    /// Whether nothing is left of its work.
    drained: bool,
    elapsed_ms: u128,
}

impl Drain {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self { target, network, timeout, undo, stop } = self;
        let body = types::Drain { target, network, to_stop: stop };
        if undo {
            let endpoints: BTreeSet<EndpointId> = agent.post("/v1/drain/undo", &body).await?;
            return Ok(out.show_line(&endpoints, &body.target)?);
        }
        let begun: Vec<DrainStatus> = agent.post("/v1/drain", &body).await?;
        let ids: BTreeSet<EndpointId> = begun.iter().map(|endpoint| endpoint.id).collect();
        let mut told = BTreeMap::new();
        let left = wait(agent, &ids, timeout, |step| tell(&step, &mut told, out)).await?;
        if stop {
            match agent.post("/v1/drain/stop", &body).await {
                // It has ended by itself.
                Err(error) if error.is_missing() => {}
                stopped => stopped?,
            }
            if out.format == Format::Table {
                writeln!(out, "{}: told to stop", body.target)?;
            }
        }
        match left.is_empty() {
            true => Ok(()),
            false => Err(Undrained(left.iter().map(what_is_left).collect()).into()),
        }
    }
}

/// Waits until nothing is left of the endpoints' work, and returns of which something is when the
/// time is over. Endpoints that are gone have no work.
pub(super) async fn wait(
    agent: &Client,
    endpoints: &BTreeSet<EndpointId>,
    limit: Duration,
    mut report: impl FnMut(Step<'_>) -> std::io::Result<()>,
) -> anyhow::Result<Vec<DrainStatus>> {
    let started = Instant::now();
    let mut quiet_since: BTreeMap<EndpointId, Instant> = BTreeMap::new();
    loop {
        let all: Vec<DrainStatus> = agent.get("/v1/drain").await?;
        let now = Instant::now();
        let mut left = Vec::new();
        for status in all.into_iter().filter(|status| endpoints.contains(&status.id)) {
            let quiet = status.waits_for.is_empty() && status.connections == 0;
            if !quiet {
                quiet_since.remove(&status.id);
            }
            // A first packet may have been on its way when the last host said that it sends no more.
            let since = *quiet_since.entry(status.id).or_insert(now);
            let drained = quiet && now.duration_since(since) >= STRAGGLERS;
            let elapsed_ms = started.elapsed().as_millis();
            report(Step { status: &status, drained, elapsed_ms })?;
            if !drained {
                left.push(status);
            }
        }
        if left.is_empty() || started.elapsed() >= limit {
            return Ok(left);
        }
        time::sleep(INTERVAL).await;
    }
}

/// Prints a step unless it says what the last one did.
fn tell(
    step: &Step<'_>,
    told: &mut BTreeMap<EndpointId, (DrainStatus, bool)>,
    out: &mut Output<'_>,
) -> std::io::Result<()> {
    let now = (step.status.clone(), step.drained);
    if told.get(&step.status.id) == Some(&now) {
        return Ok(());
    }
    told.insert(step.status.id, now);
    match out.format {
        Format::Json => {
            serde_json::to_writer(&mut *out, step)?;
            writeln!(out)
        }
        Format::Table if step.drained => {
            let DrainStatus { name, network, .. } = step.status;
            writeln!(out, "{name} on {network}: drained after {} ms", step.elapsed_ms)
        }
        Format::Table => writeln!(out, "{}", what_is_left(step.status)),
    }?;
    out.flush()
}

fn what_is_left(status: &DrainStatus) -> String {
    let DrainStatus { name, network, waits_for, connections, .. } = status;
    let hosts = output::list(waits_for.iter().map(|waited| &waited.node));
    match (waits_for.is_empty(), connections) {
        (false, 0) => format!("{name} on {network}: waits for {hosts}"),
        (false, 1) => format!("{name} on {network}: waits for {hosts}; 1 connection is open"),
        (false, n) => format!("{name} on {network}: waits for {hosts}; {n} connections are open"),
        (true, 0) => format!("{name} on {network}: no host sends new connections"),
        (true, 1) => format!("{name} on {network}: 1 connection is open"),
        (true, n) => format!("{name} on {network}: {n} connections are open"),
    }
}

/// Asks for the endpoints' draining to begin; whether somebody else had it begin already.
///
/// # Errors
///
/// The agent does not answer.
pub(super) async fn begin(
    agent: &Client,
    endpoints: &BTreeSet<EndpointId>,
) -> Result<bool, ClientError> {
    let draining: Vec<DrainStatus> = agent.get("/v1/drain").await?;
    let draining: BTreeSet<EndpointId> = draining.iter().map(|status| status.id).collect();
    for id in endpoints.difference(&draining) {
        let body = types::Drain { target: id.to_string(), network: None, to_stop: false };
        let _: Vec<DrainStatus> = agent.post("/v1/drain", &body).await?;
    }
    Ok(endpoints.is_subset(&draining))
}

/// How often the agent is asked.
const INTERVAL: Duration = Duration::from_millis(50);
/// How long nothing may come any more before an endpoint counts as drained. A connection that was
/// begun before has its place already; if its first packet is lost, the next one comes after a second
/// (RFC 6298 §2).
const STRAGGLERS: Duration = Duration::from_millis(1500);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::types::WaitedFor, fixture::node_id};

    #[test]
    fn each_step_is_told_once() {
        let mut out = Vec::new();
        let mut told = BTreeMap::new();
        let waited = WaitedFor { node: "h2".into(), node_id: node_id(2) };
        for (waits_for, connections, drained) in [
            (vec![waited.clone()], 7, false),
            (vec![waited], 7, false),
            (vec![], 1, false),
            (vec![], 0, false),
            (vec![], 0, true),
        ] {
            let status = DrainStatus {
                id: EndpointId::from([1; 16]),
                name: "web-1".parse().unwrap(),
                network: "app".parse().unwrap(),
                waits_for,
                connections,
            };
            let step = Step { status: &status, drained, elapsed_ms: 412 };
            tell(&step, &mut told, &mut Output::new(Format::Table, &mut out)).unwrap();
        }
        insta::assert_snapshot!(String::from_utf8(out).unwrap(), @r"
        web-1 on app: waits for h2; 7 connections are open
        web-1 on app: 1 connection is open
        web-1 on app: no host sends new connections
        web-1 on app: drained after 412 ms
        ");
    }
}
