//! Where the tasks post what they did.

use std::sync::Arc;

use tokio::sync::watch;

use weft_model::NetworkId;

use crate::{HostStatus, NetworkStatus, Status};

/// The one place of the status; every task writes its own part of it.
#[derive(Clone, Debug)]
pub(crate) struct Board(Arc<watch::Sender<Arc<Status>>>);

impl Board {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Arc::new(Status::default()))))
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Status>> {
        self.0.subscribe()
    }

    pub(crate) fn update_network(&self, id: NetworkId, update: impl FnOnce(&mut NetworkStatus)) {
        self.0.send_modify(|status| {
            update(Arc::make_mut(status).networks.entry(id).or_default());
        });
    }

    pub(crate) fn forget_network(&self, id: NetworkId) {
        self.0.send_modify(|status| {
            Arc::make_mut(status).networks.remove(&id);
        });
    }

    pub(crate) fn update_host(&self, update: impl FnOnce(&mut HostStatus)) {
        self.0.send_modify(|status| update(&mut Arc::make_mut(status).host));
    }
}
