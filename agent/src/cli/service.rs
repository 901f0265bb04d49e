use std::io::{self, Write};

use anyhow::bail;
use clap::{Args, Subcommand};
use weft_model::{Check, Label, Probe, Publication, PublishMode, ServicePort, Spread};

use super::{
    Client,
    client::encode,
    grammar,
    network::{parse_pair, unique},
    output::{self, Output},
};
use crate::api::types::{
    BackendStatus, CreateService, PublicationStatus, ServiceMode, ServiceStatus, UpdateService, Vip,
};

/// Declare services: one name, and virtual address, for the containers that serve it
#[derive(Args, Debug)]
pub(super) struct Service {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(Box<Create>),
    /// List the services of all networks, those that containers imply among them
    #[command(after_help = "Example:
  weft service ls --network app")]
    Ls {
        /// Only those of this network
        #[arg(long, value_name = "NETWORK")]
        network: Option<String>,
    },
    /// Show services with their backends and published ports
    ///
    /// For each published port, which source address backends see, and why; for each backend its
    /// host, its health, its share and its connections.
    #[command(after_help = "Example:
  weft service inspect web
  weft service inspect web --network app --format json")]
    Inspect {
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<Label>,
        /// Where more than one network has a service of that name
        #[arg(long, value_name = "NETWORK")]
        network: Option<String>,
    },
    Update(Box<Update>),
    /// Remove services; their containers go on, and names resolve to the containers again
    #[command(after_help = "Example:
  weft service rm web")]
    Rm {
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<Label>,
        /// Where more than one network has a service of that name
        #[arg(long, value_name = "NETWORK")]
        network: Option<String>,
    },
}

/// Declare a service of a network
///
/// Its backends are the containers that say so (weft run --service, the label weft.service, a
/// service of compose), and those without such a word that are called like it.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft service create web --network app
  weft service create web --network app --port 80:8080 --check http:8080/health
  weft service create db --network app --vip none
  weft service create dns --network app --port 53/udp --port 53 --affinity 10m")]
struct Create {
    /// Letters, digits and inner hyphens
    name: Label,
    #[arg(long, value_name = "NETWORK")]
    network: String,
    /// The virtual address: auto, none (the name resolves to the backends), or one a family
    #[arg(long, value_name = "auto|none|IP[,IP]", default_value = "auto", value_parser = grammar::vip)]
    vip: Vip,
    /// A port of the virtual address, and the backends' if it is another; every TCP and UDP port,
    /// unchanged, if none is given
    #[arg(long, value_name = "PORT[:TARGET][/udp]", value_parser = grammar::service_port)]
    port: Vec<ServicePort>,
    /// How connections are spread: hash (every host chooses alike) or random
    #[arg(long, value_name = "hash|random", default_value = "hash", value_parser = grammar::spread)]
    spread: Spread,
    /// How long a client address keeps its backend after its last connection
    #[arg(long, value_name = "TIME", value_parser = grammar::seconds)]
    affinity: Option<u32>,
    #[command(flatten)]
    check: CheckOptions,
    /// A port of hosts that leads to it: [PORT:]TARGET[/udp], or published=…,target=…,mode=host,…
    #[arg(long, short, value_name = "PORT", value_parser = grammar::publication)]
    publish: Vec<Publication>,
    /// A label of yours
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse_pair)]
    label: Vec<(String, String)>,
}

/// Change a service; what is not named stays as it is
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft service update web --check tcp:8080 --check-interval 2s
  weft service update web --vip none
  weft service update web --publish-add 8443:443 --label-rm canary")]
