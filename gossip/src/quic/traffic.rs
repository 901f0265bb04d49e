use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

macro_rules! traffic {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What has gone over the wire, and what has not.
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        pub struct Traffic {
            $($(#[$doc])* pub $name: u64,)*
        }

        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $($name: AtomicU64,)*
        }

        impl Counters {
            pub(super) fn read(&self) -> Traffic {
                Traffic { $($name: self.$name.load(Ordering::Relaxed),)* }
            }

            pub(super) fn oversized(&self) {
                self.dropped_oversized.fetch_add(1, Ordering::Relaxed);
            }

            pub(super) fn not_sent(&self) {
                self.dropped_outgoing.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
}

traffic! {
    /// Messages that went out in a datagram of their own.
    sent_datagrams,
    /// Messages that went out on a stream.
    sent_streams,
    sent_bytes,
    received_datagrams,
    received_streams,
    received_bytes,
    /// Messages that were longer than [`crate::MAX_MESSAGE_BYTES`].
    dropped_oversized,
    /// Messages that no connection came up for in time, or that found a full queue.
    dropped_outgoing,
    /// Messages that arrived faster than they were taken.
    dropped_incoming,
}

impl Traffic {
    pub fn sent_messages(&self) -> u64 {
        self.sent_datagrams + self.sent_streams
    }

    pub fn received_messages(&self) -> u64 {
        self.received_datagrams + self.received_streams
    }
}

/// Counts for one peer and for the whole carrier.
#[derive(Debug, Default)]
pub(super) struct Meter {
    own: Counters,
    total: Arc<Counters>,
}

impl Meter {
    pub(super) fn new(total: Arc<Counters>) -> Self {
        Self { own: Counters::default(), total }
    }

    pub(super) fn read(&self) -> Traffic {
        self.own.read()
    }

    pub(super) fn sent(&self, way: Way, bytes: usize) {
        self.add(bytes as u64, |c| &c.sent_bytes);
        self.add(1, |c| match way {
            Way::Datagram => &c.sent_datagrams,
            Way::Stream => &c.sent_streams,
        });
    }

    pub(super) fn received(&self, way: Way, bytes: usize) {
        self.add(bytes as u64, |c| &c.received_bytes);
        self.add(1, |c| match way {
            Way::Datagram => &c.received_datagrams,
            Way::Stream => &c.received_streams,
        });
    }

    pub(super) fn oversized(&self) {
        self.add(1, |c| &c.dropped_oversized);
    }

    pub(super) fn not_sent(&self, messages: usize) {
        self.add(messages as u64, |c| &c.dropped_outgoing);
    }

    pub(super) fn not_taken(&self) {
        self.add(1, |c| &c.dropped_incoming);
    }

    fn add(&self, amount: u64, counter: impl Fn(&Counters) -> &AtomicU64) {
        counter(&self.own).fetch_add(amount, Ordering::Relaxed);
        counter(&self.total).fetch_add(amount, Ordering::Relaxed);
    }
}

/// How a message travels.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    Datagram,
    Stream,
}
