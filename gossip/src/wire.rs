use std::{
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

use crate::{
    Carrier,
    counters::{Tally, count},
    frame::{self, Kind},
    guard,
};

/// chitchat's way to the other agents: its messages, compressed, over the carrier. Opens once.
pub(crate) struct Wire<C> {
    socket: Mutex<Option<WireSocket<C>>>,
}

impl<C: Carrier> Wire<C> {
    /// A wire that receives from `queue` and calls `changed` after chitchat has worked on a
    /// message.
    pub(crate) fn new(
        carrier: Arc<C>,
        queue: mpsc::Receiver<(SocketAddr, Bytes)>,
        changed: Arc<Notify>,
        tally: Arc<Tally>,
    ) -> Self {
        let socket = WireSocket { carrier, queue, changed, tally, at_work: false };
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
    carrier: Arc<C>,
    queue: mpsc::Receiver<(SocketAddr, Bytes)>,
    changed: Arc<Notify>,
    tally: Arc<Tally>,
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
                Ok(message) => {
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

fn read(packed: &[u8]) -> anyhow::Result<ChitchatMessage> {
    let body = frame::decompress(packed, MAX_GOSSIP_BYTES)?;
    guard::check(&body)?;
    let mut rest = body.as_slice();
    let message = ChitchatMessage::deserialize(&mut rest)?;
    anyhow::ensure!(rest.is_empty(), "{} bytes follow the message", rest.len());
    Ok(message)
}

/// chitchat keeps its messages to the longest UDP datagram; twice that is no message of its.
const MAX_GOSSIP_BYTES: usize = 128 * 1024;
