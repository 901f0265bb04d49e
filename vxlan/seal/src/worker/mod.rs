//! The threads on the packet path: for each lane one that seals what its TAP queues say, and one
//! that opens what its socket receives.

mod carrier;
mod opening;
mod outbox;
mod poller;
mod sealers;
mod sealing;
mod stations;
mod writer;

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::{StartError, shared::Shared};

pub(crate) use opening::{Parcel, Parcels, reason};

/// Starts the two threads of one lane.
///
/// # Errors
///
/// The system gives no more threads.
pub(crate) fn spawn(
    shared: &Arc<Shared>,
    lane: usize,
    parcels: Parcels,
    token: impl Fn() -> TaskTrackerToken,
) -> Result<(), StartError> {
    let own = Arc::clone(shared);
    start(shared, format!("seal-out-{lane}"), token(), move || {
        sealing::Sealing::new(Arc::clone(&own), lane)?.run();
        Ok(())
    })?;
    let own = Arc::clone(shared);
    let parcels = Arc::new(parcels);
    start(shared, format!("seal-in-{lane}"), token(), move || {
        opening::Opening::new(Arc::clone(&own), lane, Arc::clone(&parcels)).run();
        Ok(())
    })
}

/// Starts a thread that runs `work` until the tunnel stops. If `work` panics it is begun anew: one
/// frame that was not foreseen must not take a host's networks down.
pub(crate) fn start(
    shared: &Arc<Shared>,
    name: String,
    token: TaskTrackerToken,
    mut work: impl FnMut() -> io::Result<()> + Send + 'static,
) -> Result<(), StartError> {
    let shared = Arc::clone(shared);
    let thread = thread::Builder::new().name(name.clone());
    let body = {
        let name = name.clone();
        move || {
            // Held until the thread ends: shutdown waits for it.
            let _token = token;
            while !shared.stop.is_set() {
                let why = match catch_unwind(AssertUnwindSafe(&mut work)) {
                    Ok(Ok(())) => continue,
                    Ok(Err(error)) => error.to_string(),
                    Err(panic) => format!("panic: {}", message(&*panic)),
                };
                shared.worker_failed(&name, &why);
                // The next frame may be as bad: no busy loop.
                thread::park_timeout(RESTART_PAUSE);
            }
        }
    };
    thread.spawn(body).map(drop).map_err(|source| StartError::Thread { name, source })
}

fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a message")
}

const RESTART_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
