//! The public face of the data path.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::{NetworkId, NodeId, Sealing, Suite};

use crate::{
    Counters, Detour, Forwarding, Members, OffloadSwitches, SocketError, Tap, TapError, TapQueues,
    TunnelStatus, control, key::Limits, shared::Shared, worker,
};

/// How many lanes a tunnel may have.
pub const MAX_LANES: u8 = crate::key::LANES;

/// What a tunnel is told once, when it starts.
#[derive(Clone, Debug)]
pub struct TunnelConfig {
    pub own: NodeId,
    /// Where other nodes reach this one: its VTEP's address.
    pub bind: IpAddr,
    /// The UDP port of lane 0; lane N has this port plus N.
    pub port: u16,
    /// 1 to [`MAX_LANES`]: each has a socket and two threads.
    pub lanes: u8,
    /// How much one key seals.
    pub limits: Limits,
    /// What this node offers to open, the one it likes best first.
    pub suites: Vec<Suite>,
    pub offloads: OffloadSwitches,
    /// Bytes that one packet may have on the underlay interface.
    pub underlay_mtu: u16,
    /// Whether this node passes on packets between others that do not reach each other.
    pub relay: bool,
}

#[cfg(test)]
impl TunnelConfig {
    pub(crate) fn on_loopback(port: u16) -> Self {
        Self {
            own: NodeId::from([1; 16]),
            bind: std::net::Ipv4Addr::LOCALHOST.into(),
            port,
            lanes: 1,
            limits: Limits::default(),
            suites: Suite::ALL.into(),
            offloads: OffloadSwitches::ALL_ON,
            underlay_mtu: 1500,
            relay: false,
        }
    }
}

/// A handle on the running data path of one node.
#[derive(Clone, Debug)]
pub struct Tunnel {
    shared: Arc<Shared>,
}

impl Tunnel {
    /// Binds the sockets and starts the threads. They end when `stop` is cancelled, and `tracker`
    /// waits for them.
    ///
    /// Without networks and members a tunnel does nothing; what it does follows `members`.
    ///
    /// # Errors
    ///
    /// `config` has no suite or an impossible number of lanes, a port is taken, or the system
    /// gives no more threads.
    pub fn start(
        config: TunnelConfig,
        members: watch::Receiver<Arc<Members>>,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        if !(1..=MAX_LANES).contains(&config.lanes) {
            return Err(StartError::Lanes { lanes: config.lanes });
        }
        if config.suites.is_empty() {
            return Err(StartError::Suites);
        }
        if config.port == 0 || config.port.checked_add(u16::from(config.lanes) - 1).is_none() {
            return Err(StartError::Port { port: config.port, lanes: config.lanes });
        }
        let (shared, ends) = Shared::open(config)?;
        let started = ends
            .parcels
            .into_iter()
            .enumerate()
            .try_for_each(|(lane, parcels)| {
                worker::spawn(&shared, lane, parcels, || tracker.token())
            })
            .and_then(|()| {
                control::spawn(&shared, ends.control, members, tracker.token(), stop.clone())
            });
        match started {
            Ok(()) => Ok(Self { shared }),
            Err(error) => {
                shared.stop.set();
                Err(error)
            }
        }
    }

    /// What the node's record says of it.
    pub fn offer(&self) -> Sealing {
        let config = &self.shared.config;
        Sealing {
            port: config.port,
            lanes: config.lanes,
            suites: config.suites.clone(),
            relay: config.relay,
        }
    }

    /// How many queues a network's TAP should have.
    pub fn queues(&self) -> usize {
        usize::from(self.shared.config.lanes)
    }

    /// Opens the queues of the TAP `name` in the calling thread's network namespace, as many and
    /// with such offloads as this tunnel has.
    ///
    /// # Errors
    ///
    /// As [`Tap::ensure`].
    pub fn open_tap(&self, name: &str) -> Result<TapQueues, TapError> {
        Tap::ensure(name, self.queues(), self.shared.config.offloads)
    }

    /// Where the sockets are, lane 0 first.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.shared.sockets.iter().map(|socket| socket.local()).collect()
    }

    /// Carries a network from now on, through `tap`; one that is carried already changes over to
    /// the new queues.
    ///
    /// Two networks whose ids begin with the same four bytes are both refused: their status says
    /// so.
    pub fn carry(&self, tap: TapQueues, forwarding: Arc<Forwarding>) {
        self.shared.carry(tap, forwarding);
    }

    /// Takes a new snapshot for a network. False if the network is not carried.
    pub fn forward(&self, forwarding: Arc<Forwarding>) -> bool {
        self.shared.networks.forward(forwarding)
    }

    /// Stops carrying a network and closes its queues, once the workers have seen it.
    pub fn drop_network(&self, network: NetworkId) {
        self.shared.drop_network(network);
    }

    /// The networks whose TAP has vanished under the tunnel. [`carry`](Self::carry) and
    /// [`drop_network`](Self::drop_network) take a network off the list.
    pub fn broken(&self) -> watch::Receiver<BTreeSet<NetworkId>> {
        self.shared.broken.subscribe()
    }

    pub fn status(&self) -> watch::Receiver<Arc<TunnelStatus>> {
        self.shared.status.subscribe()
    }

    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Datagrams by relay. There is one user: the second call gives `None`.
    pub fn detour(&self) -> Option<Detour> {
        self.shared.take_detour()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{lanes} lanes are not possible: choose 1 to {MAX_LANES}")]
    Lanes { lanes: u8 },
    #[error("no cipher suite is offered: choose at least one")]
    Suites,
    #[error("{lanes} lanes from port {port} on do not fit: choose another port")]
    Port { port: u16, lanes: u8 },
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(
        "failed to make the event descriptors of the sealed data path: raise the limit of open files"
    )]
    Descriptors {
        #[source]
        source: io::Error,
    },
    #[error("failed to start the thread {name} of the sealed data path")]
    Thread {
        name: String,
        #[source]
        source: io::Error,
    },
}
