//! The command line: one file per command.

mod agent;
mod attach;
mod completion;
mod container;
mod detach;
mod docker;
mod drain;
mod duration;
mod expose;
mod grammar;
mod init;
mod inspect;
mod join;
mod network;
mod nodes;
mod output;
mod port;
mod ps;
mod publish;
mod resolve;
mod run;
mod service;
mod status;
mod supervisor;
mod surroundings;
mod token;
mod unattached;

use std::{io, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};

use self::output::{Format, Output};
use crate::{
    api::client::{self, Client, ClientError},
    chain::Chain,
    config,
};

/// A container overlay network for hosts that do not run Kubernetes.
///
/// One agent per host; no manager, no database. Make a cluster on the first host with `weft init`,
/// bring others in with `weft join`, then create networks and attach containers to them.
#[derive(Debug, Parser)]
#[command(name = "weft", version, max_term_width = 100)]
#[command(after_help = "Example, on two hosts:
  h1# weft init && systemctl start weft
  h1# weft token create
  h2# weft join weft1-… && systemctl start weft
  h1# weft network create app
  h1# weft run --network app --name web -d -- nginx -g 'daemon off;'
  h2# weft run --network app --name client -- curl http://web/")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

/// Options that every command takes.
#[derive(Args, Debug)]
struct Global {
    /// The agent's API socket
    #[arg(long, global = true, env = "WEFT_SOCKET", value_name = "PATH", default_value = config::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How answers are shown
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Init),
    Join(join::Join),
    Agent(agent::Agent),
    Token(token::Token),
    Network(network::Network),
    Service(service::Service),
    Publish(publish::Publish),
    Unpublish(publish::Unpublish),
    Port(port::Port),
    Attach(attach::Attach),
    Detach(detach::Detach),
    Drain(drain::Drain),
    Expose(expose::Expose),
    Hide(expose::Hide),
    Run(run::Run),
    Ps(ps::Ps),
    Nodes(nodes::Nodes),
    Docker(docker::Docker),
    Status(status::Status),
    Resolve(resolve::Resolve),
    Completion(completion::Completion),
}

impl Cli {
    /// Runs the command; errors go to standard error, as one line with its causes.
    ///
    /// Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no agent answers, 4 not drained.
    pub fn execute(self) -> ExitCode {
        match self.dispatch() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
            Err(error) => {
                #[expect(clippy::print_stderr, reason = "errors of commands belong there")]
                {
                    eprintln!("weft: {}", Chain(error.as_ref()));
                }
                match error.downcast_ref() {
                    Some(ClientError::Unreachable { .. }) => ExitCode::from(3),
                    _ if error.is::<drain::Undrained>() => ExitCode::from(4),
                    _ => ExitCode::FAILURE,
                }
            }
        }
    }

    fn dispatch(self) -> anyhow::Result<()> {
        let Global { socket, format } = self.global;
        let client = Client::new(&socket);
        let stdout = &mut io::stdout().lock();
        let out = &mut Output::new(format, stdout);
        match self.command {
            // These start before any thread does: the agent and a sandbox change namespaces.
            Command::Agent(command) => command.run(socket),
            Command::Run(command) => command.run(&client, out),
            Command::Completion(command) => command.run(out),
            Command::Init(command) => command.run(out),
            Command::Join(command) => wait(command.run(out)),
            Command::Token(command) => wait(command.run(&client, out)),
            Command::Network(command) => wait(command.run(&client, out)),
            Command::Service(command) => wait(command.run(&client, out)),
            Command::Publish(command) => wait(command.run(&client, out)),
            Command::Unpublish(command) => wait(command.run(&client, out)),
            Command::Port(command) => wait(command.run(&client, out)),
            Command::Attach(command) => wait(command.run(&client, out)),
            Command::Detach(command) => wait(command.run(&client, out)),
            Command::Drain(command) => wait(command.run(&client, out)),
            Command::Expose(command) => wait(command.run(&client, out)),
            Command::Hide(command) => wait(command.run(&client, out)),
            Command::Ps(command) => wait(command.run(&client, out)),
            Command::Docker(command) => wait(command.run(&client, out)),
            Command::Nodes(command) => wait(command.run(&client, out)),
            Command::Status(command) => wait(command.run(&client, out)),
            Command::Resolve(command) => wait(command.run(&client, out)),
        }
    }
}

/// Runs one command's future on a runtime of its own.
fn wait<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_teaches_with_an_example() {
        fn check(command: &clap::Command) {
            for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
                let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                let parent = sub.has_subcommands();
                assert!(parent || help.contains("Example"), "{} has no example", sub.get_name());
                check(sub);
            }
        }
        check(&Cli::command());
    }
}
