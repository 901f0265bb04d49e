use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::{EndpointId, NetworkId};
use weft_seal::Tunnel;

use crate::{
    AttachSpec, Attached, Desired, Missing, Status,
    attach::AttachError,
    board::Board,
    events::Events,
    guard::Guard,
    host::HostTask,
    namespace::{Directory, Namespace, NamespaceError, namespace_name},
    netlink::{Netlink, NetlinkError},
    table::{Chain, KernelError},
    task::{NetworkTask, Surroundings},
    work::{Command, Target},
};

/// Where the data plane works.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the networks' namespaces are mounted.
    pub runtime_dir: PathBuf,
    /// The host's namespace; that of the thread which calls [`DataPlane::start`] when absent.
    pub host: Option<Namespace>,
    /// How often everything is read again, notifications or not.
    pub resync: Duration,
    /// What carries encrypted networks. Without it none of them leaves this host: their tables and
    /// [`attach`](DataPlane::attach) say what is missing.
    pub tunnel: Result<Tunnel, Missing>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            runtime_dir: "/run/netns".into(),
            host: None,
            resync: Duration::from_secs(30),
            tunnel: Err(Missing {
                feature: "the sealed tunnel",
                remedy: "switch encryption on",
                reason: "this agent was started without it".into(),
            }),
        }
    }
}

/// A port that vanished without [`DataPlane::detach`]: its sandbox has died.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Gone {
    pub network: NetworkId,
    pub endpoint: EndpointId,
}

/// The running data plane. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct DataPlane {
    directory: Directory,
    lookups: mpsc::Sender<Lookup>,
    gone: broadcast::Sender<Gone>,
    board: Board,
}

impl DataPlane {
    /// Starts the reconcilers on `tracker`, until `stop`. What they have made stays.
    ///
    /// They follow `desired`. As long as it is `None`, the desired state is not known yet and
    /// nothing is changed. Networks that an earlier agent left and the first desired state does not
    /// name are removed then, unless they hold ports.
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
        desired: watch::Receiver<Option<Arc<Desired>>>,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        let host = match config.host {
            Some(host) => host,
            None => Namespace::current()?,
        };
        let events = Events::open(&host)?;
        let directory = Directory::new(config.runtime_dir);
        let board = Board::new();
        let (gone, _) = broadcast::channel(GONE_CAPACITY);
        let (lookups, lookup_queue) = mpsc::channel(QUEUE);
        let (idle, idle_queue) = mpsc::channel(QUEUE);
        let (guard, guarded) = watch::channel(Guard::default());

