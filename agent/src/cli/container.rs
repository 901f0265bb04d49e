//! Containers of this host that weft knows by name: their network namespaces, for others to share.

use std::collections::BTreeSet;

use anyhow::{Context, bail};
use weft_model::Label;
use weft_vxlan::Namespace;

use super::{Client, client::encode};
use crate::api::types::{Attached, EndpointStatus, Sandbox};

/// What goes before a container's name where a network or a namespace could stand.
const PREFIX: &str = "container:";

/// A container of this host.
pub(super) struct Container {
    pub(super) namespace: Namespace,
    pub(super) reference: Sandbox,
    /// Its endpoints on all of its networks.
    pub(super) endpoints: Vec<Attached>,
}

/// Reads `container:NAME`; `None` if it is something else.
pub(super) fn parse(text: &str) -> Option<Result<Label, String>> {
    let name = text.strip_prefix(PREFIX)?;
    Some(name.parse().map_err(|error| format!("{name:?}: {error}")))
}

/// Finds the container that has an endpoint called `name`.
pub(super) async fn find(agent: &Client, name: &Label) -> anyhow::Result<Container> {
    let here: Vec<EndpointStatus> = agent.get("/v1/endpoints?here=true").await?;
    let mut endpoints: Vec<Attached> = Vec::new();
    for endpoint in here.iter().filter(|endpoint| endpoint.reachable) {
        let id = endpoint.id.to_string();
        endpoints.push(agent.get(&format!("/v1/endpoints/{}", encode(&id))).await?);
    }
    let named = || endpoints.iter().filter(|attached| attached.endpoint.name == *name);
    let sandboxes: BTreeSet<_> = named().map(|attached| attached.sandbox.clone()).collect();
    if sandboxes.len() > 1 {
        let networks: Vec<_> = named().map(|other| other.endpoint.network.to_string()).collect();
        bail!(
            "{name} is another container on each of {}: name one by process id with weft attach",
            networks.join(", ")
        );
    }
    let sandbox = sandboxes.into_iter().next().with_context(|| {
        format!("there is no container {name} on this host: weft ps lists those on networks")
    })?;
    endpoints.retain(|attached| attached.sandbox == sandbox);
    let reference = endpoints.iter().find_map(|attached| attached.reference.clone());
    let reference = reference.context("the agent does not say where containers are: upgrade it")?;
    let namespace = reference.open_if(&sandbox)?;
    let namespace = namespace
        .with_context(|| format!("container {name} has ended: what was its process is another"))?;
    Ok(Container { namespace, reference, endpoints })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_named_by_its_prefix() {
        assert!(parse("app").is_none());
        assert_eq!(parse("container:web").unwrap().unwrap().as_str(), "web");
        assert!(parse("container:").unwrap().is_err());
    }
}