struct Update {
    name: Label,
    /// Where more than one network has a service of that name
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// auto, none, or one a family
    #[arg(long, value_name = "auto|none|IP[,IP]", value_parser = grammar::vip)]
    vip: Option<Vip>,
    /// The ports that take the place of all
    #[arg(long, value_name = "PORT[:TARGET][/udp]", value_parser = grammar::service_port, conflicts_with = "every_port")]
    port: Vec<ServicePort>,
    /// Translate every port again, instead of some
    #[arg(long)]
    every_port: bool,
    #[arg(long, value_name = "hash|random", value_parser = grammar::spread)]
    spread: Option<Spread>,
    /// 0 ends it
    #[arg(long, value_name = "TIME", value_parser = grammar::seconds)]
    affinity: Option<u32>,
    #[command(flatten)]
    check: CheckOptions,
    /// Let every backend count as healthy
    #[arg(long, conflicts_with = "check")]
    no_check: bool,
    #[arg(long, value_name = "PORT", value_parser = grammar::publication)]
    publish_add: Vec<Publication>,
    /// The containers' port of what is no longer to be published
    #[arg(long, value_name = "TARGET[/udp]", value_parser = grammar::service_port)]
    publish_rm: Vec<ServicePort>,
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    label_add: Vec<(String, String)>,
    #[arg(long, value_name = "KEY")]
    label_rm: Vec<String>,
}

/// How a backend's host finds out whether it can serve.
#[derive(Args, Debug)]
struct CheckOptions {
    /// What is tried: tcp:PORT, http:PORT/PATH, exec:PROGRAM (one that the host has for checks, in
    /// the container's network namespace), or engine (the container engine's own check)
    #[arg(long, value_name = "CHECK", value_parser = grammar::probe)]
    check: Option<Probe>,
    /// From one try to the next
    #[arg(long, value_name = "TIME", value_parser = grammar::milliseconds)]
    check_interval: Option<u32>,
    /// After which a try has failed
    #[arg(long, value_name = "TIME", value_parser = grammar::milliseconds)]
    check_timeout: Option<u32>,
    /// Successes in a row that make a backend healthy
    #[arg(long, value_name = "N")]
    check_rise: Option<u16>,
    /// Failures in a row that make it unhealthy
    #[arg(long, value_name = "N")]
    check_fall: Option<u16>,
    /// The one status that http is to answer; any from 200 to 399 if it is not given
    #[arg(long, value_name = "STATUS")]
    check_status: Option<u16>,
    /// What the body that http answers must contain
    #[arg(long, value_name = "TEXT")]
    check_body: Option<String>,
}

impl CheckOptions {
    /// The check that `before` becomes by these options; `None` if they say nothing.
    fn apply(self, before: Option<Check>) -> anyhow::Result<Option<Check>> {
        let says = self.check.is_some()
            || self.check_interval.is_some()
            || self.check_timeout.is_some()
            || self.check_rise.is_some()
            || self.check_fall.is_some()
            || self.check_status.is_some()
            || self.check_body.is_some();
        if !says {
            return Ok(None);
        }
        let mut check = match (self.check, before) {
            (Some(probe), Some(before)) => Check { probe, ..before },
            (Some(probe), None) => default_check(probe),
            (None, Some(before)) => before,
            (None, None) => bail!("there is no check to change: give one with --check"),
        };
        check.interval = self.check_interval.unwrap_or(check.interval);
        check.timeout = self.check_timeout.unwrap_or(check.timeout);
        check.rise = self.check_rise.unwrap_or(check.rise);
        check.fall = self.check_fall.unwrap_or(check.fall);
        let asks_http = self.check_status.is_some() || self.check_body.is_some();
        match &mut check.probe {
            Probe::Http { status, body, .. } => {
                *status = self.check_status.or(*status);
                *body = self.check_body.or_else(|| body.take());
            }
            Probe::Tcp { .. } | Probe::Exec { .. } | Probe::Engine if asks_http => {
                bail!("--check-status and --check-body are for --check http:…")
            }
            Probe::Tcp { .. } | Probe::Exec { .. } | Probe::Engine => {}
        }
        Ok(Some(check))
    }
}

/// Milliseconds.
const INTERVAL: u32 = 2_000;
const TIMEOUT: u32 = 1_000;

fn default_check(probe: Probe) -> Check {
    Check { probe, interval: INTERVAL, timeout: TIMEOUT, rise: 1, fall: 3 }
}

