//! What an engine's plugin, which is called once an operation, leaves with the agent so that later
//! calls find it again: labels on the endpoint.

use weft_model::Labels;

use crate::api::{
    client::{Client, ClientError, encode},
    types::EndpointStatus,
};

const ENGINE: &str = "weft.engine";
const NETWORK: &str = "weft.engine.network";
const CONTAINER: &str = "weft.engine.container";
const IFNAME: &str = "weft.engine.ifname";

/// Names one attachment as its engine does.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct AttachmentKey {
    /// Which plugin made it: those of another one are not ours to remove.
    pub(crate) engine: &'static str,
    /// What the engine calls the network.
    pub(crate) network: String,
    pub(crate) container: String,
    pub(crate) ifname: String,
}

impl AttachmentKey {
    pub(crate) fn labels(&self) -> Labels {
        let pairs = [
            (ENGINE, self.engine),
            (NETWORK, &self.network),
            (CONTAINER, &self.container),
            (IFNAME, &self.ifname),
        ];
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// Whether `labels` are those of this attachment.
    pub(crate) fn is_of(&self, labels: &Labels) -> bool {
        self.labels().iter().all(|(key, value)| labels.get(key) == Some(value))
    }

    /// The endpoints of this host that stand for the attachment: one, or none.
    ///
    /// # Errors
    ///
    /// The agent does not answer.
    pub(crate) async fn find(&self, agent: &Client) -> Result<Vec<EndpointStatus>, ClientError> {
        let mut found = here(agent, CONTAINER, &self.container).await?;
        found.retain(|endpoint| self.is_of(&endpoint.labels));
        Ok(found)
    }

    /// The endpoints of this host that stand for the same container's other attachments by its engine.
    ///
    /// # Errors
    ///
    /// The agent does not answer.
    pub(crate) async fn beside(&self, agent: &Client) -> Result<Vec<EndpointStatus>, ClientError> {
        let mut found = here(agent, CONTAINER, &self.container).await?;
        found.retain(|endpoint| {
            let engine = endpoint.labels.get(ENGINE).is_some_and(|engine| engine == self.engine);
            engine && !self.is_of(&endpoint.labels)
        });
        Ok(found)
    }

    /// Takes the attachment away. Succeeds where there is none.
    ///
    /// # Errors
    ///
    /// The agent does not answer, or the kernel did not let go.
    pub(crate) async fn detach(&self, agent: &Client) -> Result<(), ClientError> {
        for endpoint in self.find(agent).await? {
            detach(agent, &endpoint).await?;
        }
        Ok(())
    }
}

/// The engine that labels name, and what it calls the container.
pub(crate) fn engine_of(labels: &Labels) -> Option<(&str, &str)> {
    Some((labels.get(ENGINE)?, labels.get(CONTAINER)?))
}

/// The endpoints that `engine` has on this host in what it calls `network`, each with its container
/// and interface.
///
/// # Errors
///
/// The agent does not answer.
pub(crate) async fn attachments_of(
    agent: &Client,
    engine: &str,
    network: &str,
) -> Result<Vec<(EndpointStatus, String, String)>, ClientError> {
    let own = |labels: &Labels| labels.get(ENGINE).is_some_and(|own| own == engine);
    let found = here(agent, NETWORK, network).await?.into_iter().filter_map(|endpoint| {
        let container = endpoint.labels.get(CONTAINER)?.clone();
        let ifname = endpoint.labels.get(IFNAME)?.clone();
        own(&endpoint.labels).then_some((endpoint, container, ifname))
    });
    Ok(found.collect())
}

/// Detaches an endpoint of this host. Succeeds if it has gone already.
///
/// # Errors
///
/// The agent does not answer, or the kernel did not let go.
pub(crate) async fn detach(agent: &Client, endpoint: &EndpointStatus) -> Result<(), ClientError> {
    match agent.delete(&format!("/v1/endpoints/{}", endpoint.id)).await {
        Err(error) if error.is_missing() => Ok(()),
        other => other,
    }
}

async fn here(agent: &Client, key: &str, value: &str) -> Result<Vec<EndpointStatus>, ClientError> {
    agent.get(&format!("/v1/endpoints?here=true&label={}", encode(&format!("{key}={value}")))).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_told_from_its_neighbours_by_every_part_of_its_key() {
        let key = AttachmentKey {
            engine: "cni",
            network: "app".into(),
            container: "c1".into(),
            ifname: "eth0".into(),
        };
        assert!(key.is_of(&key.labels()));
        for other in [
            AttachmentKey { engine: "podman", ..key.clone() },
            AttachmentKey { network: "db".into(), ..key.clone() },
            AttachmentKey { container: "c2".into(), ..key.clone() },
            AttachmentKey { ifname: "eth1".into(), ..key.clone() },
        ] {
            assert!(!key.is_of(&other.labels()), "{other:?}");
        }
        assert!(!key.is_of(&Labels::new()));
    }
}
