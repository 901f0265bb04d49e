use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::{NetworkId, NodeId};

use crate::{
    Counters, Detour, Forwarding, Members, StartError, TapQueues, TunnelConfig, TunnelStatus,
    counters::Ledger, networks::Networks, offload::Offloads, socket::LaneSocket,
};

/// What the handle, the control thread and the workers of one tunnel have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: TunnelConfig,
    pub(crate) sockets: Vec<LaneSocket>,
    pub(crate) offloads: Offloads,
    pub(crate) networks: Networks,
    pub(crate) broken: watch::Sender<BTreeSet<NetworkId>>,
    pub(crate) status: watch::Sender<Arc<TunnelStatus>>,
    /// What belongs to no network.
    pub(crate) ledger: Ledger,
    ledgers: Mutex<BTreeMap<NetworkId, Arc<Ledger>>>,
    warnings: Mutex<BTreeSet<String>>,
    detour: Mutex<Option<Detour>>,
}

impl Shared {
    /// Binds the sockets.
    pub(crate) fn open(config: TunnelConfig) -> Result<Arc<Self>, StartError> {
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
        let (send, _) = mpsc::channel::<(NodeId, Bytes)>(DETOUR_QUEUE);
        let (_, received) = mpsc::channel(DETOUR_QUEUE);

        Ok(Arc::new(Self {
            config,
            sockets,
            offloads,
            networks: Networks::default(),
            broken: watch::Sender::default(),
            status: watch::Sender::default(),
            ledger: Ledger::new(lanes),
            ledgers: Mutex::default(),
            warnings: Mutex::new(warnings),
            detour: Mutex::new(Some(Detour::new(send, received))),
        }))
    }

    pub(crate) fn spawn(
        self: &Arc<Self>,
        _members: watch::Receiver<Arc<Members>>,
        _tracker: &TaskTracker,
        _stop: &CancellationToken,
    ) -> Result<(), StartError> {
        Ok(())
    }

    pub(crate) fn carry(&self, tap: TapQueues, forwarding: Arc<Forwarding>) {
        for (offload, state) in tap.offloads() {
            self.offloads.probed(*offload, state.clone());
        }
        let network = forwarding.network;
        let ledger = self.ledger_of(network);
        self.networks.carry(tap, forwarding, ledger);
        self.mend(network);
    }

    pub(crate) fn drop_network(&self, network: NetworkId) {
        self.networks.drop_network(network);
        self.mend(network);
    }

    pub(crate) fn counters(&self) -> Counters {
        let ledgers = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        let networks = ledgers.iter().map(|(&network, ledger)| (network, ledger.read())).collect();
        Counters::sum(networks, self.ledger.read())
    }

    pub(crate) fn take_detour(&self) -> Option<Detour> {
        self.detour.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn ledger_of(&self, network: NetworkId) -> Arc<Ledger> {
        let mut ledgers = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        let ledger =
            ledgers.entry(network).or_insert_with(|| Arc::new(Ledger::new(self.sockets.len())));
        Arc::clone(ledger)
    }

    fn mend(&self, network: NetworkId) {
        self.broken.send_if_modified(|broken| broken.remove(&network));
    }
}

const DETOUR_QUEUE: usize = 256;
