use std::{process::Command, sync::Arc};

use crate::{Container, Host, command::Ran};

/// Where a command runs: on a host itself, or in a container.
#[derive(Debug)]
pub enum Place {
    Host(Arc<Host>),
    Container(Container),
}

impl Place {
    /// Runs a command there, at most a minute.
    ///
    /// # Errors
    ///
    /// It is gone. A command that fails is a value: see [`Ran::ok`].
    pub fn exec(&self, argv: &[&str]) -> anyhow::Result<Ran> {
        match self {
            Self::Host(host) => host.exec(argv),
            Self::Container(container) => container.exec(argv),
        }
    }

    /// A command that enters it first, and ends within a minute.
    pub(crate) fn command(&self, argv: &[&str]) -> anyhow::Result<Command> {
        match self {
            Self::Host(host) => host.command(argv),
            Self::Container(container) => container.command(argv),
        }
    }
}
