//! The published ports of the host.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time};
use tokio_util::sync::CancellationToken;
use weft_vxlan::Namespace;

use crate::{Desired, board::Board};

/// Brings the host's table to the desired state.
#[derive(Debug)]
pub(crate) struct HostTask {
    pub(crate) namespace: Namespace,
    pub(crate) desired: watch::Receiver<Option<Arc<Desired>>>,
    pub(crate) board: Board,
    pub(crate) resync: Duration,
}

impl HostTask {
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let desired = self.desired.borrow_and_update().clone();
            if let Some(desired) = desired {
                tracing::trace!(namespace = ?self.namespace.path(), ports = desired.host.ports.len(), "host");
                self.board.update_host(|status| status.applied = Some(Arc::clone(&desired.host)));
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = time::sleep(self.resync) => {}
                changed = self.desired.changed() => if changed.is_err() { return },
            }
        }
    }
}
