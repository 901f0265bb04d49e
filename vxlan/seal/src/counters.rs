use std::{
    array,
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use weft_model::NetworkId;

/// Why a frame or a packet went no further.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum DropReason {
    /// Its counter was seen before, or is too old to tell.
    Replay,
    /// It was not sealed with the key that it names.
    Auth,
    /// It names a session that this node does not have.
    UnknownPeer,
    /// There is no confirmed session with the peer.
    NoKey,
    /// The session's certificates are no longer valid.
    Expired,
    /// The peer does not take part in encrypted networks.
    NoOffer,
    /// No station has the frame's destination address.
    UnknownDestination,
    /// The frame's source does not belong to the peer that sent it.
    Spoofed,
    /// Larger than the path to the peer; its sender was told.
    TooBig,
    /// A queue, of the TAP, of a socket or between threads, was full.
    Queue,
    /// No packet or frame that this build understands.
    Malformed,
    /// Its key is too far ahead or too far back.
    Epoch,
    /// No path to the peer works.
    NoPath,
    /// Its network is not carried here.
    UnknownNetwork,
    /// An ARP or neighbour request that nobody can answer, or group traffic in a network without.
    Unanswerable,
}

impl DropReason {
    pub const ALL: [Self; 15] = [
        Self::Replay,
        Self::Auth,
        Self::UnknownPeer,
        Self::NoKey,
        Self::Expired,
        Self::NoOffer,
        Self::UnknownDestination,
        Self::Spoofed,
        Self::TooBig,
        Self::Queue,
        Self::Malformed,
        Self::Epoch,
        Self::NoPath,
        Self::UnknownNetwork,
        Self::Unanswerable,
    ];

    /// The label in metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Auth => "auth",
            Self::UnknownPeer => "unknown-peer",
            Self::NoKey => "no-key",
            Self::Expired => "expired",
            Self::NoOffer => "no-offer",
            Self::UnknownDestination => "unknown-destination",
            Self::Spoofed => "spoofed",
            Self::TooBig => "too-big",
            Self::Queue => "queue",
            Self::Malformed => "malformed",
            Self::Epoch => "epoch",
            Self::NoPath => "no-path",
            Self::UnknownNetwork => "unknown-network",
            Self::Unanswerable => "unanswerable",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a tunnel has carried since it started: plain values, for metrics.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// By network, also those that are no longer carried: a counter never goes back.
    pub networks: BTreeMap<NetworkId, Traffic>,
    /// What belongs to no network: packets that were dropped before they were opened, relayed and
    /// control packets.
    pub tunnel: Traffic,
    /// Sum of all of it.
    pub total: Traffic,
    /// Steps to a next sending key.
    pub rekeys: u64,
    /// System calls of the workers, to judge how well they batch.
    pub syscalls: u64,
}

/// Packets are sealed packets on the underlay; bytes are those of the Ethernet frames in them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Traffic {
    pub sealed_packets: u64,
    pub sealed_bytes: u64,
    pub opened_packets: u64,
    pub opened_bytes: u64,
    /// Only reasons that occurred.
    pub drops: BTreeMap<DropReason, u64>,
}

impl Traffic {
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.get(&reason).copied().unwrap_or_default()
    }

    /// All drops, whatever the reason.
    pub fn dropped_total(&self) -> u64 {
        self.drops.values().sum()
    }

    fn add(&mut self, other: &Self) {
        self.sealed_packets += other.sealed_packets;
        self.sealed_bytes += other.sealed_bytes;
        self.opened_packets += other.opened_packets;
        self.opened_bytes += other.opened_bytes;
        for (&reason, count) in &other.drops {
            *self.drops.entry(reason).or_default() += count;
        }
    }
}

impl Counters {
    pub(crate) fn sum(networks: BTreeMap<NetworkId, Traffic>, tunnel: Traffic) -> Self {
        let mut total = tunnel.clone();
        for traffic in networks.values() {
            total.add(traffic);
        }
        Self { networks, tunnel, total, rekeys: 0, syscalls: 0 }
    }
}

/// A counter with one writer and any readers: an add is a load and a store, no locked instruction.
#[derive(Debug, Default)]
pub(crate) struct Tally(AtomicU64);

