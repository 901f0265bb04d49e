//! The thread that keeps sessions confirmed and paths alive, and that relays.

mod desk;
mod keyring;
mod report;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    runtime,
    sync::{mpsc, watch},
    time,
};
use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};
use weft_model::NodeId;

use self::desk::Desk;
use crate::{Detour, Members, StartError, shared::Shared, worker};

/// What workers tell the control thread.
#[derive(Debug)]
pub(crate) enum Event {
    /// A packet of a control lane came to `socket`.
    Received { socket: usize, from: SocketAddr, packet: Vec<u8> },
    /// An authentic packet of `peer` came to `socket`; told about once a second.
    Heard { peer: NodeId, socket: usize, from: SocketAddr },
    /// A packet that is sealed for `to` must be relayed.
    Relay { to: NodeId, packet: Vec<u8> },
    /// A packet of `len` bytes was larger than the underlay's link takes.
    Narrowed { socket: usize, to: SocketAddr, len: usize },
}

/// Where the control thread hears what it has to do.
#[derive(Debug)]
pub(crate) struct Mouth {
    events: mpsc::Receiver<Event>,
    detour: mpsc::Receiver<(NodeId, Bytes)>,
    detoured: mpsc::Sender<(NodeId, Bytes)>,
}

pub(crate) fn channels() -> (mpsc::Sender<Event>, Mouth, Detour) {
    let (tell, events) = mpsc::channel(EVENTS);
    let (send, detour) = mpsc::channel(DETOUR);
    let (detoured, received) = mpsc::channel(DETOUR);
    (tell, Mouth { events, detour, detoured }, Detour::new(send, received))
}

/// Starts the control thread. It ends, and all other threads with it, when `stop` is cancelled.
///
/// # Errors
///
/// The system gives no more threads.
pub(crate) fn spawn(
    shared: &Arc<Shared>,
    mut mouth: Mouth,
    mut members: watch::Receiver<Arc<Members>>,
    token: TaskTrackerToken,
    stop: CancellationToken,
) -> Result<(), StartError> {
    let own = Arc::clone(shared);
    worker::start(shared, "seal-control".into(), token, move || {
        // Of its own: crypto for relayed packets must not hold up the agent's other tasks.
        let runtime = runtime::Builder::new_current_thread().enable_time().build()?;
        runtime.block_on(run(&own, &mut mouth, &mut members, &stop));
        Ok(())
    })
}

async fn run(
    shared: &Arc<Shared>,
    mouth: &mut Mouth,
    members: &mut watch::Receiver<Arc<Members>>,
    stop: &CancellationToken,
) {
    let mut desk = Desk::new(Arc::clone(shared), mouth.detoured.clone());
    desk.meet(time::Instant::now().into(), members.borrow_and_update().clone());
    let mut report = time::interval(REPORT_INTERVAL);
    report.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    let mut members_live = true;

    loop {
        let due = desk.deadline().map(time::Instant::from);
        let sleep = async {
            match due {
                Some(due) => time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        // Every arm is cancel-safe and none awaits in its body.
        let wake = tokio::select! {
            () = stop.cancelled() => Wake::Stop,
            changed = members.changed(), if members_live => match changed {
                Ok(()) => Wake::Members,
                Err(_) => Wake::MembersEnded,
            },
            Some(event) = mouth.events.recv() => Wake::Event(event),
            Some((to, datagram)) = mouth.detour.recv() => Wake::Detour(to, datagram),
            () = sleep => Wake::Due,
            _ = report.tick() => Wake::Report,
        };
        let now = time::Instant::now().into();
        match wake {
            Wake::Stop => return shared.stop.set(),
            Wake::Members => desk.meet(now, members.borrow_and_update().clone()),
            Wake::MembersEnded => members_live = false,
            Wake::Event(event) => {
                desk.hear(now, event);
                for _ in 0..BATCH {
                    let Ok(event) = mouth.events.try_recv() else { break };
                    desk.hear(now, event);
                }
            }
            Wake::Detour(to, datagram) => desk.detour(now, to, &datagram),
            Wake::Due => {}
            Wake::Report => desk.look_round(now),
        }
        desk.settle(now);
    }
}

enum Wake {
    Stop,
    Members,
    MembersEnded,
    Event(Event),
    Detour(NodeId, Bytes),
    Due,
    Report,
}

/// Packets that wait for the control thread: what a relay sends in a few milliseconds.
const EVENTS: usize = 4096;

const DETOUR: usize = 256;

/// Events that are heard before routes and status are looked at again.
const BATCH: usize = 64;

/// How often status is made anew although nothing is known to have happened.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
