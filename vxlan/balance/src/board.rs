//! Where the tasks post what they did.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{HostStatus, Status};

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

    pub(crate) fn update_host(&self, update: impl FnOnce(&mut HostStatus)) {
        self.0.send_modify(|status| update(&mut Arc::make_mut(status).host));
    }
}
