use std::{sync::Arc, time::Duration};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_vxlan::{DataPlane, Namespace, NamespaceError};

use crate::{Desired, Status, board::Board, host::HostTask};

/// Where and how the balancer works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The host's namespace; that of the thread which calls [`Balancer::start`] when absent.
    pub host: Option<Namespace>,
    /// The cluster's, the same on all hosts: they choose alike.
    pub seed: u32,
    /// How often everything is read again, notifications or not.
    pub resync: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { host: None, seed: 0x7765_6674, resync: Duration::from_secs(30) }
    }
}

/// The running balancer. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Balancer {
    board: Board,
}

impl Balancer {
    /// Starts the reconcilers on `tracker`, until `stop`. What they have made stays.
    ///
    /// They follow `desired`, in the namespaces that `plane` makes. As long as it is `None`, the
    /// desired state is not known yet and nothing is changed.
    ///
    /// # Errors
    ///
    /// The host's namespace cannot be opened or listened to.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start(
        config: Config,
        plane: DataPlane,
        desired: watch::Receiver<Option<Arc<Desired>>>,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        let host = match config.host {
            Some(host) => host,
            None => Namespace::current()?,
        };
        let board = Board::new();
        let task =
            HostTask { namespace: host, desired, board: board.clone(), resync: config.resync };
        tracker.spawn(task.run(stop.child_token()));
        let _ = plane;
        Ok(Self { board })
    }

    /// What is in force, and what could not be done.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.board.subscribe()
    }
}

/// Why the balancer did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("failed to open the host's network namespace")]
    Namespace(#[from] NamespaceError),
}
