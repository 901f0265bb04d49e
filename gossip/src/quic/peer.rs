use std::{collections::VecDeque, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use quinn::ConnectionError;
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use weft_model::NodeId;

use super::{
    acceptor::Context,
    detour::virtual_address,
    lane::{Attempt, Lane},
    link::Link,
    links::Links,
    refusal::{Failure, FailureReason},
    router::Event,
    traffic::{Meter, Way},
};

/// Whom a task serves.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Target {
    Node(NodeId),
    /// Whoever is there: nobody has told yet, and no connection has shown it.
    Stranger(SocketAddr),
}

/// What the router tells the task of one peer.
#[derive(Debug)]
pub(super) enum Command {
    Send(Bytes),
    /// A connection with the peer, which may have been dialled by either.
    Adopt(Link),
    /// The peer says that it is reached there.
    Introduce(SocketAddr),
    /// A connection is wanted for the next seconds, even if there is nothing to say.
    Want,
}

/// Owns all that concerns one peer: its connections, the attempts to make one, and the messages
/// that wait.
pub(super) struct Peer {
    target: Target,
    context: Context,
    meter: Arc<Meter>,
    /// Where to dial, what the peer itself says first.
    pub(super) addresses: Vec<SocketAddr>,
    /// Which of the addresses is tried next.
    turn: usize,
    queue: VecDeque<Bytes>,
    links: Links,
    lost: FuturesUnordered<BoxFuture<'static, (usize, ConnectionError)>>,
    writers: FuturesUnordered<BoxFuture<'static, Option<Bytes>>>,
    direct: Lane,
    detour: Lane,
    /// Direct attempts that got no answer since one did.
    unanswered: u32,
    wanted_until: Instant,
    /// When something was last sent or received, as far as was noticed.
    active: Instant,
    counted: u64,
    idle_told: bool,
}

enum Wake {
    Command(Command),
    Released,
    Dialled(Attempt),
    Detoured(Attempt),
    Lost(usize, ConnectionError),
    Written(Option<Bytes>),
    Deadline,
}

impl Peer {
    pub(super) fn new(target: Target, context: Context, meter: Arc<Meter>) -> Self {
        let now = Instant::now();
        let addresses = match target {
            Target::Node(_) => Vec::new(),
            Target::Stranger(address) => vec![address],
        };
        Self {
            target,
            links: Links::new(context.own),
            context,
            meter,
            addresses,
            turn: 0,
            queue: VecDeque::new(),
            lost: FuturesUnordered::new(),
            writers: FuturesUnordered::new(),
            direct: Lane::new(now),
            detour: Lane::new(now),
            unanswered: 0,
            wanted_until: now,
            active: now,
            counted: 0,
            idle_told: false,
        }
    }

