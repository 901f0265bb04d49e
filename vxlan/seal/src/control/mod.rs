//! The thread that keeps sessions confirmed and paths alive, and that relays.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};
use weft_model::NodeId;

use crate::{Detour, Members, StartError, shared::Shared};

/// What workers tell the control thread.
#[derive(Debug)]
pub(crate) enum Event {
    /// A packet of a control lane came to `socket`.
    Received { socket: usize, from: SocketAddr, packet: Vec<u8> },
    /// A packet that is sealed for `to` must be relayed.
    Relay { to: NodeId, packet: Vec<u8> },
    /// A packet of `len` bytes was larger than the underlay's link takes.
    Narrowed { socket: usize, to: SocketAddr, len: usize },
}

/// Where the control thread hears what it has to do.
#[derive(Debug)]
pub(crate) struct Mouth {
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) detour: mpsc::Receiver<(NodeId, Bytes)>,
    pub(crate) detoured: mpsc::Sender<(NodeId, Bytes)>,
}

pub(crate) fn channels() -> (mpsc::Sender<Event>, Mouth, Detour) {
    let (tell, events) = mpsc::channel(EVENTS);
    let (send, detour) = mpsc::channel(DETOUR);
    let (detoured, received) = mpsc::channel(DETOUR);
    (tell, Mouth { events, detour, detoured }, Detour::new(send, received))
}

pub(crate) fn spawn(
    _shared: &Arc<Shared>,
    _mouth: Mouth,
    _members: watch::Receiver<Arc<Members>>,
    _token: TaskTrackerToken,
    _stop: CancellationToken,
) -> Result<(), StartError> {
    Ok(())
}

/// Packets that wait for the control thread.
const EVENTS: usize = 2048;
const DETOUR: usize = 256;
