use std::{collections::VecDeque, future, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use weft_model::NodeId;

use super::{
    acceptor::Context,
    link::Link,
    refusal::Failure,
    router::Event,
    timing::BackOff,
    traffic::{Meter, Way},
};

/// What the router tells the task of one peer.
#[derive(Debug)]
pub(super) enum Command {
    Send(Bytes),
    /// The peer has dialled us.
    Adopt(Link),
}

/// Owns all that concerns one peer's address: its connections, the attempts to make one, and the
/// messages that wait.
pub(super) struct Peer {
    address: SocketAddr,
    context: Context,
    meter: Arc<Meter>,
    queue: VecDeque<Bytes>,
    links: Vec<Link>,
    /// When to close the links that are not used, if there are any.
    surplus_at: Option<Instant>,
    lost: FuturesUnordered<BoxFuture<'static, (usize, Failure)>>,
    writers: FuturesUnordered<BoxFuture<'static, Option<Bytes>>>,
    dial: Option<BoxFuture<'static, Result<Link, Failure>>>,
    back_off: BackOff,
    retry_at: Instant,
    /// When something was last sent or received, as far as was noticed.
    active: Instant,
    counted: u64,
}

enum Wake {
    Command(Command),
    Released,
    Dialled(Result<Link, Failure>),
    Lost(usize, Failure),
    Written(Option<Bytes>),
    Deadline,
}

impl Peer {
    pub(super) fn new(address: SocketAddr, context: Context, meter: Arc<Meter>) -> Self {
        let now = Instant::now();
        Self {
            address,
            context,
            meter,
            queue: VecDeque::new(),
            links: Vec::new(),
            surplus_at: None,
            lost: FuturesUnordered::new(),
            writers: FuturesUnordered::new(),
            dial: None,
            back_off: BackOff::default(),
            retry_at: now,
            active: now,
            counted: 0,
        }
    }

    /// Serves until the router has released the peer, or the carrier stops.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut idle_told = false;
        loop {
            self.pump();
            let deadline = self.deadline(idle_told);
            let wake = tokio::select! {
                command = commands.recv() => command.map_or(Wake::Released, Wake::Command),
                outcome = pending(&mut self.dial) => Wake::Dialled(outcome),
                Some((id, failure)) = self.lost.next() => Wake::Lost(id, failure),
                Some(unsent) = self.writers.next() => Wake::Written(unsent),
                () = time::sleep_until(deadline) => Wake::Deadline,
            };
            match wake {
                Wake::Command(Command::Send(message)) => {
                    self.active = Instant::now();
                    idle_told = false;
                    self.queue.push_back(message);
                    self.trim();
                }
                Wake::Command(Command::Adopt(link)) => {
                    idle_told = false;
                    // An attempt of ours goes on: the peer may be using its connection already.
                    self.adopt(link).await;
                }
                Wake::Dialled(outcome) => self.dialled(outcome).await,
                Wake::Lost(id, failure) => self.forget(id, &failure).await,
                Wake::Written(None) => {}
                Wake::Written(Some(unsent)) => {
                    self.queue.push_front(unsent);
                    self.trim();
                }
                Wake::Deadline => idle_told = self.meet_deadline(idle_told).await,
                Wake::Released if self.context.stop.is_cancelled() => return self.stop().await,
                Wake::Released => return self.hand_back().await,
            }
        }
    }

    /// Sends what can be sent; begins to dial if that is what it takes.
    fn pump(&mut self) {
        let Some(link) = self.preferred().cloned() else {
            if !self.queue.is_empty() && self.dial.is_none() && self.retry_at <= Instant::now() {
                self.dial = Some(Box::pin(dial(self.address, self.context.clone())));
            }
            return;
        };
        while self.writers.len() < WRITERS_AT_ONCE {
            let Some(message) = self.queue.pop_front() else { return };
            let bytes = message.len();
            let fits = link.connection.max_datagram_size().is_some_and(|max| bytes <= max)
                && bytes <= link.connection.datagram_send_buffer_space();
            if fits && link.connection.send_datagram(message.clone()).is_ok() {
                self.meter.sent(Way::Datagram, bytes);
                continue;
            }
            let (link, meter) = (link.clone(), self.meter.clone());
            self.writers.push(Box::pin(async move {
                match link.send_on_stream(message.clone(), &meter).await {
                    true => None,
                    false => Some(message),
                }
            }));
        }
    }

    /// Keeps the newest messages: while nothing is connected only a few, since old news is of
    /// little use to a peer that returns.
    fn trim(&mut self) {
        let limit = if self.links.is_empty() { WAITING_UNCONNECTED } else { WAITING_CONNECTED };
        let mut room = WAITING_BYTES;
        let fitting = self.queue.iter().rev().take(limit).take_while(|message| {
            let fits = message.len() <= room;
            room = room.saturating_sub(message.len());
            fits
        });
        let excess = self.queue.len() - fitting.count();
        self.queue.drain(..excess);
        self.meter.not_sent(excess);
    }

    async fn dialled(&mut self, outcome: Result<Link, Failure>) {
        self.dial = None;
        match outcome {
            Ok(link) => self.adopt(link).await,
            Err(failure) => {
                self.wait_to_retry(&failure);
                self.tell(Event::Failed { address: self.address, failure }).await;
            }
        }
    }

    async fn adopt(&mut self, link: Link) {
        for other in self.links.iter().filter(|other| other.peer.node != link.peer.node) {
            other.close("closed: another node has this address now");
        }
        let (id, connection) = (link.id(), link.connection.clone());
        self.lost.push(Box::pin(async move { (id, connection.closed().await.into()) }));
        let reader = link.clone().read(self.address, self.context.clone(), self.meter.clone());
        self.context.tracker.spawn(reader);
        self.links.push(link);
        self.active = Instant::now();
        self.settle();
        self.publish().await;
    }

    async fn forget(&mut self, id: usize, failure: &Failure) {
        let Some(index) = self.links.iter().position(|link| link.id() == id) else { return };
        let link = self.links.remove(index);
        tracing::debug!(peer = %link.peer.node, address = %self.address, reason = %failure,
            "a connection ended");
        self.settle();
        match link.since.elapsed() < SHORT_LIFE {
            true => self.wait_to_retry(failure),
            false => {
                self.back_off.reset();
                self.retry_at = Instant::now();
            }
        }
        self.trim();
        self.publish().await;
    }

    fn wait_to_retry(&mut self, failure: &Failure) {
        let timing = &self.context.timing;
        let limit = if failure.reason.is_lasting() { timing.retry_refused } else { timing.retry };
        self.retry_at = Instant::now() + self.back_off.next(limit, rand::random());
    }

    /// When to look again even if nothing happens.
    fn deadline(&self, idle_told: bool) -> Instant {
        let idle = (!idle_told).then(|| self.active + self.patience());
        let retry = (self.links.is_empty() && self.dial.is_none() && !self.queue.is_empty())
            .then_some(self.retry_at);
        let far = Instant::now() + Duration::from_secs(3600);
        [idle, self.surplus_at, retry].into_iter().flatten().min().unwrap_or(far)
    }

    /// Closes what is of no more use; true once the router knows that this peer is idle.
    async fn meet_deadline(&mut self, idle_told: bool) -> bool {
        let now = Instant::now();
        if self.surplus_at.is_some_and(|at| at <= now) {
            self.surplus_at = None;
            self.close_surplus();
        }
        let traffic = self.meter.read();
        let count = traffic.sent_messages() + traffic.received_messages();
        if count != self.counted {
            self.counted = count;
            self.active = now;
            return idle_told;
        }
        if idle_told || now < self.active + self.patience() {
            return idle_told;
        }
        self.meter.not_sent(self.queue.drain(..).count());
        for link in &self.links {
            link.close("closed: idle");
        }
        self.tell(Event::Idle(self.address)).await;
        true
    }

    /// Gives what is under way on links that are not used the time to arrive.
    fn settle(&mut self) {
        let linger = self.context.timing.linger;
        self.surplus_at = (self.links.len() > 1).then(|| Instant::now() + linger);
    }

    fn patience(&self) -> Duration {
        let idle = self.context.timing.idle;
        if self.links.is_empty() { idle.min(GIVE_UP) } else { idle }
    }

    fn close_surplus(&self) {
        let Some(kept) = self.preferred() else { return };
        let surplus = self.links.iter().filter(|link| link.id() != kept.id());
        // Of two that were dialled from both ends, the dialler closes its own: it knows by now
        // that both ends have the other.
        for link in surplus.filter(|link| link.dialled || link.dialled == kept.dialled) {
            link.close("closed: another connection is used");
        }
    }

    fn preferred(&self) -> Option<&Link> {
        preferred(&self.links, self.context.own)
    }

    async fn publish(&mut self) {
        let link = self.preferred().cloned();
        self.tell(Event::Linked { address: self.address, link }).await;
    }

    async fn tell(&mut self, event: Event) {
        // The router ends only when the carrier does.
        let _ = self.context.events.send(event).await;
    }

    /// Gives back what came in between the decision to end and the end.
    async fn hand_back(mut self) {
        for message in self.queue.drain(..) {
            let event = Event::Send(self.address, message);
            if self.context.events.send(event).await.is_err() {
                return;
            }
        }
        for link in &self.links {
            link.close("closed: idle");
        }
    }

    /// Sends what waits, if there is a connection for it, and closes.
    async fn stop(mut self) {
        self.dial = None;
        let connected = !self.links.is_empty();
        let sent = async {
            while connected && !(self.queue.is_empty() && self.writers.is_empty()) {
                self.pump();
                if let Some(Some(unsent)) = self.writers.next().await {
                    // The connection is lost, and nobody is left to make another.
                    drop(unsent);
                    return;
                }
            }
        };
        // Whatever is not sent by then is lost, as any message may be.
        let _ = time::timeout(LAST_WORDS, sent).await;
        if let Some(link) = self.preferred().cloned() {
            link.flush(LAST_WORDS).await;
        }
        for link in &self.links {
            link.close("closed: the agent stops");
        }
    }
}