impl Service {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        match self.command {
            Command::Create(create) => {
                let created: ServiceStatus =
                    agent.post("/v1/services", &create.into_request()?).await?;
                acknowledge(&created, out)?;
            }
            Command::Ls { network } => {
                let path = match network {
                    Some(network) => format!("/v1/services?network={}", encode(&network)),
                    None => "/v1/services".into(),
                };
                let services: Vec<ServiceStatus> = agent.get(&path).await?;
                let headings =
                    ["NAME", "NETWORK", "MODE", "ADDRESS", "PORTS", "BACKENDS", "PUBLISHED"];
                out.show_all(&services, headings, row)?;
            }
            Command::Inspect { services, network } => {
                let mut found: Vec<ServiceStatus> = Vec::new();
                for service in &services {
                    found.push(agent.get(&path(service, network.as_deref())).await?);
                }
                out.show(&found, |out| found.iter().try_for_each(|one| describe(one, out)))?;
            }
            Command::Update(update) => update.run(agent, out).await?,
            Command::Rm { services, network } => {
                for service in &services {
                    let () = agent.delete(&path(service, network.as_deref())).await?;
                    writeln!(out, "{service}")?;
                }
            }
        }
        Ok(())
    }
}

impl Create {
    fn into_request(self) -> anyhow::Result<CreateService> {
        Ok(CreateService {
            name: self.name,
            network: self.network,
            vip: self.vip,
            ports: self.port,
            spread: self.spread,
            affinity: self.affinity,
            check: self.check.apply(None)?,
            published: self.publish,
            labels: unique("--label", self.label)?,
        })
    }
}

impl Update {
    async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let path = path(&self.name, self.network.as_deref());
        let before: ServiceStatus = agent.get(&path).await?;
        let update = self.into_request(&before)?;
        let updated: ServiceStatus = agent.patch(&path, &update).await?;
        acknowledge(&updated, out)
    }

    fn into_request(self, before: &ServiceStatus) -> anyhow::Result<UpdateService> {
        let published = before.published.iter().map(|its| its.publication);
        let mut kept: Vec<Publication> = published.collect();
        for gone in &self.publish_rm {
            let count = kept.len();
            kept.retain(|its| (its.target, its.protocol) != (gone.target, gone.protocol));
            anyhow::ensure!(
                kept.len() < count,
                "port {}/{} of {} is not published",
                gone.target,
                gone.protocol,
                self.name
            );
        }
        let published_changes = !(self.publish_rm.is_empty() && self.publish_add.is_empty());
        kept.extend(&self.publish_add);
        let mut labels = before.labels.clone();
        for key in &self.label_rm {
            anyhow::ensure!(labels.remove(key).is_some(), "{} has no label {key}", self.name);
        }
        let labels_change = !(self.label_rm.is_empty() && self.label_add.is_empty());
        labels.extend(unique("--label-add", self.label_add)?);
        let check = match self.no_check {
            true => Some(None),
            false => self.check.apply(before.check.clone())?.map(Some),
        };
        Ok(UpdateService {
            vip: self.vip,
            ports: match self.every_port {
                true => Some(Vec::new()),
                false => Some(self.port).filter(|ports| !ports.is_empty()),
            },
            spread: self.spread,
            affinity: self.affinity.map(|seconds| Some(seconds).filter(|seconds| *seconds > 0)),
            check,
            published: published_changes.then_some(kept),
            labels: labels_change.then_some(labels),
        })
    }
}

/// Where a service is in the API.
pub(super) fn path(service: &Label, network: Option<&str>) -> String {
    let network = network.map(|network| format!("?network={}", encode(network)));
    format!("/v1/services/{service}{}", network.unwrap_or_default())
}

/// Prints what there is to say after a change: the name and its virtual addresses.
pub(super) fn acknowledge(status: &ServiceStatus, out: &mut Output<'_>) -> anyhow::Result<()> {
    let addresses = status.vips.iter().map(|ip| format!(" {ip}")).collect::<String>();
    Ok(out.show_line(status, format_args!("{} on {}{addresses}", status.name, status.network))?)
}

