//! What Docker was told and told us: its networks, pools and endpoints, as they stand on disk.
//!
//! Docker asks for a network once and never says it again, so this must outlive the agent.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use weft_gossip::identity::{FileError, write_atomic};
use weft_model::{EndpointId, Label, MacAddr, NetworkId};

use super::{
    protocol::EngineId,
    wanted::{Range, Wanted},
};

/// Everything that is known of Docker's networks.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Known {
    pub(super) pools: BTreeMap<String, Pool>,
    pub(super) networks: BTreeMap<EngineId, DockerNetwork>,
    pub(super) endpoints: BTreeMap<EngineId, DockerEndpoint>,
}

/// A pool that Docker asked for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Pool {
    pub(super) range: Range,
    /// The cluster's network that `--ipam-opt weft.network` named.
    pub(super) name: Option<Label>,
    /// Docker's network that it became part of.
    pub(super) network: Option<EngineId>,
    /// Seconds since the Unix epoch.
    pub(super) since: u64,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct DockerNetwork {
    pub(super) wanted: Wanted,
    /// The cluster's network, once it is known which one it is.
    pub(super) network: Option<NetworkId>,
    /// Seconds since the Unix epoch.
    pub(super) since: u64,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct DockerEndpoint {
    pub(super) network: EngineId,
    /// IPv4 first.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) mac: MacAddr,
    /// Present while it is joined to a sandbox.
    pub(super) joined: Option<JoinedAs>,
    /// When it was made or last joined, in seconds since the Unix epoch.
    pub(super) since: u64,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct JoinedAs {
    /// Where Docker mounts the sandbox's namespace.
    pub(super) sandbox: PathBuf,
    pub(super) endpoint: EndpointId,
}

impl Known {
    /// The network of the cluster that an endpoint is in.
    pub(super) fn network_of(&self, endpoint: &DockerEndpoint) -> Option<NetworkId> {
        self.networks.get(&endpoint.network)?.network
    }

    /// The endpoints of one of Docker's networks.
    pub(super) fn endpoints_of(
        &self,
        network: &EngineId,
    ) -> impl Iterator<Item = (&EngineId, &DockerEndpoint)> {
        self.endpoints.iter().filter(move |(_, endpoint)| endpoint.network == *network)
    }
}

/// The registry: one value, on disk before anybody sees it.
pub(super) struct Registry {
    path: PathBuf,
    known: Mutex<Known>,
}

impl Registry {
    /// Opens the registry in `state_dir`; an empty one where there is none.
    ///
    /// # Errors
    ///
    /// The file cannot be read or understood.
    pub(super) fn open(state_dir: &Path) -> Result<Self, RegistryError> {
        let path = state_dir.join("docker.json");
        let known = match fs::read(&path) {
            Ok(bytes) => {
                let stored: Versioned = serde_json::from_slice(&bytes)
                    .map_err(|source| RegistryError::Invalid { path: path.clone(), source })?;
                match stored.version {
                    VERSION => stored.known,
                    version => return Err(RegistryError::Version { path, version }),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Known::default(),
            Err(source) => return Err(RegistryError::Unreadable { path, source }),
        };
        Ok(Self { path, known: Mutex::new(known) })
    }

    /// Reads it.
    pub(super) async fn read<T>(&self, read: impl FnOnce(&Known) -> T) -> T {
        read(&*self.known.lock().await)
    }

    /// Changes it, and brings the change to disk. Nothing has changed if that fails.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(super) async fn change<T>(
        &self,
        change: impl FnOnce(&mut Known) -> T,
    ) -> Result<T, RegistryError> {
        let mut known = self.known.lock().await;
        let mut changed = known.clone();
        let result = change(&mut changed);
        if *known != changed {
            let stored = Versioned { version: VERSION, known: changed };
            let bytes = serde_json::to_vec(&stored).expect("a registry is plain data");
            write_atomic(&self.path, &bytes)
                .map_err(|source| RegistryError::Unwritable { path: self.path.clone(), source })?;
            *known = stored.known;
        }
        Ok(result)
    }
}

const VERSION: u32 = 1;

#[derive(Deserialize, Serialize)]
struct Versioned {
    version: u32,
    #[serde(flatten)]
    known: Known,
}

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("cannot read {}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "{} is damaged: restore it from a backup, or remove it and create Docker's networks anew",
        path.display()
    )]
    Invalid { path: PathBuf, source: serde_json::Error },
    #[error("{} has format {version}, this agent reads {VERSION}: install the version that wrote it", path.display())]
    Version { path: PathBuf, version: u32 },
    #[error("cannot write {}: free space, or make the directory writable", path.display())]
    Unwritable { path: PathBuf, source: FileError },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_registered_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let id: EngineId = "4d4a39a0dace".to_owned().try_into().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        let network = DockerNetwork { wanted: Wanted::default(), network: None, since: 0 };
        registry.change(|known| known.networks.insert(id.clone(), network.clone())).await.unwrap();

        let again = Registry::open(dir.path()).unwrap();
        assert_eq!(again.read(|known| known.networks.get(&id).cloned()).await, Some(network));
        fs::write(dir.path().join("docker.json"), "{\"version\":1,\"netw").unwrap();
        assert!(matches!(Registry::open(dir.path()), Err(RegistryError::Invalid { .. })));
    }
}
