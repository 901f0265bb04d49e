//! Docker's network driver and IPAM driver `weft`.
//!
//! The plugin's calls come in at [`plugin`] and go to one [`driver`]. What Docker never says again
//! is in the [`registry`]. What the calls do not say, names above all, comes from Docker's API by
//! the task that follows its events.

mod addresses;
mod client;
mod driver;
mod endpoints;
mod follow;
mod names;
mod networks;
mod plugin;
mod pools;
mod ports;
mod protocol;
mod registry;
mod resolver;
mod wanted;
mod wishes;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::NetworkId;

pub use self::registry::RegistryError;
use self::{client::Client, driver::Driver, plugin::Scope, registry::Registry};
use crate::{
    api::{self, SocketError, types::CreateNetwork},
    chain::Chain,
    health::EngineContainers,
    ledger::{Ledger, Snapshots},
    listeners::Listeners,
    refusal::{Refusal, RefusalKind},
};

/// What the drivers are called.
const PLUGIN: &str = "weft";
/// What the plugin for swarms is called, which Docker itself runs.
const SWARM_PLUGIN: &str = "weft-swarm";
/// The address space that all pools are in.
const ADDRESS_SPACE: &str = "weft";
/// What the socket is called, beside the API's, at which swarms are served.
pub const SWARM_SOCKET: &str = "swarm.sock";
/// The label of a network that every host's Docker shall have.
pub const DOCKER_LABEL: &str = "weft.docker";

/// Where Docker is.
#[derive(Clone, Debug)]
pub struct Places {
    pub state_dir: PathBuf,
    /// Where Docker looks for the sockets of its plugins.
    pub plugin_dir: PathBuf,
    /// Where a plugin that Docker itself runs passes on what swarms ask.
    pub swarm_socket: PathBuf,
    /// Docker's own socket.
    pub socket: PathBuf,
}

/// Asks the driver. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    driver: Arc<Driver>,
}

impl Handle {
    /// What an operator should look at; empty when all is well.
    pub fn findings(&self) -> Vec<String> {
        self.driver.findings()
    }

    /// Docker's containers behind this host's endpoints.
    pub fn containers(&self) -> watch::Receiver<Arc<EngineContainers>> {
        self.driver.containers.subscribe()
    }

    /// Stops a container, and returns when it has stopped.
    ///
    /// # Errors
    ///
    /// Docker does not answer, or refuses.
    pub async fn stop_container(&self, id: &str) -> Result<(), Refusal> {
        self.driver.client.stop_container(id).await.map_err(|error| {
            Refusal::new(
                RefusalKind::Failed,
                format!("cannot stop container {id}: {}", Chain(&error)),
            )
        })
    }

    /// Creates a network that every host's Docker gets, also those of hosts that join later. On
    /// return this host's Docker has it.
    ///
    /// # Errors
    ///
    /// Docker does not answer on this host, the network cannot be created, or Docker refuses it.
    pub async fn create_everywhere(&self, request: CreateNetwork) -> Result<NetworkId, Refusal> {
        self.driver.create_everywhere(request).await
    }
}

/// The running plugin.
pub struct Docker {
    handle: Handle,
    sockets: [PathBuf; 2],
    stop: CancellationToken,
    calls: TaskTracker,
}

impl Docker {
    /// Serves Docker's calls and follows its events.
    ///
    /// # Errors
    ///
    /// The plugin's socket cannot be made, or the registry cannot be read.
    pub async fn start(
        places: &Places,
        ledger: Ledger,
        snapshots: Snapshots,
        listeners: Listeners,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        let registry = Registry::open(&places.state_dir)?;
        let client = Client::new(&places.socket, tracker.clone());
        let driver = Arc::new(Driver::new(registry, ledger, snapshots, client));
        let local = places.plugin_dir.join(format!("{PLUGIN}.sock"));
        let handle = Handle { driver: Arc::clone(&driver) };
        let (stop_calls, calls) = (stop.child_token(), TaskTracker::new());
        for (socket, scope) in [(&local, Scope::Local), (&places.swarm_socket, Scope::Swarm)] {
            let listener = api::bind(socket, None)
                .await
                .map_err(|source| StartError::Socket { socket: socket.clone(), source })?;
            let served = axum::serve(listener, plugin::router(Arc::clone(&driver), scope))
                .with_graceful_shutdown(stop_calls.clone().cancelled_owned());
            calls.spawn(async move {
                if let Err(error) = served.await {
                    tracing::error!(error = %Chain(&error), "Docker's plugin has ended");
                }
            });
        }
        let sockets = [local, places.swarm_socket.clone()];
        let docker = Self { handle, sockets, stop: stop_calls, calls };
        tracker.spawn(resolver::serve(Arc::clone(&driver), listeners, stop.child_token()));
        tracker.spawn(follow::follow(driver, tracker.clone(), stop.child_token()));
        Ok(docker)
    }

    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Takes no more calls, and waits for those under way.
    pub async fn stop(&self, grace: Duration) {
        // Docker tries again where there is no socket; a call that is cut off comes back empty.
        self.sockets.iter().for_each(|socket| remove(socket));
        self.stop.cancel();
        self.calls.close();
        if tokio::time::timeout(grace, self.calls.wait()).await.is_err() {
            tracing::warn!("a call of Docker's did not end in time");
        }
    }
}

fn remove(socket: &Path) {
    if let Err(error) = fs::remove_file(socket) {
        tracing::debug!(socket = %socket.display(), %error, "cannot remove the plugin's socket");
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(
        "cannot serve Docker at {}: change docker_plugin_dir, or set docker = false",
        socket.display()
    )]
    Socket { socket: PathBuf, source: SocketError },
}
