//! The task of one network: it alone changes the tables of services in the network's namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;
use weft_model::{MacAddr, NetworkId};
use weft_vxlan::DataPlane;

use crate::{
    Counters, Frontend, NetworkBalance,
    board::Board,
    error::{BalanceError, Chain},
    network::{NetworkKernel, Outcome, SILENCE},
};

/// The surroundings of a network's task.
#[derive(Clone, Debug)]
pub(crate) struct Surroundings {
    pub(crate) plane: DataPlane,
    pub(crate) board: Board,
    pub(crate) seed: u32,
    pub(crate) resync: Duration,
    /// Tells the supervisor that a network's task has nothing left to look after.
    pub(crate) idle: mpsc::Sender<NetworkId>,
}

pub(crate) struct NetworkTask {
    pub(crate) id: NetworkId,
    pub(crate) around: Surroundings,
    pub(crate) target: watch::Receiver<Option<Arc<NetworkBalance>>>,
    pub(crate) queries: mpsc::Receiver<Query>,
}

type Reply<T> = oneshot::Sender<Result<T, BalanceError>>;

/// A question to the kernel.
#[derive(Debug)]
pub(crate) enum Query {
    Counters(Reply<BTreeMap<Frontend, Counters>>),
    Connections(Reply<BTreeMap<Frontend, BTreeMap<SocketAddr, u64>>>),
}

/// Why a pass is made.
#[derive(Debug)]
enum Wake {
    /// The desired state, or the namespace.
    Changed,
    /// Somebody else has changed our tables.
    Foreign,
    Sweep,
    Resync,
    Query(Query),
}

/// What the task remembers between passes.
struct Memory {
    /// When the desired state changed that is not in force yet.
    changed: Option<Instant>,
    resynced: Instant,
    /// When the connections are looked at, and since when there is a reason to.
    sweep: Instant,
    owed: Option<Instant>,
    failures: u32,
}

impl NetworkTask {
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut plane = self.around.plane.status();
        let mut kernel: Option<NetworkKernel> = None;
        let now = Instant::now();
        let mut memory =
            Memory { changed: Some(now), resynced: now, sweep: now, owed: None, failures: 0 };
        let mut wake = Wake::Changed;
        loop {
            // Not marked as seen: what changes while a question is answered is looked at next.
            let target = self.target.borrow().clone();
            let macs = stations(&plane.borrow(), self.id);
            kernel = self.pass(kernel, target, macs, wake, &mut memory).await;

            let overdue = memory.owed.is_some_and(|owed| owed.elapsed() > PATIENCE);
            let look = match (&kernel, memory.failures) {
                (Some(_), 0) => memory.resynced + self.around.resync,
                _ => Instant::now() + RETRY,
            };
            // Every arm is cancel-safe and none awaits in its body. What is new goes first.
            wake = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = std::future::ready(()), if overdue => Wake::Sweep,
                changed = self.target.changed() => match changed {
                    Ok(()) => {
                        memory.changed.get_or_insert_with(Instant::now);
                        Wake::Changed
                    }
                    Err(_) => return,
                },
                () = foreign(&mut kernel) => Wake::Foreign,
                changed = plane.changed() => match changed {
                    Ok(()) => Wake::Changed,
                    Err(_) => return,
                },
                Some(query) = self.queries.recv() => Wake::Query(query),
                () = time::sleep_until(memory.sweep) => Wake::Sweep,
                () = time::sleep_until(look) => Wake::Resync,
            };
        }
    }

    async fn pass(
        &self,
        kernel: Option<NetworkKernel>,
        target: Option<Arc<NetworkBalance>>,
        macs: BTreeSet<MacAddr>,
        wake: Wake,
        memory: &mut Memory,
    ) -> Option<NetworkKernel> {
        let kernel = match self.opened(kernel) {
            Ok(Some(kernel)) => kernel,
            Ok(None) => {
                self.around.board.update_network(self.id, |status| status.applied = None);
                if let Wake::Query(query) = wake {
                    query.refuse(self.id);
                }
                if target.is_none() {
                    self.leave().await;
                }
                memory.sweep = Instant::now() + self.around.resync;
                return None;
            }
            Err(error) => {
                self.fail(&error, memory);
                return None;
            }
        };
        let work = move || Work { kernel, target, macs }.carry_out(wake);
        // Blocking, but only for as long as the kernel takes.
        let Ok(done) = task::spawn_blocking(work).await else {
            tracing::error!(network = %self.id, "a pass over the tables of services panicked");
            memory.failures += 1;
            return None;
        };
        let Done { kernel, target, result, kind } = done;
        match result {
            Ok(outcome) => self.post(target.as_ref(), outcome, kind, memory),
            Err(error) => self.fail(&error, memory),
        }
        if target.is_none() && memory.failures == 0 {
            self.leave().await;
            return None;
        }
        Some(kernel)
    }

    /// The namespace, opened; none if it is not there.
    fn opened(&self, kernel: Option<NetworkKernel>) -> Result<Option<NetworkKernel>, BalanceError> {
        let Ok(namespace) = self.around.plane.namespace(self.id) else { return Ok(None) };
        match kernel {
            Some(kernel) if kernel.is_in(&namespace) => Ok(Some(kernel)),
            _ => {
                let seed = self.around.seed;
                NetworkKernel::open(namespace, seed).map(Some)
            }
        }
    }

    fn post(
        &self,
        target: Option<&Arc<NetworkBalance>>,
        outcome: Outcome,
        kind: Kind,
        memory: &mut Memory,
    ) {
        memory.failures = 0;
        let Outcome { applied, forgotten, unsure } = outcome;
        let now = Instant::now();
        match kind {
            Kind::Followed | Kind::Repaired => {
                if applied > 0 {
                    memory.owed.get_or_insert(now);
                    memory.sweep = memory.sweep.min(now + SOON);
                }
                memory.resynced = if kind == Kind::Repaired { now } else { memory.resynced };
            }
            Kind::Swept => {
                memory.owed = None;
                memory.sweep = now + if unsure { SILENCE } else { self.around.resync };
            }
            Kind::Asked => return,
        }
        let lag = match kind {
            Kind::Swept => None,
            _ => memory.changed.take().map(|changed| changed.elapsed()),
        };
        if kind == Kind::Repaired && applied > 0 && lag.is_none() {
            tracing::warn!(network = %self.id, "put back tables of services that somebody had changed");
        }
        self.around.board.update_network(self.id, |status| {
            if kind != Kind::Swept {
                status.applied = target.cloned();
            }
            match (kind, lag) {
                (Kind::Repaired, None) => status.repairs += applied.min(1),
                _ => status.changes += applied,
            }
            status.lag = lag.or(status.lag);
            status.forgotten += forgotten;
            status.error = None;
        });
    }

    fn fail(&self, error: &BalanceError, memory: &mut Memory) {
        let reason = Chain(error).to_string();
        memory.failures += 1;
        // What is owed must not keep the task from everything else: the tables come first.
        memory.owed = None;
        memory.sweep = Instant::now() + AGAIN;
        tracing::warn!(network = %self.id, error = %reason, "failed to bring services into force");
        self.around.board.update_network(self.id, |status| {
            status.failures += 1;
            status.error = Some(reason);
        });
    }

    async fn leave(&self) {
        self.around.board.forget_network(self.id);
        // The supervisor is gone only when all is.
        let _ = self.around.idle.send(self.id).await;
    }
}

