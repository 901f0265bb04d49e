use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::NetworkId;
use weft_vxlan::{DataPlane, Namespace, NamespaceError};

use crate::{
    Counters, Desired, Frontend, NetworkBalance, Status,
    board::Board,
    error::BalanceError,
    events::Events,
    host::{HostTask, holder::HostPorts},
    netfilter::NetfilterError,
    task::{NetworkTask, Query, Surroundings},
};

/// Where and how the balancer works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The host's namespace; that of the thread which calls [`Balancer::start`] when absent.
    pub host: Option<Namespace>,
    /// The cluster's, the same on all hosts: they choose alike.
    pub seed: u32,
    /// How often everything is read again, notifications or not.
    pub resync: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { host: None, seed: 0x7765_6674, resync: Duration::from_secs(30) }
    }
}

/// The running balancer. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Balancer {
    board: Board,
    queries: mpsc::Sender<(NetworkId, Query)>,
    ports: HostPorts,
}

impl Balancer {
    /// Starts the reconcilers on `tracker`, until `stop`. What they have made stays.
    ///
    /// They follow `desired`, in the namespaces that `plane` makes. As long as it is `None`, the
    /// desired state is not known yet and nothing is changed. The tables that an earlier agent left
    /// in networks which the first desired state does not name are removed then.
    ///
    /// # Errors
    ///
    /// The host's namespace cannot be opened or listened to.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start(
        config: Config,
        plane: DataPlane,
        desired: watch::Receiver<Option<Arc<Desired>>>,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        let host = match config.host {
            Some(host) => host,
            None => Namespace::current()?,
        };
        let board = Board::new();
        let events = Events::open(&host, PUBLISHED, NOBODY)?;
        let ports = HostPorts::new(host.clone(), board.clone());
        let host_task = HostTask {
            namespace: host,
            desired: desired.clone(),
            board: board.clone(),
            resync: config.resync,
            tracker: tracker.clone(),
        };
        tracker.spawn(host_task.run(events, stop.child_token()));

        let (queries, asked) = mpsc::channel(QUEUE);
        let (idle, idle_queue) = mpsc::channel(QUEUE);
        let supervisor = Supervisor {
            around: Surroundings {
                plane,
                board: board.clone(),
                seed: config.seed,
                resync: config.resync,
                idle,
            },
            desired,
            tracker: tracker.clone(),
            stop: stop.child_token(),
            networks: BTreeMap::new(),
            looked_after: BTreeSet::new(),
        };
        tracker.spawn(supervisor.run(asked, idle_queue));
        Ok(Self { board, queries, ports })
    }

    /// The ports of the host, for whoever wants to publish one.
    pub fn host_ports(&self) -> HostPorts {
        self.ports.clone()
    }

    /// What is in force, and what could not be done.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.board.subscribe()
    }

    /// What the traffic of a network's frontends has come to since they are there, on this host.
    ///
    /// # Errors
    ///
    /// The network has no services on this host, or the kernel cannot be read.
    pub async fn counters(
        &self,
        network: NetworkId,
    ) -> Result<BTreeMap<Frontend, Counters>, BalanceError> {
        self.ask(network, Query::Counters).await
    }

    /// The connections that clients of this host have now, by frontend and backend. Reads all that
    /// the network's namespace tracks: about 2 µs each.
    ///
    /// # Errors
    ///
    /// As [`counters`](Self::counters).
    pub async fn connections(
        &self,
        network: NetworkId,
    ) -> Result<BTreeMap<Frontend, BTreeMap<SocketAddr, u64>>, BalanceError> {
        self.ask(network, Query::Connections).await
    }

    async fn ask<T>(
        &self,
        network: NetworkId,
        query: impl FnOnce(oneshot::Sender<Result<T, BalanceError>>) -> Query,
    ) -> Result<T, BalanceError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.queries.send((network, query(reply))).await;
        sent.map_err(|_| BalanceError::Stopped)?;
        answer.await.map_err(|_| BalanceError::Stopped)?
    }
}

