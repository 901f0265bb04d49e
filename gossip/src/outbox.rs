use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use weft_model::NodeId;

/// Messages for many members, sent to a slice of them at a time.
///
/// In a large cluster a change goes to every member straight from its writer: one short message
/// each is a small part of what it would cost to pass the change on by extra exchanges, each of
/// which carries a digest of the whole cluster. The slices keep that from being one burst, and from
/// opening hundreds of connections at the same instant.
#[derive(Debug)]
pub(crate) struct Outbox {
    slice: usize,
    pending: Vec<Pending>,
    due: Option<Instant>,
}

/// One message and who still has to get it, the next ones last.
#[derive(Debug)]
struct Pending {
    message: Bytes,
    receivers: Vec<NodeId>,
}

impl Outbox {
    /// An outbox that sends to `slice` members at a time; if that is zero, to none.
    pub(crate) fn new(slice: usize) -> Self {
        Self { slice, pending: Vec::new(), due: None }
    }

    pub(crate) fn slice(&self) -> usize {
        self.slice
    }

    /// Takes a message and returns those of `receivers`, the first of them, who get it now.
    pub(crate) fn post(
        &mut self,
        message: Bytes,
        mut receivers: Vec<NodeId>,
        now: Instant,
    ) -> Vec<NodeId> {
        receivers.reverse();
        let first = next_slice(&mut receivers, self.slice);
        if self.slice > 0 && !receivers.is_empty() {
            self.pending.push(Pending { message, receivers });
            self.due.get_or_insert(now + SLICE_PAUSE);
        }
        first
    }

    /// When the next slice is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The next slice of each message.
    pub(crate) fn take(&mut self, now: Instant) -> Vec<(Bytes, Vec<NodeId>)> {
        let slice = self.slice;
        let taken = self
            .pending
            .iter_mut()
            .map(|pending| (pending.message.clone(), next_slice(&mut pending.receivers, slice)));
        let taken = taken.collect();
        self.pending.retain(|pending| !pending.receivers.is_empty());
        self.due = (!self.pending.is_empty()).then(|| now + SLICE_PAUSE);
        taken
    }
}

fn next_slice(receivers: &mut Vec<NodeId>, slice: usize) -> Vec<NodeId> {
    let rest = receivers.len().saturating_sub(slice);
    let mut next = receivers.split_off(rest);
    next.reverse();
    next
}

/// Between two slices. 500 members take eight slices of 64.
const SLICE_PAUSE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_receiver_gets_a_message_once_and_the_first_ones_first() {
        let mut now = Instant::now();
        let mut outbox = Outbox::new(3);
        let all: Vec<_> = (0..8).map(|n| NodeId::from([n; 16])).collect();
        let mut sent = outbox.post(Bytes::from_static(b"a"), all.clone(), now);
        assert_eq!(sent, all[..3]);
        assert_eq!(outbox.post(Bytes::from_static(b"b"), all[..3].to_vec(), now), all[..3]);
        while let Some(due) = outbox.due() {
            assert!(due > now);
            now = due;
            for (message, slice) in outbox.take(now) {
                assert_eq!(&message[..], b"a");
                assert!(slice.len() <= 3);
                sent.extend(slice);
            }
        }
        assert_eq!(sent, all);
    }

    #[test]
    fn slices_of_nobody_send_nothing() {
        let mut outbox = Outbox::new(0);
        let now = Instant::now();
        assert_eq!(outbox.post(Bytes::new(), vec![NodeId::from([1; 16])], now), []);
        assert_eq!(outbox.due(), None);
    }
}