/// A pass, as the blocking thread gets it.
struct Work {
    kernel: NetworkKernel,
    target: Option<Arc<NetworkBalance>>,
    macs: BTreeSet<MacAddr>,
}

struct Done {
    kernel: NetworkKernel,
    target: Option<Arc<NetworkBalance>>,
    result: Result<Outcome, BalanceError>,
    kind: Kind,
}

/// What kind of pass it was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Followed,
    Repaired,
    Swept,
    Asked,
}

impl Work {
    fn carry_out(self, wake: Wake) -> Done {
        let Self { mut kernel, target, macs } = self;
        let thorough = match wake {
            Wake::Foreign => true,
            Wake::Resync => !kernel.is_untouched(),
            _ => false,
        };
        let kind = if matches!(wake, Wake::Foreign | Wake::Resync) {
            Kind::Repaired
        } else {
            Kind::Followed
        };
        let (result, kind) = match (&target, wake) {
            (_, Wake::Query(query)) => {
                query.answer(&mut kernel);
                (Ok(Outcome::default()), Kind::Asked)
            }
            (None, _) => (kernel.clear().map(|()| Outcome::default()), Kind::Followed),
            (Some(_), Wake::Sweep) => (kernel.sweep(), Kind::Swept),
            (Some(desired), wake) if !thorough && kernel.has(desired) => {
                let kind = if matches!(wake, Wake::Resync) { kind } else { Kind::Asked };
                (Ok(Outcome::default()), kind)
            }
            (Some(desired), _) => (kernel.reconcile(desired, &macs, thorough), kind),
        };
        Done { kernel, target, result, kind }
    }
}

impl Query {
    fn answer(self, kernel: &mut NetworkKernel) {
        // Who asked may have gone.
        match self {
            Self::Counters(reply) => drop(reply.send(kernel.counters())),
            Self::Connections(reply) => drop(reply.send(kernel.connections())),
        }
    }

    pub(crate) fn refuse(self, network: NetworkId) {
        let error = BalanceError::NotServed { network };
        match self {
            Self::Counters(reply) => drop(reply.send(Err(error))),
            Self::Connections(reply) => drop(reply.send(Err(error))),
        }
    }
}

async fn foreign(kernel: &mut Option<NetworkKernel>) {
    match kernel {
        Some(kernel) => kernel.events.changed().await,
        None => std::future::pending().await,
    }
}

/// The MACs of this host's stations in a network.
fn stations(plane: &weft_vxlan::Status, id: NetworkId) -> BTreeSet<MacAddr> {
    let reached = plane.networks.get(&id).and_then(|network| network.reached.as_ref());
    reached.iter().flat_map(|network| network.ports.values()).map(|port| port.mac).collect()
}

const RETRY: Duration = Duration::from_millis(500);
/// Until connections are looked at after a failure: the tables are tried again before.
const AGAIN: Duration = Duration::from_secs(2);
/// After a change, until connections are looked at; a further change comes first.
const SOON: Duration = Duration::from_millis(10);
/// For how long at most.
const PATIENCE: Duration = Duration::from_millis(300);
