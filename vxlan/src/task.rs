//! The task of one network: it alone changes what is in the network's namespace.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{
    sync::{broadcast, mpsc, watch},
    task,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;
use weft_model::{EndpointId, NetworkId};
use weft_seal::Tunnel;

use crate::{
    Missing,
    board::{Board, Occasion, Wake},
    events::{Change, Events},
    guard::Guard,
    namespace::{Directory, Namespace, NamespaceError},
    network::NetworkKernel,
    plane::Gone,
    table::{Chain, KernelError},
    work::{Command, Done, Target, Work, fail, refuse},
};

/// The surroundings of a network's task.
#[derive(Clone, Debug)]
pub(crate) struct Surroundings {
    pub(crate) directory: Directory,
    pub(crate) host: Namespace,
    pub(crate) resync: Duration,
    pub(crate) board: Board,
    pub(crate) gone: broadcast::Sender<Gone>,
    pub(crate) guard: watch::Receiver<Guard>,
    /// Tells the supervisor that a network's task has nothing left to look after.
    pub(crate) idle: mpsc::Sender<NetworkId>,
    pub(crate) tunnel: Result<Tunnel, Missing>,
}

pub(crate) struct NetworkTask {
    pub(crate) id: NetworkId,
    pub(crate) around: Surroundings,
    pub(crate) target: watch::Receiver<Option<Target>>,
    pub(crate) commands: mpsc::Receiver<Command>,
}

/// The open namespace and its notifications.
struct Opened {
    kernel: NetworkKernel,
    events: Events,
}

/// Why a pass is made, and what it has to do besides.
struct Errand {
    command: Option<Command>,
    /// Why the host's rules do not protect the network, if they do not: it takes no ports then.
    unguarded: Option<String>,
    wake: Wake,
    thorough: bool,
}

/// What the task remembers between passes.
struct Memory {
    ports: BTreeSet<EndpointId>,
    settled: bool,
    /// When the desired state changed that has not been reached yet.
    changed: Option<Instant>,
    resynced: Instant,
    /// Passes in a row that left something to do.
    failures: u32,
    purge: bool,
}

impl Memory {
    /// When to look again, whatever happens: soon after a failure, later if it stays.
    fn next_look(&self, resync: Duration) -> Instant {
        match self.failures {
            0 => self.resynced + resync,
            failures => Instant::now() + resync.min(RETRY * 2u32.pow(failures.min(8) - 1)),
        }
    }
}

