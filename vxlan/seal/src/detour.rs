use bytes::Bytes;
use tokio::sync::mpsc;
use weft_model::NodeId;

/// Opaque datagrams to and from peers, by way of a third node that relays.
///
/// It is how two nodes that do not reach each other make the session that their keys come from.
/// Whoever carries something here has to authenticate it: a relay can send whatever it likes.
#[derive(Debug)]
pub struct Detour {
    sender: DetourSender,
    received: mpsc::Receiver<(NodeId, Bytes)>,
}

/// The sending half of a [`Detour`].
#[derive(Clone, Debug)]
pub struct DetourSender(mpsc::Sender<(NodeId, Bytes)>);

impl Detour {
    pub(crate) fn new(
        send: mpsc::Sender<(NodeId, Bytes)>,
        received: mpsc::Receiver<(NodeId, Bytes)>,
    ) -> Self {
        Self { sender: DetourSender(send), received }
    }

    pub fn sender(&self) -> DetourSender {
        self.sender.clone()
    }

    /// # Errors
    ///
    /// As [`DetourSender::send`].
    pub fn send(&self, to: NodeId, datagram: Bytes) -> Result<(), DetourError> {
        self.sender.send(to, datagram)
    }

    /// The next datagram and who sent it, as the relay says. `None` once the tunnel has stopped.
    ///
    /// Cancel-safe.
    pub async fn recv(&mut self) -> Option<(NodeId, Bytes)> {
        self.received.recv().await
    }

    /// Both halves, for a user that sends and receives in different tasks.
    pub fn split(self) -> (DetourSender, mpsc::Receiver<(NodeId, Bytes)>) {
        (self.sender, self.received)
    }
}

impl DetourSender {
    /// The most that one datagram may have, in bytes: the least that QUIC needs (RFC 9000 section
    /// 14). Relayed, it fits an underlay MTU of 1284 bytes, or 1304 over IPv6.
    pub const MAX_LEN: usize = 1200;

    /// Sends `datagram` to `to` by whichever relay there is. Whether it arrives is as uncertain as
    /// with UDP; without a relay it is dropped.
    ///
    /// # Errors
    ///
    /// The datagram is too large, the tunnel is behind with sending, or it has stopped.
    pub fn send(&self, to: NodeId, datagram: Bytes) -> Result<(), DetourError> {
        if datagram.len() > Self::MAX_LEN {
            return Err(DetourError::Size { len: datagram.len() });
        }
        self.0.try_send((to, datagram)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => DetourError::Full,
            mpsc::error::TrySendError::Closed(_) => DetourError::Stopped,
        })
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DetourError {
    #[error(
        "a datagram of {len} bytes is too large for a detour, which takes {}",
        DetourSender::MAX_LEN
    )]
    Size { len: usize },
    #[error("the detour's queue is full: send slower")]
    Full,
    #[error("the tunnel has stopped")]
    Stopped,
}
