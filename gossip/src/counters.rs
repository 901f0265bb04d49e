use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::frame::Kind;

/// What gossip has done so far and how it stands: a snapshot for metrics.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    pub gossip: Flow,
    pub push: Flow,
    pub receipt: Flow,
    /// Received messages that could not be read, or came from where they may not.
    pub rejected: u64,
    /// Received messages of chitchat's that found its queue full.
    pub overflowed: u64,
    /// Gossip intervals passed.
    pub rounds: u64,
    /// Changes pushed to members.
    pub pushes: u64,
    /// Times that a new or returning member was pushed all records.
    pub full_pushes: u64,
    /// Extra exchanges started to find lost members.
    pub kicks: u64,
    /// Peers that became suspect.
    pub suspicions: u64,
    /// Times that verdicts were withheld: a stall of this agent, or many peers silent at once.
    pub frozen: u64,
    /// Times that the gossip task ended and was started again.
    pub restarts: u64,
    /// Times that records of an earlier life of this node with a number as high as its own were
    /// met: its generation did not grow.
    pub conflicts: u64,
    /// Members by liveness, this node included; now.
    pub alive: u64,
    pub suspect: u64,
    pub left: u64,
    /// Keys of all members that this version does not know; now.
    pub unknown_keys: u64,
    /// Values of all members that this version cannot read; now.
    pub undecodable: u64,
    /// How full chitchat's digest of the cluster is, in bytes of [`Counters::DIGEST_CAPACITY`]; now.
    pub digest_bytes: u64,
}

impl Counters {
    /// Bytes that the digest of a cluster may take. Above it chitchat 0.11.2 fails: about 850 nodes
    /// with IPv4 addresses, counting those that died or restarted within the grace time.
    pub const DIGEST_CAPACITY: u64 = 65_506;
}

/// Messages of one kind.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Flow {
    pub sent_messages: u64,
    pub sent_bytes: u64,
    pub received_messages: u64,
    pub received_bytes: u64,
}

/// The running counts behind [`Counters`].
#[derive(Debug, Default)]
pub(crate) struct Tally {
    gossip: FlowTally,
    push: FlowTally,
    receipt: FlowTally,
    pub(crate) rejected: AtomicU64,
    pub(crate) overflowed: AtomicU64,
    pub(crate) rounds: AtomicU64,
    pub(crate) pushes: AtomicU64,
    pub(crate) full_pushes: AtomicU64,
    pub(crate) kicks: AtomicU64,
    pub(crate) suspicions: AtomicU64,
    pub(crate) frozen: AtomicU64,
    pub(crate) restarts: AtomicU64,
    pub(crate) conflicts: AtomicU64,
    pub(crate) digest_bytes: AtomicU64,
}

impl Tally {
    pub(crate) fn sent(&self, kind: Kind, bytes: usize) {
        let flow = self.flow(kind);
        flow.sent_messages.fetch_add(1, Relaxed);
        flow.sent_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn received(&self, kind: Kind, bytes: usize) {
        let flow = self.flow(kind);
        flow.received_messages.fetch_add(1, Relaxed);
        flow.received_bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// The counts, with those fields left zero that describe the view.
    pub(crate) fn read(&self) -> Counters {
        Counters {
            gossip: self.gossip.read(),
            push: self.push.read(),
            receipt: self.receipt.read(),
            rejected: self.rejected.load(Relaxed),
            overflowed: self.overflowed.load(Relaxed),
            rounds: self.rounds.load(Relaxed),
            pushes: self.pushes.load(Relaxed),
            full_pushes: self.full_pushes.load(Relaxed),
            kicks: self.kicks.load(Relaxed),
            suspicions: self.suspicions.load(Relaxed),
            frozen: self.frozen.load(Relaxed),
            restarts: self.restarts.load(Relaxed),
            conflicts: self.conflicts.load(Relaxed),
            digest_bytes: self.digest_bytes.load(Relaxed),
            ..Counters::default()
        }
    }

    fn flow(&self, kind: Kind) -> &FlowTally {
        match kind {
            Kind::Gossip => &self.gossip,
            Kind::Push => &self.push,
            Kind::Receipt => &self.receipt,
        }
    }
}

/// Adds one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

#[derive(Debug, Default)]
struct FlowTally {
    sent_messages: AtomicU64,
    sent_bytes: AtomicU64,
    received_messages: AtomicU64,
    received_bytes: AtomicU64,
}

impl FlowTally {
    fn read(&self) -> Flow {
        Flow {
            sent_messages: self.sent_messages.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            received_messages: self.received_messages.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
        }
    }
}
