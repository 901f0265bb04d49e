use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Print a shell's completion script
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft completion bash > /etc/bash_completion.d/weft")]
pub(super) struct Completion {
    shell: Shell,
}

impl Completion {
    pub(super) fn run(self, out: &mut impl Write) -> anyhow::Result<()> {
        // The generator panics where its output cannot be written, so it writes into memory.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "weft", &mut script);
        Ok(out.write_all(&script)?)
    }
}
