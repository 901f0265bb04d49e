use std::{
    ffi::OsString,
    io::{Read, Write},
    net::IpAddr,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use clap::Args;

use super::{
    Client,
    attach::EndpointOptions,
    client::encode,
    container, duration,
    supervisor::{self, Supervised},
    surroundings::{Membership, Surroundings},
    unattached::Unattached,
};
use crate::{
    api::types::{Attached, Sandbox},
    sandbox,
};

/// Run a command in a namespace of its own, attached to networks
///
/// The command sees only its networks; names are resolved by weft. It ends as any process does,
/// and its endpoints with it.
///
/// In the place of a network may stand: host, for the host's own network; none, for a namespace
/// without any; container:NAME, for the namespace of a container of this host, which it then shares.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft run --network app --name web -d -- python3 -m http.server 80
  weft run --network app --network db --name worker -- ./worker
  weft run --network container:web --name debug -- tcpdump -i eth0")]
pub(super) struct Run {
    /// A network to attach to; the first one has the fixed addresses. The one of the highest
    /// priority gives the default route (0 unless given; of equals the first)
    #[arg(long, value_name = "NETWORK[,gw-priority=N]|host|none|container:NAME", required = true)]
    network: Vec<String>,
    #[command(flatten)]
    endpoint: EndpointOptions,
    /// Leave it in the background and print its process id
    #[arg(long, short)]
    detach: bool,
    /// How long it may finish its work when it is told to end, before it is: a number and ms, s or m;
    /// 0 for not at all. Unless given, 10s if it is of a service, else 0
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    drain_timeout: Option<Duration>,
    /// Is the command's half of a run that drains
    #[arg(long, hide = true)]
    supervised_by: Option<u32>,
    /// Is the background half of `--detach`
    #[arg(long, hide = true)]
    background: bool,
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Run {
    pub(super) fn run(self, agent: &Client, out: &mut impl Write) -> anyhow::Result<()> {
        match (self.supervised_by, self.detach) {
            (Some(parent), _) => supervisor::become_supervised(parent, &self.command),
            (None, true) => start_in_background(out),
            (None, false) => self.become_command(agent),
        }
    }

    /// Turns this process into the command. Returns only upon failure.
    fn become_command(self, agent: &Client) -> anyhow::Result<()> {
        let name = self.endpoint.name.clone();
        let hostname = name.to_string();
        let drain_timeout = self.drain_timeout.unwrap_or(match self.endpoint.service {
            Some(_) => DRAIN_TIMEOUT,
            None => Duration::ZERO,
        });
        let surroundings = Surroundings::read(&self.network, &self.endpoint)?;
        if self.background {
            nix::unistd::setsid().context("cannot leave the terminal's session")?;
        }
        let notes = agent.directory().join(UNATTACHED);
        let note = match &surroundings {
            Surroundings::Networks(_) => None,
            Surroundings::Nothing | Surroundings::Host | Surroundings::Container(_) => {
                let name = self.endpoint.name.clone();
                Some(Unattached::note(&notes, name, self.network[0].clone())?)
            }
        };
        let attached = match surroundings {
            Surroundings::Networks(networks) => {
                sandbox::enter_new(&hostname)?;
                let attached = super::wait(attach_all(agent, networks, self.endpoint))?;
                sandbox::replace_resolv_conf(&resolv_conf(&attached))?;
                attached
            }
            Surroundings::Nothing => {
                sandbox::enter_new(&hostname)?;
                Vec::new()
            }
            Surroundings::Host => {
                sandbox::leave_host(&hostname)?;
                Vec::new()
            }
            Surroundings::Container(name) => {
                let container = super::wait(container::find(agent, &name))?;
                sandbox::enter_shared(&container.namespace, &hostname)?;
                sandbox::replace_resolv_conf(&resolv_conf(&container.endpoints))?;
                // The endpoints are the container's, and stay.
                Vec::new()
            }
        };
        if self.background {
            sandbox::silence_output()?;
        }
        if !attached.is_empty() && !drain_timeout.is_zero() {
            let endpoints = attached.iter().map(|attached| attached.endpoint.id).collect();
            let command = Supervised { name: &name, command: &self.command };
            let ended = supervisor::supervise(agent, &endpoints, drain_timeout, &command);
            // If there is no agent now, the next one will notice that the namespace has ended.
            let _ = super::wait(detach_all(agent, &attached));
            std::process::exit(ended?);
        }
        let (program, arguments) = self.command.split_first().expect("clap requires a command");
        let error = Command::new(program).args(arguments).exec();
        super::wait(detach_all(agent, &attached))?;
        if let Some(note) = note {
            note.forget(&notes)?;
        }
        Err(error).with_context(|| format!("cannot run {}", program.display()))
    }
}

/// Where notes of commands without an endpoint are, beside the agent's socket.
pub(super) const UNATTACHED: &str = "unattached";

/// Starts this program again without `--detach`, waits until its endpoints are attached (it then
/// closes its output) and prints its process id.
fn start_in_background(out: &mut impl Write) -> anyhow::Result<()> {
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let end = arguments.iter().position(|a| a == "--").unwrap_or(arguments.len());
    arguments.insert(end, "--background".into());
    let options = arguments[..=end].iter();
    let at = options.clone().position(|a| a == "-d" || a == "--detach");
    let at = at.context("write -d as an argument of its own")?;
    arguments.remove(at);

    let mut child = Command::new(std::env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the background process")?;
    let mut said = String::new();
    child.stdout.take().expect("it is piped").read_to_string(&mut said)?;
    match child.try_wait()? {
        Some(status) if !status.success() => std::process::exit(status.code().unwrap_or(1)),
        _ => writeln!(out, "{}", child.id())?,
    }
    Ok(())
}

async fn attach_all(
    agent: &Client,
    networks: Vec<Membership>,
    endpoint: EndpointOptions,
) -> anyhow::Result<Vec<Attached>> {
    let sandbox = Sandbox::Pid(std::process::id());
    let mut networks = networks.into_iter();
    let first = networks.next().expect("clap requires a network");
    let Membership { network, gateway_priority } = first;
    let mut request = endpoint.into_request(network, sandbox, None, gateway_priority)?;
    let mut attached = Vec::new();
    loop {
        match agent.post::<Attached>("/v1/endpoints", &request).await {
            Ok(endpoint) => attached.push(endpoint),
            Err(error) => {
                detach_all(agent, &attached).await?;
                return Err(error.into());
            }
        }
        let Some(next) = networks.next() else { return Ok(attached) };
        request.network = next.network;
        request.gateway_priority = next.gateway_priority;
        request.addresses.clear();
        request.ports.clear();
        request.mac = None;
    }
}

/// Takes back what was attached. The agent would notice the end of the namespace too; this is
/// quicker.
async fn detach_all(agent: &Client, attached: &[Attached]) -> anyhow::Result<()> {
    for endpoint in attached {
        let id = endpoint.endpoint.id.to_string();
        let () = agent.delete(&format!("/v1/endpoints/{}", encode(&id))).await?;
    }
    Ok(())
}

/// A resolver file that asks where names are answered; of such a file three servers at most are read
/// (resolv.conf(5)).
fn resolv_conf(attached: &[Attached]) -> String {
    let mut resolvers: Vec<IpAddr> = Vec::new();
    for resolver in attached.iter().flat_map(|attached| &attached.resolvers) {
        if !resolvers.contains(resolver) {
            resolvers.push(*resolver);
        }
    }
    let lines = resolvers.iter().take(3).map(|resolver| format!("nameserver {resolver}\n"));
    lines.chain(["options timeout:2\n".to_owned()]).collect()
}

/// How long the work of a service may take to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