/// Starts and ends the networks' tasks.
struct Supervisor {
    around: Surroundings,
    desired: watch::Receiver<Option<Arc<Desired>>>,
    tracker: TaskTracker,
    stop: CancellationToken,
    networks: BTreeMap<NetworkId, Handle>,
    /// The networks in which tables of a predecessor have been looked for.
    looked_after: BTreeSet<NetworkId>,
}

struct Handle {
    target: watch::Sender<Option<Arc<NetworkBalance>>>,
    queries: mpsc::Sender<Query>,
}

enum Turn {
    Follow,
    Query(NetworkId, Query),
    Idle(NetworkId),
}

impl Supervisor {
    async fn run(
        mut self,
        mut asked: mpsc::Receiver<(NetworkId, Query)>,
        mut idle: mpsc::Receiver<NetworkId>,
    ) {
        let mut plane = self.around.plane.status();
        let mut turn = Turn::Follow;
        loop {
            match turn {
                Turn::Follow => self.distribute(&plane.borrow_and_update().clone()),
                Turn::Query(network, query) => self.forward(network, query),
                Turn::Idle(network) => self.dismiss(network),
            }
            turn = tokio::select! {
                () = self.stop.cancelled() => return,
                changed = self.desired.changed() => match changed {
                    Ok(()) => Turn::Follow,
                    Err(_) => return,
                },
                changed = plane.changed() => match changed {
                    Ok(()) => Turn::Follow,
                    Err(_) => return,
                },
                Some((network, query)) = asked.recv() => Turn::Query(network, query),
                Some(network) = idle.recv() => Turn::Idle(network),
            };
        }
    }

    fn distribute(&mut self, plane: &weft_vxlan::Status) {
        let Some(desired) = self.desired.borrow_and_update().clone() else { return };
        for (&id, network) in &desired.networks {
            self.aim(id, Some(Arc::clone(network)));
        }
        let dropped: Vec<_> =
            self.networks.keys().filter(|id| !desired.networks.contains_key(id)).copied().collect();
        for id in dropped {
            self.aim(id, None);
        }
        // What a predecessor left where there is no service any more.
        for &id in plane.networks.keys() {
            if self.looked_after.insert(id) && !desired.networks.contains_key(&id) {
                self.aim(id, None);
            }
        }
        self.looked_after.retain(|id| plane.networks.contains_key(id));
    }

    fn aim(&mut self, id: NetworkId, target: Option<Arc<NetworkBalance>>) {
        let Self { networks, around, tracker, stop, .. } = self;
        let handle = networks.entry(id).or_insert_with(|| {
            let (sender, receiver) = watch::channel(target.clone());
            let (queries, asked) = mpsc::channel(QUEUE);
            let task = NetworkTask { id, around: around.clone(), target: receiver, queries: asked };
            tracker.spawn(task.run(stop.child_token()));
            Handle { target: sender, queries }
        });
        handle.target.send_if_modified(|current| {
            let same = match (&*current, &target) {
                (Some(current), Some(target)) => Arc::ptr_eq(current, target) || current == target,
                (current, target) => current.is_none() && target.is_none(),
            };
            *current = target;
            !same
        });
    }

    fn forward(&self, network: NetworkId, query: Query) {
        let Some(handle) = self.networks.get(&network) else { return query.refuse(network) };
        // Whoever asks too much at once is told so.
        if let Err(error) = handle.queries.try_send(query) {
            error.into_inner().refuse(network);
        }
    }

    /// Lets go of a task that has nothing left to look after.
    fn dismiss(&mut self, id: NetworkId) {
        if self.networks.get(&id).is_some_and(|handle| handle.target.borrow().is_none()) {
            // Its channels close, and it ends.
            self.networks.remove(&id);
        }
    }
}

/// Why the balancer did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("failed to open the host's network namespace")]
    Namespace(#[from] NamespaceError),
    #[error("failed to listen to the rules of the host's network namespace")]
    Events(#[from] NetfilterError),
}

const QUEUE: usize = 64;
/// The table of the host's published ports.
const PUBLISHED: &str = "weft-publish";
/// No socket has this port.
const NOBODY: u32 = u32::MAX;
