use std::sync::Arc;

use tokio::sync::watch;
use weft_balance::{Desired, HostPorts, Status};

use super::keeper::Keeper;
use crate::projection::{Acknowledged, balance, carried, drained};

/// The way to what translates in the kernel, and back.
pub struct Balancing {
    /// What services the kernel shall know; nothing until the keeper has understood what there is.
    pub desired: watch::Sender<Option<Arc<Desired>>>,
    pub status: watch::Receiver<Arc<Status>>,
    pub ports: HostPorts,
}

impl Keeper {
    pub(super) fn project_balance(&mut self) {
        let warming_up = self.is_warming_up();
        let before = self.links.balance.desired.borrow().clone();
        let before = before.as_deref();
        let desired = balance(self.context, &self.cluster, &self.book, before, warming_up);
        if before != Some(&desired) {
            self.links.balance.desired.send_replace(Some(Arc::new(desired)));
        }
    }

    /// Writes into the book what the kernel sends no new connection to any more; returns whether that
    /// has changed. The others are told once it is on disk.
    pub(super) fn acknowledge(&mut self) -> bool {
        let status = Arc::clone(&self.links.balance.status.borrow_and_update());
        let desired = self.links.balance.desired.borrow().clone();
        let Some(desired) = desired else { return false };
        let carried = carried(&self.cluster, &self.book);
        let before = Acknowledged { drained: &self.book.drained, held: self.is_warming_up() };
        let drained = drained(&self.cluster, &carried, &desired, &status, before);
        let changed = self.book.drained != drained;
        if changed {
            Arc::make_mut(&mut self.book).drained = drained;
        }
        changed
    }
}
