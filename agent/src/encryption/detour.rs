use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_gossip::quic;
use weft_seal::{Detour, DetourError};

/// Lets the agents' connections take the tunnel's way by a third node, until `stop`.
pub(super) fn join(detour: Detour, tracker: &TaskTracker, stop: CancellationToken) -> quic::Detour {
    let (sender, inbound) = detour.split();
    let (outbound, mut datagrams) = mpsc::channel(QUEUE);
    tracker.spawn(async move {
        while let Some(Some((node, datagram))) = stop.run_until_cancelled(datagrams.recv()).await {
            match sender.send(node, datagram) {
                Ok(()) => {}
                // QUIC sends again what is lost.
                Err(error @ (DetourError::Full | DetourError::Size { .. })) => {
                    tracing::trace!(%node, %error, "a datagram was lost at the detour");
                }
                Err(DetourError::Stopped) => return,
            }
        }
    });
    quic::Detour { outbound, inbound }
}

const QUEUE: usize = 256;