        let host_task = HostTask {
            namespace: host.clone(),
            directory: directory.clone(),
            guard,
            desired: desired.clone(),
            board: board.clone(),
            resync: config.resync,
        };
        tracker.spawn(host_task.run(events, stop.child_token()));
        let supervisor = Supervisor {
            around: Surroundings {
                directory: directory.clone(),
                host: host.clone(),
                resync: config.resync,
                board: board.clone(),
                gone: gone.clone(),
                guard: guarded,
                idle,
                tunnel: config.tunnel,
            },
            desired,
            tracker: tracker.clone(),
            stop: stop.child_token(),
            networks: BTreeMap::new(),
            scanned: false,
        };
        tracker.spawn(supervisor.run(lookup_queue, idle_queue));
        Ok(Self { directory, lookups, gone, board })
    }

    /// Connects a sandbox to a network, whose links it makes first if need be. Repeating it is
    /// harmless; a failure leaves nothing behind.
    ///
    /// The network must be in the desired state already; the port need not be.
    ///
    /// # Errors
    ///
    /// See [`AttachError`].
    pub async fn attach(&self, spec: AttachSpec) -> Result<Attached, AttachError> {
        let network = spec.network;
        let Some(commands) = self.commands(network).await.map_err(|_| AttachError::Stopped)? else {
            return Err(AttachError::UnknownNetwork { network });
        };
        let (reply, answer) = oneshot::channel();
        let sent = commands.send(Command::Attach(spec, reply)).await;
        sent.map_err(|_| AttachError::Stopped)?;
        answer.await.map_err(|_| AttachError::Stopped)?
    }

    /// Removes a port. Succeeds if it, or its network, has gone already.
    ///
    /// # Errors
    ///
    /// See [`DetachError`].
    pub async fn detach(
        &self,
        network: NetworkId,
        endpoint: EndpointId,
    ) -> Result<(), DetachError> {
        self.command(network, |reply| Command::Detach(endpoint, reply)).await
    }

    /// Removes a network that is not desired although it still holds ports.
    ///
    /// # Errors
    ///
    /// It is desired, or see [`DetachError`].
    pub async fn purge(&self, network: NetworkId) -> Result<(), DetachError> {
        self.command(network, Command::Purge).await
    }

    /// The ports that the kernel holds, whoever made them and whether or not they are desired.
    ///
    /// # Errors
    ///
    /// The runtime directory or a namespace in it cannot be read.
    pub async fn present_ports(
        &self,
    ) -> Result<BTreeMap<NetworkId, BTreeSet<EndpointId>>, KernelError> {
        let directory = self.directory.clone();
        tokio::task::spawn_blocking(move || {
            let mut found = BTreeMap::new();
            for (id, mut inside) in present_networks(&directory)? {
                found.insert(id, crate::network::present_endpoints(&mut inside)?);
            }
            Ok(found)
        })
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    /// Ports that vanish from now on. A listener that lags has missed some and should compare
    /// [`present_ports`](Self::present_ports) with its records.
    pub fn gone(&self) -> broadcast::Receiver<Gone> {
        self.gone.subscribe()
    }

    /// What the reconcilers have done, and what they could not do.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.board.subscribe()
    }

    /// The namespace of a network, for sockets that shall live in it.
    ///
    /// # Errors
    ///
    /// The network has none on this host (yet).
    pub fn namespace(&self, network: NetworkId) -> Result<Namespace, NamespaceError> {
        self.directory.open(&namespace_name(network))
    }

    /// Runs `f` in a network's namespace: sockets that it makes stay there.
    ///
    /// They keep the namespace in memory after the network's removal, until they are closed.
    ///
    /// # Errors
    ///
    /// The network has no namespace on this host (yet), or what `f` returns.
    pub async fn socket_in<T, E>(
        &self,
        network: NetworkId,
        f: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<NamespaceError> + Send + 'static,
    {
        self.namespace(network)?.run_async(f).await
    }

    async fn command(
        &self,
        network: NetworkId,
        command: impl FnOnce(oneshot::Sender<Result<(), DetachError>>) -> Command,
    ) -> Result<(), DetachError> {
        let Some(commands) = self.commands(network).await.map_err(|_| DetachError::Stopped)? else {
            return Ok(());
        };
        let (reply, answer) = oneshot::channel();
        commands.send(command(reply)).await.map_err(|_| DetachError::Stopped)?;
        answer.await.map_err(|_| DetachError::Stopped)?
    }

    async fn commands(
        &self,
        network: NetworkId,
    ) -> Result<Option<mpsc::Sender<Command>>, oneshot::error::RecvError> {
        let (reply, answer) = oneshot::channel();
        // If it fails, so does the answer.
        let _ = self.lookups.send(Lookup { network, reply }).await;
        answer.await
    }
}

