//! Counts of what was asked and what became of it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use weft_model::NetworkId;

/// All counts of one server, as one moment showed them. Counts only grow.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Snapshot {
    pub networks: BTreeMap<NetworkId, QueryCounts>,
    pub upstream: UpstreamCounts,
}

/// Writes a struct of counts twice: as plain numbers, and as the atomics behind them.
macro_rules! counts {
    ($(#[$doc:meta])* $plain:ident, $atomic:ident { $($(#[$field_doc:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        pub struct $plain {
            $($(#[$field_doc])* pub $field: u64,)*
        }

        #[derive(Debug, Default)]
        pub(crate) struct $atomic {
            $(pub(crate) $field: Count,)*
        }

        impl $atomic {
            pub(crate) fn read(&self) -> $plain {
                $plain { $($field: self.$field.read(),)* }
            }
        }
    };
}

counts! {
    /// What became of the queries of one network. Each query is counted once, except where a field
    /// says otherwise.
    QueryCounts, QueryCounters {
        /// With records of ours.
        answered,
        /// The name exists, the type does not.
        nodata,
        /// No such name, or a name that an internal network may not resolve.
        nxdomain,
        /// Answered by an upstream server, whatever it said.
        forwarded,
        /// FORMERR, NOTIMP, BADVERS, REFUSED.
        refused,
        /// SERVFAIL: no upstream server answered, a limit was reached, or the network is unknown.
        failed,
        /// Without an answer: what came was no query, or the socket took no more (those are counted
        /// above as well).
        dropped,
        /// UDP answers, counted above as well, that told the client to come by TCP.
        truncated,
        /// TCP connections closed at once because of a limit.
        connections_refused,
    }
}

counts! {
    /// What the upstream servers did. One query may take several attempts.
    UpstreamCounts, UpstreamCounters {
        /// Queries, including those beyond a limit.
        queries,
        /// Attempts that ended with a reply.
        replies,
        /// The time those replies took, all together, in microseconds.
        reply_micros,
        /// Attempts without a reply in time.
        timeouts,
        /// Attempts that ended with a socket error, such as a refused port.
        errors,
        /// Packets that were no reply to what was asked: a late reply, or a forgery.
        mismatches,
        /// Queries that were not sent because too many were under way.
        over_limit,
        /// Queries that were not sent because no server is known.
        without_server,
    }
}

/// One number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Relaxed);
    }

    pub(crate) fn increment(&self) {
        self.add(1);
    }

    fn read(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl UpstreamCounters {
    pub(crate) fn reply(&self, took: Duration) {
        self.replies.increment();
        self.reply_micros.add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }
}

/// A server's counts; clones show the same.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    networks: Arc<Mutex<BTreeMap<NetworkId, Arc<QueryCounters>>>>,
    pub(crate) upstream: Arc<UpstreamCounters>,
}

impl Counters {
    pub fn snapshot(&self) -> Snapshot {
        let networks = self.networks.lock().unwrap_or_else(PoisonError::into_inner);
        Snapshot {
            networks: networks.iter().map(|(id, counters)| (*id, counters.read())).collect(),
            upstream: self.upstream.read(),
        }
    }

    pub(crate) fn network(&self, id: NetworkId) -> Arc<QueryCounters> {
        let mut networks = self.networks.lock().unwrap_or_else(PoisonError::into_inner);
        networks.entry(id).or_default().clone()
    }

    /// Ends the counts of a network that is no longer served.
    pub(crate) fn forget(&self, id: NetworkId) {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}
