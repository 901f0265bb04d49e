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
    time::Duration,
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
    work: impl FnMut() -> io::Result<()> + Send + 'static,
) -> Result<(), StartError> {
    let shared = Arc::clone(shared);
    let thread = thread::Builder::new().name(name.clone());
    let body = {
        let name = name.clone();
        move || {
            // Shutdown waits for it. Given back last: the sockets are closed by then.
            let _token = token;
            let (shared, mut work) = (shared, work);
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

const RESTART_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::TunnelConfig;

    #[test]
    fn a_thread_that_panics_begins_anew_and_the_status_says_so() {
        let config = TunnelConfig::on_loopback(16_799);
        let (shared, _ends) = Shared::open(config).unwrap();
        let tracker = TaskTracker::new();
        let (tell, told) = mpsc::channel();
        let (own, mut runs) = (Arc::clone(&shared), 0);
        start(&shared, "seal-test".into(), tracker.token(), move || {
            runs += 1;
            tell.send(runs).unwrap();
            match runs {
                1 => panic!("an unforeseen frame"),
                2 => Err(io::Error::other("an unforeseen error")),
                _ => {
                    own.stop.set();
                    Ok(())
                }
            }
        })
        .unwrap();

        for run in 1..=3 {
            assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(run));
        }
        assert!(
            told.recv_timeout(Duration::from_secs(10)).is_err(),
            "the thread ends when it is told to"
        );
        let warnings = shared.warnings().join("; ");
        assert!(warnings.contains("panic: an unforeseen frame"), "{warnings}");
        assert!(warnings.contains("an unforeseen error"), "{warnings}");
    }
}
