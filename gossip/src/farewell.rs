use std::{collections::BTreeSet, time::Duration};

use tokio::{sync::oneshot, time::Instant};
use weft_model::NodeId;

use crate::push::Push;

/// The announcement that this node leaves, until all have confirmed it.
#[derive(Debug)]
pub(crate) struct Farewell {
    reply: oneshot::Sender<usize>,
    waiting: BTreeSet<NodeId>,
    pushes: Vec<Push>,
    repeat_at: Instant,
    until: Instant,
}

impl Farewell {
    pub(crate) fn new(
        reply: oneshot::Sender<usize>,
        waiting: BTreeSet<NodeId>,
        now: Instant,
        timeout: Duration,
    ) -> Self {
        Self { reply, waiting, pushes: Vec::new(), repeat_at: now, until: now + timeout }
    }

    /// The number on the receipts. There is one farewell at a time.
    pub(crate) fn number(&self) -> u64 {
        RECEIPT
    }

    /// Whether it has not been sent yet.
    pub(crate) fn is_new(&self) -> bool {
        self.pushes.is_empty()
    }

    /// What to send again to those that have not confirmed.
    pub(crate) fn set_pushes(&mut self, pushes: Vec<Push>) {
        self.pushes = pushes;
    }

    pub(crate) fn confirm(&mut self, node: NodeId, number: u64) {
        if number == RECEIPT {
            self.waiting.remove(&node);
        }
    }

    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.repeat_at <= now || self.is_over(now)
    }

    pub(crate) fn repeat(&mut self, now: Instant) -> (Vec<NodeId>, Vec<Push>) {
        self.repeat_at = now + REPEAT;
        (self.waiting.iter().copied().collect(), self.pushes.clone())
    }

    pub(crate) fn is_over(&self, now: Instant) -> bool {
        self.waiting.is_empty() || self.until <= now
    }

    /// Answers how many have not confirmed.
    pub(crate) fn end(self) {
        // Whoever asked may have gone away.
        let _ = self.reply.send(self.waiting.len());
    }
}

const RECEIPT: u64 = 1;
const REPEAT: Duration = Duration::from_millis(200);
