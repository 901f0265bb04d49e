use std::process::ExitCode;

use clap::Parser;
use weft_agent::{
    cli::Cli,
    engines::{Role, cni, podman},
};

fn main() -> ExitCode {
    match Role::of(std::env::args_os().next().as_deref()) {
        Role::Weft => Cli::parse().execute(),
        Role::Cni => cni::run(),
        Role::Netavark => podman::run(),
    }
}
