use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use weft_model::NodeId;

/// The longest message that a carrier takes, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Carries messages between agents. Neither delivery nor order is promised.
pub trait Carrier: Send + Sync + 'static {
    /// The address at which other agents reach this one.
    fn address(&self) -> SocketAddr;

    /// Hands `message` to the peer at `to`. Never blocks; drops and counts what cannot be sent,
    /// which includes everything longer than [`MAX_MESSAGE_BYTES`].
    fn send(&self, to: SocketAddr, message: Bytes);

    /// The same to `node`, which was last known to be at `address`: for a carrier that finds its own
    /// ways to a node.
    fn send_to(&self, _node: NodeId, address: SocketAddr, message: Bytes) {
        self.send(address, message);
    }

    /// Tells that `node` says it is reached at `address`: a carrier that finds its own ways may use
    /// another one to it.
    fn introduce(&self, _node: NodeId, _address: SocketAddr) {}

    /// The next message and who sent it. Cancel-safe. Pends for ever once the carrier has stopped.
    fn recv(&self) -> impl Future<Output = Received> + Send;
}

/// A message as it arrived.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Received {
    /// The sender, as the carrier has authenticated it.
    pub from: NodeId,
    /// Where the sender is reached: an answer sent there arrives.
    pub address: SocketAddr,
    pub message: Bytes,
}

impl<C: Carrier> Carrier for Arc<C> {
    fn address(&self) -> SocketAddr {
        self.as_ref().address()
    }

    fn send(&self, to: SocketAddr, message: Bytes) {
        self.as_ref().send(to, message);
    }

    fn send_to(&self, node: NodeId, address: SocketAddr, message: Bytes) {
        self.as_ref().send_to(node, address, message);
    }

    fn introduce(&self, node: NodeId, address: SocketAddr) {
        self.as_ref().introduce(node, address);
    }

    fn recv(&self) -> impl Future<Output = Received> + Send {
        self.as_ref().recv()
    }
}
