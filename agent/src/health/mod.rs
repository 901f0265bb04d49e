//! The health of this host's backends: the checks of services, made by the backend's own host.
//!
//! The [`Checker`] owns the verdicts; the keeper gives them to the others. What a backend's state
//! is, with the word of its node and whether that node is heard, every host derives by itself
//! (`Cluster::services`).

mod checker;
mod connections;
pub mod drain;
mod engine;
mod exec;
mod failure;
mod http;
mod outlet;
mod probe;
mod tally;
mod targets;

use std::{path::PathBuf, sync::Arc};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_vxlan::DataPlane;

pub use self::engine::{EngineContainer, EngineContainers, EngineHealth};
use self::{
    checker::{Checker, Wanted},
    probe::EndpointProber,
    targets::targets,
};
use crate::ledger::{Snapshot, Snapshots, Verdicts};

/// What the checks work with.
pub struct Sources {
    pub snapshots: Snapshots,
    /// What engines that tell by themselves say.
    pub containers: watch::Receiver<Arc<EngineContainers>>,
    pub plane: DataPlane,
    /// Where the programs are that services may run here.
    pub programs: PathBuf,
}

/// Checks this host's backends on `tracker` until `stop`, and keeps `verdicts` up to date.
pub fn start(
    sources: Sources,
    verdicts: watch::Sender<Arc<Verdicts>>,
    tracker: &TaskTracker,
    stop: &CancellationToken,
) {
    let Sources { snapshots, containers, plane, programs } = sources;
    let (wanted, followed) = watch::channel(Arc::new(wanted(&snapshots.borrow())));
    let prober = EndpointProber::new(plane, programs);
    let checker = Checker::new(prober, containers, verdicts, tracker.clone());
    tracker.spawn(checker.run(followed, stop.child_token()));
    tracker.spawn(follow(snapshots, wanted, stop.child_token()));
}

/// Tells the checker of every change of what it has to do.
async fn follow(
    mut snapshots: Snapshots,
    checked: watch::Sender<Arc<Wanted>>,
    stop: CancellationToken,
) {
    while let Some(Ok(())) = stop.run_until_cancelled(snapshots.changed()).await {
        let now = wanted(&snapshots.borrow_and_update());
        checked.send_if_modified(|before| {
            let changed = before.targets != now.targets;
            if changed {
                *before = Arc::new(now);
            }
            changed
        });
    }
}

fn wanted(snapshot: &Snapshot) -> Wanted {
    Wanted { targets: targets(snapshot), verdicts: snapshot.book.verdicts.clone() }
}