/// The networks that have a namespace in `directory`, by the marks on their bridges.
fn present_networks(directory: &Directory) -> Result<Vec<(NetworkId, Netlink)>, KernelError> {
    let mut found = Vec::new();
    for name in directory.names()? {
        let namespace = match directory.open(&name) {
            Ok(namespace) => namespace,
            // A file whose mount has gone; making the network again mends it.
            Err(NamespaceError::NotANamespace { .. } | NamespaceError::Missing { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut inside = Netlink::open(&namespace)?;
        if let Some(id) = crate::network::marked_network(&mut inside)? {
            found.push((id, inside));
        }
    }
    Ok(found)
}

/// Asks the supervisor for the task of a network.
#[derive(Debug)]
struct Lookup {
    network: NetworkId,
    reply: oneshot::Sender<Option<mpsc::Sender<Command>>>,
}

/// Starts and ends the networks' tasks.
struct Supervisor {
    around: Surroundings,
    desired: watch::Receiver<Option<Arc<Desired>>>,
    tracker: TaskTracker,
    stop: CancellationToken,
    networks: BTreeMap<NetworkId, NetworkHandle>,
    /// Whether what a predecessor left has been looked for.
    scanned: bool,
}

struct NetworkHandle {
    target: watch::Sender<Option<Target>>,
    commands: mpsc::Sender<Command>,
}

enum Turn {
    Desired,
    Lookup(Lookup),
    Idle(NetworkId),
}

impl Supervisor {
    async fn run(
        mut self,
        mut lookups: mpsc::Receiver<Lookup>,
        mut idle: mpsc::Receiver<NetworkId>,
    ) {
        let mut turn = Turn::Desired;
        loop {
            // A lookup must see a state that was published before it.
            self.distribute().await;
            match turn {
                Turn::Desired => {}
                Turn::Lookup(Lookup { network, reply }) => {
                    let commands = self.networks.get(&network).map(|n| n.commands.clone());
                    let _ = reply.send(commands);
                }
                Turn::Idle(network) => self.dismiss(network),
            }
            turn = tokio::select! {
                () = self.stop.cancelled() => return,
                changed = self.desired.changed() => match changed {
                    Ok(()) => Turn::Desired,
                    Err(_) => return,
                },
                Some(lookup) = lookups.recv() => Turn::Lookup(lookup),
                Some(network) = idle.recv() => Turn::Idle(network),
            };
        }
    }

    async fn distribute(&mut self) {
        let Some(desired) = self.desired.borrow_and_update().clone() else { return };
        let pools = Arc::new(desired.host.uplink_pools.clone());
        for (&id, network) in &desired.networks {
            let target = Target { network: Arc::clone(network), pools: Arc::clone(&pools) };
            self.aim(id, Some(target));
        }
        let dropped: Vec<_> =
            self.networks.keys().filter(|id| !desired.networks.contains_key(id)).copied().collect();
        for id in dropped {
            self.aim(id, None);
        }
        if !self.scanned {
            self.scanned = self.adopt_leftovers().await;
        }
    }

    fn aim(&mut self, id: NetworkId, target: Option<Target>) {
        let Self { networks, around, tracker, stop, .. } = self;
        let handle = networks.entry(id).or_insert_with(|| {
            let (sender, receiver) = watch::channel(target.clone());
            let (commands, queue) = mpsc::channel(QUEUE);
            let task =
                NetworkTask { id, around: around.clone(), target: receiver, commands: queue };
            tracker.spawn(task.run(stop.child_token()));
            NetworkHandle { target: sender, commands }
        });
        handle.target.send_if_modified(|current| {
            let changed = *current != target;
            *current = target;
            changed
        });
    }

    /// Starts a task for each namespace that is there without being desired. It goes with its
    /// last port.
    async fn adopt_leftovers(&mut self) -> bool {
        let directory = self.around.directory.clone();
        let found = tokio::task::spawn_blocking(move || {
            Ok::<_, KernelError>(
                present_networks(&directory)?.into_iter().map(|(id, _)| id).collect(),
            )
        });
        let found: Vec<_> = match found.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::warn!(error = %Chain(&error), "failed to look for leftover networks");
                return false;
            }
            Err(_) => return false,
        };
        for id in found {
            if !self.networks.contains_key(&id) {
                self.aim(id, None);
            }
        }
        true
    }

    /// Lets go of a task that has nothing left to look after.
    fn dismiss(&mut self, id: NetworkId) {
        if self.networks.get(&id).is_some_and(|handle| handle.target.borrow().is_none()) {
            // Its channels close, and it ends.
            self.networks.remove(&id);
        }
    }
}

/// Why the data plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("failed to open the host's network namespace")]
    Namespace(#[from] NamespaceError),
    #[error("failed to listen to the host's network namespace")]
    Events(#[from] NetlinkError),
}

/// Why a port or a network could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    #[error("failed to remove the port of endpoint {endpoint} from network {network}")]
    Kernel { network: NetworkId, endpoint: EndpointId, source: KernelError },
    #[error("failed to open the namespace of network {network}")]
    Open { network: NetworkId, source: KernelError },
    #[error("network {network} is in use on this host: remove its definition first")]
    StillDesired { network: NetworkId },
    #[error("the data plane has stopped")]
    Stopped,
}

const QUEUE: usize = 64;
const GONE_CAPACITY: usize = 1024;