fn row(status: &ServiceStatus) -> [String; 7] {
    let ready = status.backends.iter().filter(|backend| backend.state == "ready").count();
    [
        status.name.to_string(),
        status.network.to_string(),
        mode(status.mode).into(),
        output::list(&status.vips),
        output::list(status.ports.iter().map(port)),
        format!("{ready}/{}", status.backends.len()),
        output::list(status.published.iter().map(|its| published(&its.publication))),
    ]
}

fn mode(mode: ServiceMode) -> &'static str {
    match mode {
        ServiceMode::Vip => "vip",
        ServiceMode::Dnsrr => "dnsrr",
        ServiceMode::Implied => "implied",
    }
}

fn port(port: &ServicePort) -> String {
    match port.port == port.target {
        true => format!("{}/{}", port.port, port.protocol),
        false => format!("{}->{}/{}", port.port, port.target, port.protocol),
    }
}

/// In Docker's shape: `*:8080->80/tcp`.
fn published(its: &Publication) -> String {
    let ip = its.host_ip.map_or_else(|| "*".into(), |ip| ip.to_string());
    let mode = match its.mode {
        PublishMode::Ingress => "",
        PublishMode::Host => " (host)",
    };
    format!("{ip}:{}->{}/{}{mode}", its.port, its.target, its.protocol)
}

fn describe(status: &ServiceStatus, out: &mut Output<'_>) -> io::Result<()> {
    let rows = [
        ("Name", status.name.to_string()),
        ("Network", status.network.to_string()),
        ("Mode", mode(status.mode).into()),
        ("Addresses", output::list(&status.vips)),
        (
            "Ports",
            match status.ports.is_empty() {
                true => "every one".into(),
                false => output::list(status.ports.iter().map(port)),
            },
        ),
        ("Spread", format!("{:?}", status.spread).to_lowercase()),
        ("Affinity", status.affinity.map_or_else(|| "-".into(), |seconds| format!("{seconds}s"))),
        ("Check", status.check.as_ref().map_or_else(|| "-".into(), check)),
        ("Labels", output::list(status.labels.iter().map(|(key, value)| format!("{key}={value}")))),
        (
            "Revision",
            match &status.writer {
                Some(writer) => format!("{} by {writer}", status.revision),
                None => "-".into(),
            },
        ),
    ];
    for (name, value) in rows {
        writeln!(out, "{name:<11} {value}")?;
    }
    if !status.published.is_empty() {
        writeln!(out)?;
        out.table(
            ["PUBLISHED", "SOURCE", "WHY", "HERE"],
            status.published.iter().map(publication_row),
        )?;
    }
    writeln!(out)?;
    out.table(
        ["BACKEND", "NODE", "ADDRESS", "STATE", "WEIGHT", "CONNECTIONS"],
        status.backends.iter().map(backend_row),
    )?;
    Ok(())
}

fn check(check: &Check) -> String {
    let what = match &check.probe {
        Probe::Tcp { port } => format!("tcp:{port}"),
        Probe::Http { port, path, .. } => format!("http:{port}{path}"),
        Probe::Exec { command } => format!("exec:{}", command.join(" ")),
        Probe::Engine => "engine".into(),
    };
    let Check { interval, timeout, rise, fall, .. } = check;
    format!("{what} every {interval} ms, at most {timeout} ms, rise {rise}, fall {fall}")
}

fn publication_row(its: &PublicationStatus) -> [String; 4] {
    [
        published(&its.publication),
        format!("{:?}", its.in_force).to_lowercase(),
        its.reason.clone(),
        its.here.clone(),
    ]
}

fn backend_row(backend: &BackendStatus) -> [String; 6] {
    [
        backend.name.to_string(),
        backend.node.to_string(),
        output::list(&backend.addresses),
        match &backend.reason {
            Some(reason) => format!("{}: {reason}", backend.state),
            None => backend.state.clone(),
        },
        backend.weight.to_string(),
        backend.connections.map_or_else(|| "-".into(), |count| count.to_string()),
    ]
}
