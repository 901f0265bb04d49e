use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::SyncSender},
};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use weft_model::{NetworkId, NodeId};

use crate::{
    Counters, Detour, Forwarding, Offload, StartError, TapQueues, TunnelConfig, TunnelStatus,
    control::{self, Event, Mouth},
    counters::{Ledger, Shares},
    networks::{Carried, Networks},
    offload::Offloads,
    routes::{Hop, Routes, Sessions},
    socket::LaneSocket,
    stop::Stop,
    worker::{Parcel, Parcels},
};

/// What the handle, the control thread and the workers of one tunnel have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: TunnelConfig,
    pub(crate) sockets: Vec<LaneSocket>,
    pub(crate) offloads: Offloads,
    pub(crate) networks: Networks,
    /// Written by the control thread.
    pub(crate) routes: ArcSwap<Routes>,
    /// Written by the control thread.
    pub(crate) sessions: ArcSwap<Sessions>,
    pub(crate) stop: Stop,
    pub(crate) broken: watch::Sender<BTreeSet<NetworkId>>,
    pub(crate) status: watch::Sender<Arc<TunnelStatus>>,
    /// What belongs to no network.
    pub(crate) ledger: Ledger,
    pub(crate) syscalls: Shares,
    pub(crate) rekeys: Shares,
    used: [Shares; Offload::ALL.len()],
    ledgers: Mutex<BTreeMap<NetworkId, Arc<Ledger>>>,
    warnings: Mutex<BTreeSet<String>>,
    detour: Mutex<Option<Detour>>,
    control: mpsc::Sender<Event>,
    parcels: Vec<SyncSender<Parcel>>,
}

/// What only one thread each may have of a tunnel: the receiving ends.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) control: Mouth,
    /// One a lane.
    pub(crate) parcels: Vec<Parcels>,
}

impl Shared {
    /// Binds the sockets.
    pub(crate) fn open(config: TunnelConfig) -> Result<(Arc<Self>, Ends), StartError> {
        let offloads = Offloads::new(config.offloads);
        let mut sockets = Vec::new();
        let mut warnings = BTreeSet::new();
        for lane in 0..u16::from(config.lanes) {
            let address = SocketAddr::new(config.bind, config.port + lane);
            let (socket, warning) = LaneSocket::bind(address, &offloads)?;
            sockets.push(socket);
            if let Some(warning) = warning {
                tracing::warn!(%address, "{warning}");
                warnings.insert(warning);
            }
        }
        let lanes = sockets.len();
        let (control, mouth, detour) = control::channels();
        let (parcels, ends) = (0..lanes)
            .map(|_| std::sync::mpsc::sync_channel(PARCELS))
            .map(|(send, receive)| (send, Mutex::new(receive)))
            .unzip();

        let shared = Self {
            config,
            sockets,
            offloads,
            networks: Networks::default(),
            routes: ArcSwap::default(),
            sessions: ArcSwap::default(),
            stop: Stop::new(lanes).map_err(|source| StartError::Descriptors { source })?,
            broken: watch::Sender::default(),
            status: watch::Sender::default(),
            ledger: Ledger::new(lanes),
            syscalls: Shares::new(lanes),
            rekeys: Shares::new(lanes),
            used: Offload::ALL.map(|_| Shares::new(lanes)),
            ledgers: Mutex::default(),
            warnings: Mutex::new(warnings),
            detour: Mutex::new(Some(detour)),
            control,
            parcels,
        };
        Ok((Arc::new(shared), Ends { control: mouth, parcels: ends }))
    }

    pub(crate) fn carry(&self, tap: TapQueues, forwarding: Arc<Forwarding>) {
        for (offload, state) in tap.offloads() {
            self.offloads.probed(*offload, state.clone());
        }
        let network = forwarding.network;
        let ledger = self.ledger_of(network);
        self.networks.carry(tap, forwarding, ledger);
        self.changed(network);
    }

    pub(crate) fn drop_network(&self, network: NetworkId) {
        self.networks.drop_network(network);
        self.changed(network);
    }

    pub(crate) fn counters(&self) -> Counters {
        let ledgers = lock(&self.ledgers);
        let networks = ledgers.iter().map(|(&network, ledger)| (network, ledger.read())).collect();
        let sums = Counters::sum(networks, self.ledger.read());
        Counters { rekeys: self.rekeys.read(), syscalls: self.syscalls.read(), ..sums }
    }

    pub(crate) fn take_detour(&self) -> Option<Detour> {
        lock(&self.detour).take()
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        lock(&self.warnings).iter().cloned().collect()
    }

    /// How often an offload was of use.
    pub(crate) fn used(&self, offload: Offload) -> &Shares {
        &self.used[offload as usize]
    }

    /// False if the control thread is behind: what it would have been told is lost.
    pub(crate) fn tell_control(&self, event: Event) -> bool {
        self.control.try_send(event).is_ok()
    }

    /// Gives a sealed packet to the lane that opens it. False if that one is behind.
    pub(crate) fn hand_over(&self, lane: usize, parcel: Parcel) -> bool {
        let handed = self.parcels[lane].try_send(parcel).is_ok();
        self.stop.opening[lane].wake();
        handed
    }

    /// Tells that sending to `hop` failed for its size.
    pub(crate) fn narrowed(&self, hop: &Hop, len: usize) {
        if let Some(to) = hop.to.as_socket() {
            self.tell_control(Event::Narrowed { socket: hop.socket, to, len });
        }
    }

    /// Tells that reading or writing a network's TAP failed for good.
    pub(crate) fn tap_failed(&self, network: &Carried, error: &io::Error) {
        let (id, tap) = (network.forwarding.network, &network.tap.name);
        let news = self.broken.send_if_modified(|broken| broken.insert(id));
        if news {
            tracing::warn!(network = %id, %tap, %error, "the TAP is gone: its network carries nothing until it is made again");
        }
    }

    /// Tells that a thread has to begin anew.
    pub(crate) fn worker_failed(&self, thread: &str, why: &str) {
        tracing::error!(
            thread,
            why,
            "a thread of the sealed data path failed and is started again"
        );
        let mut warnings = lock(&self.warnings);
        // Whoever can make a thread fail may choose the words as well.
        if warnings.len() < WARNINGS {
            warnings.insert(format!("thread {thread} failed and was started again: {why}"));
        }
    }

    fn ledger_of(&self, network: NetworkId) -> Arc<Ledger> {
        let mut ledgers = lock(&self.ledgers);
        let new = || Arc::new(Ledger::new(self.sockets.len()));
        Arc::clone(ledgers.entry(network).or_insert_with(new))
    }

    /// The TAP of a network is another one now, or none.
    fn changed(&self, network: NetworkId) {
        self.broken.send_if_modified(|broken| broken.remove(&network));
        self.stop.wake_all();
    }

    /// Passes a packet that is sealed for `node` to the control thread, which knows a relay.
    pub(crate) fn relay(&self, node: NodeId, packet: &[u8]) -> bool {
        self.tell_control(Event::Relay { to: node, packet: packet.to_vec() })
    }
}

/// Nothing that is locked here is left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Packets that wait for the lane that opens them.
const PARCELS: usize = 1024;

/// Warnings that are kept at most.
const WARNINGS: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_fail_again_and_again_leave_no_heap_of_warnings() {
        let (shared, _ends) = Shared::open(TunnelConfig::on_loopback(16_813)).unwrap();
        for time in 0..2 * WARNINGS {
            shared.worker_failed("seal-test", &format!("for the {time}th time"));
        }
        assert_eq!(shared.warnings().len(), WARNINGS);
    }
}