impl NetworkTask {
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut opened = None;
        let mut memory = Memory {
            ports: BTreeSet::new(),
            settled: false,
            changed: Some(Instant::now()),
            resynced: Instant::now(),
            failures: 0,
            purge: false,
        };
        let mut wake = Wake::Start;
        let mut command = None;
        let mut thorough = true;
        let mut broken = self.around.tunnel.as_ref().ok().map(Tunnel::broken);
        loop {
            if wake == Wake::KernelChanged {
                // A change seldom comes alone; what comes with it needs no pass of its own.
                tokio::select! {
                    () = time::sleep(DEBOUNCE) => {}
                    received = self.commands.recv() => match received {
                        Some(received) => (wake, command) = (Wake::Command, Some(received)),
                        None => return,
                    },
                }
                if let Some(Opened { events, .. }) = &mut opened {
                    events.settle();
                }
            }
            // The pass follows the newest state, whatever woke it; its changes are no repairs then.
            if self.target.has_changed().unwrap_or(false) {
                memory.changed = Some(Instant::now());
                if matches!(wake, Wake::KernelChanged | Wake::Resync) {
                    wake = Wake::DesiredChanged;
                }
            }
            // Nor is a network brought up whose VNI the host's rules do not know of yet.
            let (target, unguarded) = loop {
                let target = self.target.borrow_and_update().clone();
                let Some(Target { network, .. }) = &target else { break (target, None) };
                tokio::select! {
                    () = stop.cancelled() => return,
                    fault = Guard::fault(&self.around.guard, network.transport.vni()) => break (target, fault),
                    // The host's task may have seen the newer state only.
                    changed = self.target.changed() => match changed {
                        Ok(()) => memory.changed = Some(Instant::now()),
                        Err(_) => return,
                    },
                }
            };
            let errand = Errand { command: command.take(), unguarded, wake, thorough };
            opened = self.pass(opened, target, errand, &mut memory).await;
            let look = memory.next_look(self.around.resync);

            // Every arm is cancel-safe and none awaits in its body.
            (wake, thorough) = tokio::select! {
                () = stop.cancelled() => return,
                changed = self.target.changed() => match changed {
                    Ok(()) => {
                        memory.changed = Some(Instant::now());
                        (Wake::DesiredChanged, false)
                    }
                    Err(_) => return,
                },
                received = self.commands.recv() => match received {
                    Some(received) => {
                        command = Some(received);
                        (Wake::Command, false)
                    }
                    None => return,
                },
                () = breaks(&mut broken, self.id) => (Wake::KernelChanged, false),
                change = changes(&mut opened) => (Wake::KernelChanged, change == Change::Rules),
                () = time::sleep_until(look) => {
                    memory.resynced = Instant::now();
                    (Wake::Resync, true)
                }
            };
        }
    }

    /// Makes one pass, with the command if there is one, and posts what came of it.
    async fn pass(
        &self,
        opened: Option<Opened>,
        target: Option<Target>,
        errand: Errand,
        memory: &mut Memory,
    ) -> Option<Opened> {
        let Errand { command, unguarded, wake, thorough } = errand;
        let opened = match self.opened(opened, target.is_some()) {
            Ok(Some(opened)) => opened,
            Ok(None) => {
                self.leave(memory).await;
                if let Some(command) = command {
                    refuse(command, self.id);
                }
                return None;
            }
            Err(error) => {
                let reason = Chain(&error).to_string();
                tracing::warn!(network = %self.id, error = %reason, "failed to open the network's namespace");
                if let Some(command) = command {
                    fail(command, self.id, error);
                }
                memory.failures += 1;
                return None;
            }
        };
        let Opened { kernel, mut events } = opened;
        let aim = target.as_ref().map(|target| Arc::clone(&target.network));
        let work = Work { kernel, target, command, unguarded, thorough };
        // Blocking, but only for as long as the kernel takes; nothing here changes the namespace
        // of the pool's thread.
        let Ok(done) = task::spawn_blocking(move || work.carry_out()).await else {
            tracing::error!(network = %self.id, "a pass over the network's tables panicked");
            return None;
        };
        let Done { kernel, ports, attached, detached, passes, purge, carriage, desired } = done;
        if kernel.is_on_parent()
            && let Err(error) = events.follow_parents(&self.around.host)
        {
            tracing::warn!(network = %self.id, error = %Chain(&error), "the end of parents is not noticed");
        }
        let settled = passes.values().all(|pass| pass.errors.is_empty());
        let occasion = Occasion {
            wake,
            settled: memory.settled,
            since: memory.changed.map(|changed| changed.elapsed()),
        };
        memory.settled = settled;
        match settled {
            true => (memory.changed, memory.failures) = (None, 0),
            false => memory.failures += 1,
        }
        memory.purge |= purge;
        // Its sandbox may have died before the ports were listed.
        memory.ports.extend(attached);
        if let Some(ports) = ports {
            self.tell_gone(memory, &ports, detached);
            memory.ports = ports;
        }
        let ports = memory.ports.clone();
        self.around.board.post_network(self.id, aim, carriage, ports, &passes, occasion);

        if (!desired && memory.ports.is_empty()) || memory.purge {
            memory.purge = false;
            let directory = self.around.directory.clone();
            drop(events);
            let destroyed = task::spawn_blocking(move || kernel.destroy(&directory)).await;
            match destroyed {
                Ok(Ok(())) => {
                    tracing::info!(network = %self.id, "removed the network from this host")
                }
                Ok(Err(error)) => {
                    tracing::warn!(network = %self.id, error = %Chain(&error), "failed to remove the network's namespace");
                }
                Err(_) => tracing::error!(network = %self.id, "the removal of a network panicked"),
            }
            let lost: BTreeSet<_> = std::mem::take(&mut memory.ports);
            for endpoint in lost {
                self.announce(endpoint);
            }
            self.leave(memory).await;
            return None;
        }
        Some(Opened { kernel, events })
    }

    /// The namespace, opened or made; none if it is not wanted and not there.
    fn opened(&self, opened: Option<Opened>, wanted: bool) -> Result<Option<Opened>, KernelError> {
        if let Some(opened) = opened {
            // Somebody may have removed it under our feet (`ip netns del`): then it is no longer
            // the one that is mounted.
            let name = crate::namespace_name(self.id);
            if self.around.directory.open(&name).is_ok_and(|now| now.is(&opened.kernel.namespace)) {
                return Ok(Some(opened));
            }
            opened.kernel.abandon();
        }
        let kernel = match NetworkKernel::open(self.id, &self.around, wanted) {
            Ok(kernel) => kernel,
            Err(KernelError::Namespace(
                NamespaceError::Missing { .. } | NamespaceError::NotANamespace { .. },
            )) if !wanted => return Ok(None),
            Err(error) => return Err(error),
        };
        let events = Events::open(&kernel.namespace)?;
        Ok(Some(Opened { kernel, events }))
    }

    async fn leave(&self, memory: &mut Memory) {
        (memory.settled, memory.failures) = (false, 0);
        self.around.board.remove(self.id);
        // The supervisor is gone only when all is.
        let _ = self.around.idle.send(self.id).await;
    }

    fn tell_gone(
        &self,
        memory: &Memory,
        ports: &BTreeSet<EndpointId>,
        detached: Option<EndpointId>,
    ) {
        for &endpoint in memory.ports.difference(ports) {
            if Some(endpoint) != detached {
                self.announce(endpoint);
            }
        }
    }

    fn announce(&self, endpoint: EndpointId) {
        tracing::info!(network = %self.id, %endpoint, "a port has gone with its sandbox");
        // Nobody may be listening; `present_ports` tells the same later.
        let _ = self.around.gone.send(Gone { network: self.id, endpoint });
    }
}

/// Waits until `network` is newly among the networks whose TAP has vanished under the tunnel.
///
/// Cancel-safe. What it reports is looked into once: the next pass is due after a pause then.
async fn breaks(broken: &mut Option<watch::Receiver<BTreeSet<NetworkId>>>, network: NetworkId) {
    if let Some(broken) = broken {
        while broken.changed().await.is_ok() {
            if broken.borrow_and_update().contains(&network) {
                return;
            }
        }
    }
    std::future::pending().await
}

async fn changes(opened: &mut Option<Opened>) -> Change {
    match opened {
        Some(Opened { events, .. }) => events.changed().await,
        None => std::future::pending().await,
    }
}

const DEBOUNCE: Duration = Duration::from_millis(20);
const RETRY: Duration = Duration::from_secs(1);
