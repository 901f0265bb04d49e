use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use async_trait::async_trait;
use bytes::Bytes;
use chitchat::{
    ChitchatMessage, Deserializable, Serializable,
    transport::{Socket, Transport},
};
use tokio::sync::{Notify, mpsc};
use weft_model::NodeId;

use crate::{
    Carrier,
    counters::{Tally, count},
    frame::{self, Kind},
    guard::{self, Mention},
};

/// chitchat's way to the other agents: its messages, compressed, over the carrier. Opens once.
///
/// Whoever a message mentions is introduced to the carrier before chitchat sees it: so chitchat
/// knows no address of which the carrier does not know whose it is.
pub(crate) struct Wire<C> {
    socket: Mutex<Option<WireSocket<C>>>,
}

impl<C: Carrier> Wire<C> {
    /// The wire of the node `own` that receives from `queue` and calls `changed` after chitchat has
    /// worked on a message.
    pub(crate) fn new(
        own: NodeId,
        carrier: Arc<C>,
        queue: mpsc::Receiver<(SocketAddr, Bytes)>,
        changed: Arc<Notify>,
        tally: Arc<Tally>,
    ) -> Self {
        let known = BTreeMap::new();
        let socket = WireSocket { own, carrier, queue, changed, tally, known, at_work: false };
        Self { socket: Mutex::new(Some(socket)) }
    }
}

#[async_trait]
impl<C: Carrier> Transport for Wire<C> {
    async fn open(&self, listen_addr: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        let socket =
            socket.with_context(|| format!("the wire at {listen_addr} is open already"))?;
        Ok(Box::new(socket))
    }
}

struct WireSocket<C> {
    own: NodeId,
    carrier: Arc<C>,
    queue: mpsc::Receiver<(SocketAddr, Bytes)>,
    changed: Arc<Notify>,
    tally: Arc<Tally>,
    /// The newest incarnation of each node that was introduced.
    known: BTreeMap<NodeId, u64>,
    /// chitchat was given a message and has not asked for the next one.
    at_work: bool,
}

#[async_trait]
impl<C: Carrier> Socket for WireSocket<C> {
    /// Never waits and never fails: chitchat's loop stands still meanwhile, and one dead peer must
    /// not stop it.
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        let message = frame::seal(Kind::Gossip, &message.serialize_to_vec());
        self.tally.sent(Kind::Gossip, message.len());
        self.carrier.send(to, message);
        Ok(())
    }

    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        if std::mem::take(&mut self.at_work) {
            self.changed.notify_one();
        }
        loop {
            let (from, packed) = self.queue.recv().await.context("the agent has let go")?;
            match read(&packed) {
                Ok((message, mentions)) => {
                    self.introduce(mentions);
                    self.at_work = true;
                    return Ok((from, message));
                }
                Err(error) => {
                    count(&self.tally.rejected);
                    tracing::debug!(%from, %error, "gossip message is not readable");
                }
            }
        }
    }
}

impl<C: Carrier> WireSocket<C> {
    fn introduce(&mut self, mentions: Vec<Mention>) {
        for Mention { node, incarnation, address } in mentions {
            let is_newer = self.known.get(&node).is_none_or(|known| *known < incarnation);
            if node != self.own && is_newer {
                self.known.insert(node, incarnation);
                self.carrier.introduce(node, address);
            }
        }
    }
}

fn read(packed: &[u8]) -> anyhow::Result<(ChitchatMessage, Vec<Mention>)> {
    let body = frame::decompress(packed, MAX_GOSSIP_BYTES)?;
    let mentions = guard::check(&body)?;
    let mut rest = body.as_slice();
    let message = ChitchatMessage::deserialize(&mut rest)?;
    anyhow::ensure!(rest.is_empty(), "{} bytes follow the message", rest.len());
    Ok((message, mentions))
}

/// chitchat keeps its messages to the longest UDP datagram; twice that is no message of its.
const MAX_GOSSIP_BYTES: usize = 128 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Received;

    #[tokio::test]
    async fn whom_a_message_mentions_is_introduced_before_chitchat_has_it() {
        let carrier = Arc::new(Host::default());
        let (messages, queue) = mpsc::channel(4);
        let own = NodeId::from([1; 16]);
        let wire = Wire::new(own, carrier.clone(), queue, Arc::default(), Arc::default());
        let mut socket = wire.open(address(1)).await.unwrap();
        // The second is mentioned with the address of an earlier life, too.
        let first = syn(&[(1, 5, 1), (2, 6, 12), (2, 5, 11), (3, 5, 13)]);
        let second = syn(&[(2, 5, 11), (3, 5, 13), (2, 7, 14)]);
        for (message, introduced) in [(first, [(2, 12), (3, 13)].as_slice()), (second, &[(2, 14)])]
        {
            messages.send((address(2), frame::compress(&message).into())).await.unwrap();
            socket.recv().await.unwrap();
            let expected: Vec<_> = introduced
                .iter()
                .map(|&(node, port)| (NodeId::from([node; 16]), address(port)))
                .collect();
            assert_eq!(std::mem::take(&mut *carrier.introduced.lock().unwrap()), expected);
        }
    }

    /// Keeps in mind who is introduced.
    #[derive(Default)]
    struct Host {
        introduced: Mutex<Vec<(NodeId, SocketAddr)>>,
    }

    impl Carrier for Host {
        fn address(&self) -> SocketAddr {
            address(1)
        }

        fn send(&self, _to: SocketAddr, _message: Bytes) {}

        fn introduce(&self, node: NodeId, address: SocketAddr) {
            self.introduced.lock().unwrap().push((node, address));
        }

        async fn recv(&self) -> Received {
            std::future::pending().await
        }
    }

    /// A message that begins an exchange, with a digest of nodes, their incarnations and ports.
    fn syn(nodes: &[(u8, u64, u8)]) -> Vec<u8> {
        let mut message = 45_139_u16.to_le_bytes().to_vec();
        message.extend([0, 0]);
        message.extend(u16::try_from(nodes.len()).unwrap().to_le_bytes());
        for &(node, incarnation, port) in nodes {
            text(&mut message, &NodeId::from([node; 16]).to_string());
            message.extend(incarnation.to_le_bytes());
            message.extend([4, 192, 0, 2, 1, port, 0]);
            message.extend([0; 24]);
        }
        text(&mut message, "cluster");
        message
    }

    fn text(message: &mut Vec<u8>, text: &str) {
        message.extend(u16::try_from(text.len()).unwrap().to_le_bytes());
        message.extend(text.as_bytes());
    }

    fn address(port: u8) -> SocketAddr {
        ([192, 0, 2, 1], port.into()).into()
    }
}
