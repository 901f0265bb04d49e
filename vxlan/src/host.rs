//! The task of the host's namespace: its rules and its forwarding switches.

use std::sync::Arc;

use tokio::{sync::watch, task, time};
use tokio_util::sync::CancellationToken;

use crate::{
    Desired, Table,
    board::{Board, Occasion, Wake},
    docker::{self, DockerChains},
    events::Events,
    namespace::Namespace,
    network::Passes,
    rules::{self, HOST_TABLES, Loaded, Ruleset},
    sysctl::{self, KernelSettings},
    table::{Chain, reconcile},
};

pub(crate) struct HostTask {
    pub(crate) namespace: Namespace,
    pub(crate) desired: watch::Receiver<Option<Arc<Desired>>>,
    pub(crate) board: Board,
    pub(crate) resync: time::Duration,
}

impl HostTask {
    pub(crate) async fn run(mut self, mut events: Events, stop: CancellationToken) {
        let mut loaded = Loaded::default();
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
                let namespace = self.namespace.clone();
                let pass =
                    task::spawn_blocking(move || pass(&namespace, loaded, &desired, thorough));
                let Ok((now_loaded, passes, sysctls)) = pass.await else {
                    tracing::error!("a pass over the host's tables panicked");
                    return;
                };
                loaded = now_loaded;
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

fn pass(
    namespace: &Namespace,
    mut loaded: Loaded,
    desired: &Desired,
    thorough: bool,
) -> (Loaded, Passes, Vec<String>) {
    let mut passes = Passes::new();
    let ruleset = Ruleset::of_host(&desired.host);
    // Before forwarding is switched on.
    if thorough || !loaded.is(&ruleset) {
        let pass = rules::reconcile(namespace, HOST_TABLES, &mut loaded, &ruleset);
        passes.insert(Table::Rules, pass);
    }
    let uplinks = desired.networks.values().filter(|network| !network.internal);
    let uplinks: Vec<_> = uplinks.filter_map(|network| network.uplink.as_ref()).collect();
    let v4 = uplinks.iter().any(|uplink| uplink.v4.is_some());
    let v6 = uplinks.iter().any(|uplink| uplink.v6.is_some());
    let mut sysctls = Vec::new();
    if v4 || v6 {
        let mut kernel = KernelSettings::of_host(namespace);
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
        let pass = reconcile(&mut DockerChains(namespace), docker::plan);
        passes.insert(Table::Docker, pass);
    }
    (loaded, passes, sysctls)
}

const RETRY: time::Duration = time::Duration::from_secs(1);
const DEBOUNCE: time::Duration = time::Duration::from_millis(50);