/// The connection to use of `links`, which are in the order of their making and lead to one node.
///
/// The newest, because whoever dials while there is one does not know of it any more, except where
/// both ends have dialled at the same time: then both keep that of the smaller node id.
fn preferred(links: &[Link], own: NodeId) -> Option<&Link> {
    links.iter().reduce(|kept, newer| {
        let crossed = kept.dialled != newer.dialled
            && newer.since.duration_since(kept.since) < CROSSING
            && kept.peer.node == newer.peer.node;
        let smaller = own.min(newer.peer.node);
        match crossed && kept.dialler(own) == smaller {
            true => kept,
            false => newer,
        }
    })
}

async fn dial(address: SocketAddr, context: Context) -> Result<Link, Failure> {
    let limit = context.timing.dial;
    let attempt = async {
        let link = context.connect(address).await?;
        link.accepted().await?;
        Ok(link)
    };
    time::timeout(limit, attempt).await.unwrap_or_else(|_| Err(Failure::timeout(limit)))
}

/// Waits for a future that may not be there.
async fn pending<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => future::pending().await,
    }
}

const WAITING_UNCONNECTED: usize = 16;
const WAITING_CONNECTED: usize = 256;
const WAITING_BYTES: usize = 8 << 20;
const WRITERS_AT_ONCE: usize = 16;
/// Connections that were made within this time of one another were dialled at the same time.
const CROSSING: Duration = Duration::from_secs(2);
/// A connection that ends sooner counts as an attempt that failed.
const SHORT_LIFE: Duration = Duration::from_secs(1);
const GIVE_UP: Duration = Duration::from_secs(10);
const LAST_WORDS: Duration = Duration::from_millis(250);
