//! Container engines on hosts of the lab.

mod cgroups;
mod containerd;
mod docker;
mod image;
mod podman;
mod tree;

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};

use crate::{Host, command::Ran, eventually};

pub use containerd::Containerd;
pub use docker::Docker;
pub use image::IMAGE;
pub use podman::Podman;

/// How long a name may take to come or go, and what an engine removed to be gone.
const SOON: Duration = Duration::from_secs(20);

/// An engine on one host, of which the commands are those of Docker.
pub trait Engine {
    fn host(&self) -> &Arc<Host>;

    /// Runs the engine's client with `args`, and returns what became of it.
    ///
    /// # Errors
    ///
    /// The host is off.
    fn try_run_args(&self, args: &[&str]) -> anyhow::Result<Ran>;

    /// Runs the client with `args`, and returns what it printed.
    ///
    /// # Errors
    ///
    /// The command fails.
    fn run_args(&self, args: &[&str]) -> anyhow::Result<String> {
        self.try_run_args(args)?.ok()
    }

    /// Runs the client with `line`, split at white space, and returns what became of it.
    ///
    /// # Errors
    ///
    /// The host is off.
    fn try_run(&self, line: &str) -> anyhow::Result<Ran> {
        self.try_run_args(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs the client with `line`, split at white space, and returns what it printed.
    ///
    /// # Errors
    ///
    /// The command fails.
    fn run(&self, line: &str) -> anyhow::Result<String> {
        self.try_run(line)?.ok()
    }

    /// Runs the client with `line`, which the engine must refuse with all of `words` in the reason.
    ///
    /// # Errors
    ///
    /// The command succeeds, or a word is missing.
    fn refuses(&self, line: &str, words: &[&str]) -> anyhow::Result<()> {
        let ran = self.try_run(line)?;
        ensure!(ran.code != 0, "{ran}");
        for word in words {
            ensure!(ran.stderr.contains(word), "the error lacks {word:?}: {ran}");
        }
        Ok(())
    }

    /// Runs a shell script in a container and returns what it printed.
    ///
    /// # Errors
    ///
    /// The script fails.
    fn sh(&self, container: &str, script: &str) -> anyhow::Result<String> {
        self.run_args(&["exec", container, "sh", "-ec", script])
    }

    /// What the container's own resolver library answers for `name`, sorted.
    ///
    /// # Errors
    ///
    /// It finds no address.
    fn resolve(&self, container: &str, name: &str) -> anyhow::Result<Vec<IpAddr>> {
        let text = self.run_args(&["exec", container, "getent", "ahosts", name])?;
        let mut found = Vec::new();
        for line in text.lines() {
            found.push(line.split_whitespace().next().context("an empty line")?.parse()?);
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// Pings a name or an address once from a container.
    ///
    /// # Errors
    ///
    /// There is no answer within a second.
    fn ping(&self, container: &str, target: &str) -> anyhow::Result<()> {
        self.run_args(&["exec", container, "ping", "-n", "-c", "1", "-W", "1", target]).map(drop)
    }

    /// Waits until `container` resolves `name` to just `expected`.
    ///
    /// # Errors
    ///
    /// It does not within 5 s.
    fn finds(&self, container: &str, name: &str, expected: &[IpAddr]) -> anyhow::Result<()> {
        let mut expected = expected.to_vec();
        expected.sort();
        let what = format!("{container} on {} finds {name}", self.host().name());
        eventually(SOON, &what, || {
            let found = self.resolve(container, name)?;
            ensure!(found == expected, "{found:?}, not {expected:?}");
            Ok(())
        })
    }

    /// Sees that `container` does not resolve `name`, at this moment.
    ///
    /// # Errors
    ///
    /// It does.
    fn misses(&self, container: &str, name: &str) -> anyhow::Result<()> {
        match self.resolve(container, name) {
            Ok(found) => anyhow::bail!("{container} finds {name}: {found:?}"),
            Err(_) => Ok(()),
        }
    }

    /// Waits until `container` resolves `name` no more.
    ///
    /// # Errors
    ///
    /// It still does after 5 s.
    fn loses(&self, container: &str, name: &str) -> anyhow::Result<()> {
        let what = format!("{container} on {} finds {name} no more", self.host().name());
        eventually(SOON, &what, || self.misses(container, name))
    }

    /// Waits until no endpoint, interface or namespace of weft's is left on a host without
    /// containers.
    ///
    /// # Errors
    ///
    /// There is one after 5 s.
    fn leaves_nothing(&self) -> anyhow::Result<()> {
        let host = self.host();
        eventually(SOON, &format!("nothing is left on {}", host.name()), || {
            let endpoints = host.weft_json("ps")?;
            let name = host.name();
            let own =
                endpoints.as_array().into_iter().flatten().filter(|e| e["node"] == name).count();
            let links = host.sh("ip -o link")?;
            let namespaces = host.sh("ls /run/netns")?;
            ensure!(
                own == 0 && !links.contains("wfp") && namespaces.is_empty(),
                "{endpoints} {links} {namespaces}"
            );
            Ok(())
        })
    }
}