impl Tally {
    /// Only the counter's one writer may call this.
    #[inline]
    pub(crate) fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One worker's share of one network's counters, on cache lines that no other worker writes.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Tallies {
    pub(crate) packets: Tally,
    pub(crate) bytes: Tally,
    drops: [Tally; DropReason::ALL.len()],
}

impl Tallies {
    #[inline]
    pub(crate) fn carried(&self, packets: u64, bytes: u64) {
        self.packets.add(packets);
        self.bytes.add(bytes);
    }

    #[inline]
    pub(crate) fn dropped(&self, reason: DropReason, packets: u64) {
        self.drops[reason as usize].add(packets);
    }
}

impl Default for Tallies {
    fn default() -> Self {
        Self {
            packets: Tally::default(),
            bytes: Tally::default(),
            drops: array::from_fn(|_| Tally::default()),
        }
    }
}

/// The counters of one network, or of what belongs to none: a share for each worker.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Of the threads that seal: one a lane, then the control thread.
    pub(crate) sealing: Vec<Tallies>,
    /// Of the threads that open: one a lane, then the control thread.
    pub(crate) opening: Vec<Tallies>,
}

impl Ledger {
    pub(crate) fn new(lanes: usize) -> Self {
        let shares = || (0..=lanes).map(|_| Tallies::default()).collect();
        Self { sealing: shares(), opening: shares() }
    }

    pub(crate) fn read(&self) -> Traffic {
        let sum = |tallies: &[Tallies], which: fn(&Tallies) -> &Tally| {
            tallies.iter().map(|share| which(share).read()).sum::<u64>()
        };
        let shares = || self.sealing.iter().chain(&self.opening);
        let drops = DropReason::ALL
            .into_iter()
            .map(|reason| (reason, shares().map(|s| s.drops[reason as usize].read()).sum()))
            .filter(|(_, count)| *count > 0)
            .collect();
        Traffic {
            sealed_packets: sum(&self.sealing, |share| &share.packets),
            sealed_bytes: sum(&self.sealing, |share| &share.bytes),
            opened_packets: sum(&self.opening, |share| &share.packets),
            opened_bytes: sum(&self.opening, |share| &share.bytes),
            drops,
        }
    }
}

/// One count of each worker, summed by readers.
#[derive(Debug)]
pub(crate) struct Shares {
    /// Of the threads that seal: one a lane, then the control thread.
    pub(crate) sealing: Vec<Share>,
    /// Of the threads that open: one a lane, then the control thread.
    pub(crate) opening: Vec<Share>,
}

/// One worker's, on a cache line that no other worker writes.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Share(Tally);

impl Shares {
    pub(crate) fn new(lanes: usize) -> Self {
        let shares = || (0..=lanes).map(|_| Share::default()).collect();
        Self { sealing: shares(), opening: shares() }
    }

    pub(crate) fn read(&self) -> u64 {
        self.sealing.iter().chain(&self.opening).map(|share| share.0.read()).sum()
    }
}

impl Share {
    /// Only the share's one writer may call this.
    #[inline]
    pub(crate) fn add(&self, count: u64) {
        self.0.add(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_place_and_word() {
        for (place, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
            let named = DropReason::ALL.iter().filter(|other| other.as_str() == reason.as_str());
            assert_eq!(named.count(), 1, "{reason}");
        }
    }

    #[test]
    fn the_total_is_the_sum_of_all_workers_and_networks() {
        let (network, tunnel) = (Ledger::new(2), Ledger::new(2));
        network.sealing[0].carried(2, 2800);
        network.sealing[1].carried(1, 60);
        network.sealing[1].dropped(DropReason::NoKey, 3);
        network.opening[2].carried(4, 400);
        tunnel.opening[0].dropped(DropReason::Auth, 7);

        let networks = BTreeMap::from([(NetworkId::from([1; 16]), network.read())]);
        let counters = Counters::sum(networks, tunnel.read());

        assert_eq!(counters.total.sealed_packets, 3);
        assert_eq!(counters.total.sealed_bytes, 2860);
        assert_eq!(counters.total.opened_packets, 4);
        assert_eq!(counters.total.dropped(DropReason::NoKey), 3);
        assert_eq!(counters.total.dropped(DropReason::Auth), 7);
        assert_eq!(counters.total.dropped(DropReason::Replay), 0);
        assert_eq!(counters.tunnel.dropped_total(), 7);
    }
}