    /// Serves until the router has released the peer, or the carrier stops.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            self.dial();
            self.pump();
            let deadline = self.deadline();
            let wake = tokio::select! {
                command = commands.recv() => command.map_or(Wake::Released, Wake::Command),
                attempt = self.direct.outcome() => Wake::Dialled(attempt),
                attempt = self.detour.outcome() => Wake::Detoured(attempt),
                Some((id, error)) = self.lost.next() => Wake::Lost(id, error),
                Some(unsent) = self.writers.next() => Wake::Written(unsent),
                () = time::sleep_until(deadline) => Wake::Deadline,
            };
            match wake {
                Wake::Command(command) => self.obey(command).await,
                Wake::Dialled((address, outcome)) => self.dialled(address, outcome).await,
                Wake::Detoured((_, outcome)) => self.detoured(outcome).await,
                Wake::Lost(id, error) => self.forget(id, error).await,
                Wake::Written(None) => {}
                Wake::Written(Some(unsent)) => {
                    self.queue.push_front(unsent);
                    self.trim();
                }
                Wake::Deadline => self.meet_deadline().await,
                Wake::Released if self.context.stop.is_cancelled() => return self.stop().await,
                Wake::Released => return self.hand_back().await,
            }
        }
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Send(message) => {
                self.be_active();
                self.queue.push_back(message);
                self.trim();
            }
            // An attempt of ours goes on: the peer may be using its connection already.
            Command::Adopt(link) => self.adopt(link).await,
            Command::Introduce(address) => {
                self.addresses.retain(|known| *known != address);
                self.addresses.insert(0, address);
                self.addresses.truncate(ADDRESSES);
                self.turn = 0;
            }
            Command::Want => {
                self.be_active();
                self.wanted_until = Instant::now() + WANTED;
            }
        }
    }

    fn be_active(&mut self) {
        self.active = Instant::now();
        self.idle_told = false;
    }

    /// Remembers where the peer was met, after where it says that it is.
    fn remember(&mut self, address: SocketAddr) {
        if !self.addresses.contains(&address) {
            self.addresses.insert(self.addresses.len().min(1), address);
            self.addresses.truncate(ADDRESSES);
        }
    }

    /// Begins the attempts that are due.
    fn dial(&mut self) {
        let now = Instant::now();
        if self.direct_due().is_some_and(|at| at <= now) {
            let address = self.addresses[self.turn % self.addresses.len()];
            self.direct.begin(address, self.context.clone());
        }
        if let Some((node, at)) = self.detour_due()
            && at <= now
        {
            self.detour.begin(virtual_address(node), self.context.clone());
        }
    }

    /// When to dial the peer where it says it is.
    fn direct_due(&self) -> Option<Instant> {
        let free = self.direct.free_at().filter(|_| !self.addresses.is_empty())?;
        match self.links.preferred() {
            None => self.is_wanted().then_some(free),
            Some(link) if link.detoured => Some(free),
            Some(_) => self.links.renew_at().map(|at| at.max(free)),
        }
    }

    /// When to dial the peer by the detour.
    fn detour_due(&self) -> Option<(NodeId, Instant)> {
        let Target::Node(node) = self.target else { return None };
        let free = self.detour.free_at().filter(|_| self.context.has_detour)?;
        let due = match self.links.preferred() {
            None if self.is_wanted() && self.unanswered >= UNREACHED => Some(free),
            Some(link) if link.detoured => self.links.renew_at().map(|at| at.max(free)),
            None | Some(_) => None,
        };
        due.map(|at| (node, at))
    }

    fn is_wanted(&self) -> bool {
        !self.queue.is_empty() || Instant::now() < self.wanted_until
    }

    /// Sends what can be sent.
    fn pump(&mut self) {
        let Some(link) = self.links.preferred().cloned() else { return };
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

    async fn dialled(&mut self, address: SocketAddr, outcome: Result<Link, Failure>) {
        let failure = match (outcome, self.target) {
            (Ok(link), Target::Node(node)) if link.peer.node == node => {
                return self.adopt(link).await;
            }
            (Ok(link), Target::Stranger(_)) => {
                let waiting = self.queue.drain(..).collect();
                self.tell(Event::Met { link, waiting }).await;
                return self.tell_idle().await;
            }
            (Ok(link), Target::Node(_)) => {
                let text = format!("node {} is there now", link.peer.node);
                self.tell(Event::Met { link, waiting: Vec::new() }).await;
                Failure::new(FailureReason::Unreachable, text)
            }
            (Err(failure), _) => failure,
        };
        if matches!(failure.reason, FailureReason::Timeout | FailureReason::Unreachable) {
            self.unanswered = self.unanswered.saturating_add(1);
        }
        self.turn = self.turn.wrapping_add(1);
        let limit = self.longest_wait(&failure);
        self.direct.put_off(limit);
        let connected = !self.links.is_empty();
        self.tell(Event::Failed { address, failure, connected }).await;
    }

    async fn detoured(&mut self, outcome: Result<Link, Failure>) {
        match outcome {
            Ok(link) if Target::Node(link.peer.node) == self.target => self.adopt(link).await,
            Ok(link) => {
                link.close("closed: the detour led to another node");
                self.detour.put_off(self.context.timing.retry_refused);
            }
            Err(failure) => {
                tracing::debug!(peer = ?self.target, reason = %failure, "a detour failed");
                self.detour.put_off(self.longest_wait(&failure));
            }
        }
    }

    fn longest_wait(&self, failure: &Failure) -> Duration {
        let timing = &self.context.timing;
        match (failure.reason.is_lasting(), self.links.is_empty()) {
            (true, _) => timing.retry_refused,
            (false, true) => timing.retry,
            (false, false) => timing.retry_direct,
        }
    }

    async fn adopt(&mut self, link: Link) {
        for other in self.links.iter() {
            let other = other.clone();
            // If the peer has restarted, it answers by a reset, and the old connection is gone.
            self.context.tracker.spawn(async move { other.flush(PROBE).await });
        }
        let (id, connection) = (link.id(), link.connection.clone());
        self.lost.push(Box::pin(async move { (id, connection.closed().await) }));
        let reader = link.clone().read(self.context.clone(), self.meter.clone());
        self.context.tracker.spawn(reader);
        if !link.detoured {
            self.unanswered = 0;
            self.remember(link.address);
        }
        let now = self.context.clock.now();
        let lasts = self.context.timing.lasts(link.expires() - now, rand::random());
        self.links.add(link, lasts, &self.context.timing);
        self.be_active();
        self.publish().await;
    }

    async fn forget(&mut self, id: usize, error: ConnectionError) {
        let Some(link) = self.links.remove(id, &self.context.timing) else { return };
        // Whoever fell silent or restarted is wanted back; who has closed has its reasons.
        if matches!(error, ConnectionError::Reset | ConnectionError::TimedOut) {
            self.wanted_until = Instant::now() + WANTED;
        }
        let failure = Failure::from(error);
        tracing::debug!(peer = %link.peer.node, address = %link.address, reason = %failure,
            "a connection ended");
        if failure.reason.is_lasting() {
            let failure = failure.clone();
            let connected = !self.links.is_empty();
            self.tell(Event::Failed { address: link.address, failure, connected }).await;
        }
        let limit = self.longest_wait(&failure);
        let lane = if link.detoured { &mut self.detour } else { &mut self.direct };
        match link.since.elapsed() < SHORT_LIFE {
            true => lane.put_off(limit),
            false => lane.clear(),
        }
        self.trim();
        self.publish().await;
    }

    /// When to look again even if nothing happens.
    fn deadline(&self) -> Instant {
        let idle = (!self.idle_told).then(|| self.idle_at());
        let detour = self.detour_due().map(|(_, at)| at);
        let far = Instant::now() + Duration::from_secs(3600);
        let all = [idle, self.links.next_close(), self.direct_due(), detour];
        all.into_iter().flatten().min().unwrap_or(far)
    }

    /// Closes what is of no more use, and tells the router once this peer is idle.
    async fn meet_deadline(&mut self) {
        let now = Instant::now();
        self.links.close_surplus(now);
        let traffic = self.meter.read();
        let count = traffic.sent_messages() + traffic.received_messages();
        if count != self.counted {
            self.counted = count;
            self.active = now;
        } else if !self.idle_told && self.idle_at() <= now {
            self.meter.not_sent(self.queue.drain(..).count());
            self.close_all("closed: idle");
            self.tell_idle().await;
        }
    }

    fn idle_at(&self) -> Instant {
        let idle = self.context.timing.idle;
        let patience = if self.links.is_empty() { idle.min(GIVE_UP) } else { idle };
        (self.active + patience).max(self.wanted_until)
    }

    fn close_all(&self, reason: &str) {
        self.links.iter().for_each(|link| link.close(reason));
    }

    async fn publish(&mut self) {
        let Target::Node(node) = self.target else { return };
        let (links, addresses) = (self.links.by_preference(), self.addresses.clone());
        self.tell(Event::Linked { node, links, addresses }).await;
    }

    async fn tell_idle(&mut self) {
        self.idle_told = true;
        self.tell(Event::Idle(self.target)).await;
    }

    async fn tell(&mut self, event: Event) {
        // The router ends only when the carrier does.
        let _ = self.context.events.send(event).await;
    }

    /// Gives back what came in between the decision to end and the end.
    async fn hand_back(mut self) {
        let waiting: Vec<_> = self.queue.drain(..).collect();
        self.tell(Event::Unsent(self.target, waiting)).await;
        self.close_all("closed: idle");
    }

    /// Sends what waits, if there is a connection for it, and closes.
    async fn stop(mut self) {
        self.direct.give_up();
        self.detour.give_up();
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
        if let Some(link) = self.links.preferred().cloned() {
            link.flush(LAST_WORDS).await;
        }
        self.close_all("closed: the agent stops");
    }
}

const WAITING_UNCONNECTED: usize = 16;
const WAITING_CONNECTED: usize = 256;
const WAITING_BYTES: usize = 8 << 20;
const WRITERS_AT_ONCE: usize = 16;
/// How many addresses of one peer are tried in turn.
const ADDRESSES: usize = 3;
/// Direct attempts in a row without an answer after which the detour is taken.
const UNREACHED: u32 = 2;
/// How long a connection is wanted after somebody has asked for it or it was lost.
const WANTED: Duration = Duration::from_secs(3);
/// A connection that ends sooner counts as an attempt that failed.
const SHORT_LIFE: Duration = Duration::from_secs(1);
const GIVE_UP: Duration = Duration::from_secs(10);
const PROBE: Duration = Duration::from_secs(1);
const LAST_WORDS: Duration = Duration::from_millis(250);
