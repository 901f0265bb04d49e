//! The task of the host's namespace: its rules and its forwarding switches.

use std::{collections::BTreeSet, sync::Arc};

use tokio::{sync::watch, task, time};
use tokio_util::sync::CancellationToken;
use weft_model::Vni;

use crate::{
    Desired, Table,
    board::{Board, Occasion, Wake},
    docker::{self, DockerChains},
    events::Events,
    guard::Guard,
    namespace::{Directory, Namespace},
    network::{self, Passes},
    rules::{self, Loaded},
    ruleset::{HOST_TABLES, Ruleset},
    sysctl::{self, KernelSettings},
    table::{Chain, Pass, TableError, reconcile},
};

pub(crate) struct HostTask {
    pub(crate) namespace: Namespace,
    /// Of the networks' namespaces.
    pub(crate) directory: Directory,
    pub(crate) guard: watch::Sender<Guard>,
    pub(crate) desired: watch::Receiver<Option<Arc<Desired>>>,
    pub(crate) board: Board,
    pub(crate) resync: time::Duration,
}

impl HostTask {
    pub(crate) async fn run(mut self, mut events: Events, stop: CancellationToken) {
        let Self { namespace, directory, guard, .. } = &self;
        let mut kernel = HostKernel {
            namespace: namespace.clone(),
            directory: directory.clone(),
            guard: guard.clone(),
            loaded: Loaded::default(),
            vnis: BTreeSet::new(),
        };
        let (mut wake, mut thorough, mut settled) = (Wake::Start, true, false);
        let mut changed = Some(time::Instant::now());
        let mut failures = 0u32;
        loop {
            if wake == Wake::KernelChanged {
                time::sleep(DEBOUNCE).await;
                events.settle();
            }
            // As for a network: what the newest state asks for is no repair.
            if self.desired.has_changed().unwrap_or(false) {
                changed = Some(time::Instant::now());
                if matches!(wake, Wake::KernelChanged | Wake::Resync) {
                    wake = Wake::DesiredChanged;
                }
            }
            let desired = self.desired.borrow_and_update().clone();
            if let Some(desired) = desired {
                let pass = task::spawn_blocking(move || {
                    let (passes, sysctls) = kernel.reconcile(&desired, thorough);
                    (kernel, passes, sysctls)
                });
                let Ok((returned, passes, sysctls)) = pass.await else {
                    tracing::error!("a pass over the host's tables panicked");
                    return;
                };
                kernel = returned;
                let since = changed.map(|changed| changed.elapsed());
                self.board.post_host(&passes, sysctls, Occasion { wake, settled, since });
                settled = passes.values().all(|pass| pass.errors.is_empty());
                match settled {
                    true => (changed, failures) = (None, 0),
                    false => failures += 1,
                }
            }
            let pause = match failures {
                0 => self.resync,
                failures => self.resync.min(RETRY * 2u32.pow(failures.min(8) - 1)),
            };
            (wake, thorough) = tokio::select! {
                () = stop.cancelled() => return,
                more = self.desired.changed() => match more {
                    Ok(()) => {
                        changed = Some(time::Instant::now());
                        (Wake::DesiredChanged, false)
                    }
                    Err(_) => return,
                },
                _ = events.changed() => (Wake::KernelChanged, true),
                () = time::sleep(pause) => (Wake::Resync, true),
            };
        }
    }
}

/// The host's namespace, and what is remembered of it between passes.
struct HostKernel {
    namespace: Namespace,
    directory: Directory,
    guard: watch::Sender<Guard>,
    loaded: Loaded,
    /// Those that the rules guard.
    vnis: BTreeSet<Vni>,
}

impl HostKernel {
    fn reconcile(&mut self, desired: &Desired, thorough: bool) -> (Passes, Vec<String>) {
        let mut passes = Passes::new();
        // Before forwarding is switched on.
        if let Some(pass) = self.reconcile_rules(desired, thorough) {
            passes.insert(Table::Rules, pass);
        }
        let uplinks = desired.networks.values().filter(|network| !network.internal);
        let uplinks: Vec<_> = uplinks.filter_map(|network| network.uplink.as_ref()).collect();
        let v4 = uplinks.iter().any(|uplink| uplink.v4.is_some());
        let v6 = uplinks.iter().any(|uplink| uplink.v6.is_some());
        let mut sysctls = Vec::new();
        if v4 || v6 {
            let mut kernel = KernelSettings::of_host(&self.namespace);
            let pass = reconcile(&mut kernel, |found| {
                let ops = sysctl::plan_forwarding(v4, v6, found);
                sysctls = ops.iter().map(ToString::to_string).collect();
                ops
            });
            if !sysctls.is_empty() {
                tracing::info!(settings = ?sysctls, "changed kernel settings, so that networks reach outside");
            }
            for error in &pass.errors {
                tracing::debug!(error = %Chain(error), "a kernel setting was not changed");
            }
            passes.insert(Table::Sysctls, pass);
            let pass = reconcile(&mut DockerChains(&self.namespace), docker::plan);
            passes.insert(Table::Docker, pass);
        }
        (passes, sysctls)
    }

    /// Brings the rules up to date, and tells the networks' tasks how that went.
    fn reconcile_rules(&mut self, desired: &Desired, thorough: bool) -> Option<Pass> {
        let wanted = desired.networks.values().filter_map(|network| network.transport.vni());
        let mut unread = None;
        if thorough {
            // A network that is no longer desired is guarded as long as it is there.
            match network::present_vnis(&self.directory) {
                Ok(present) => self.vnis = present,
                Err(source) => {
                    unread = Some(TableError::Read { table: Table::Rules.as_str(), source });
                }
            }
        }
        self.vnis.extend(wanted);
        let ruleset = Ruleset::of_host(&desired.host, &self.vnis);
        let mut pass = (thorough || !self.loaded.is(&ruleset))
            .then(|| rules::reconcile(&self.namespace, HOST_TABLES, &mut self.loaded, &ruleset));
        if let Some(pass) = &mut pass {
            let error = pass.errors.first().map(|error| Chain(error).to_string());
            self.tell(error);
            pass.errors.extend(unread);
        } else {
            self.tell(None);
        }
        self.loaded.look(&self.namespace, HOST_TABLES);
        pass
    }

    fn tell(&self, error: Option<String>) {
        let now = Guard { vnis: self.vnis.clone(), tried: true, error };
        self.guard.send_if_modified(|guard| {
            let changed = *guard != now;
            *guard = now;
            changed
        });
    }
}

const RETRY: time::Duration = time::Duration::from_secs(1);
const DEBOUNCE: time::Duration = time::Duration::from_millis(50);
