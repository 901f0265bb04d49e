use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use time::OffsetDateTime;
use tokio::{
    sync::{mpsc, watch},
    time::{self as clock, Instant, MissedTickBehavior},
};
use weft_model::NodeId;

use super::{
    acceptor::Context,
    detour::node_behind,
    directory::{Directory, bound},
    link::Link,
    peer::{Command, Peer, Target},
    refusal::{Failure, FailureReason, Refusal},
    traffic::Meter,
};

/// What peers' tasks and the acceptor tell the router.
#[derive(Debug)]
pub(super) enum Event {
    /// A connection with a member that was not its peer's task's own doing, and messages that
    /// waited for it.
    Met {
        link: Link,
        waiting: Vec<Bytes>,
    },
    /// The connections that a peer's task has from now on, the one that it uses first.
    Linked {
        node: NodeId,
        links: Vec<Link>,
        addresses: Vec<SocketAddr>,
    },
    Failed {
        address: SocketAddr,
        failure: Failure,
        /// Whether there is another connection with the peer.
        connected: bool,
    },
    Idle(Target),
    /// Messages that a peer's task could not send before its end.
    Unsent(Target, Vec<Bytes>),
}

/// The node that is meant, if it is known, and where it was last known to be.
pub(super) type Receiver = (Option<NodeId>, SocketAddr);

/// The state of a carrier at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    pub(super) peers: BTreeMap<NodeId, Known>,
    pub(super) failures: BTreeMap<FailureReason, u64>,
    pub(super) last: BTreeMap<SocketAddr, LastFailure>,
}

#[derive(Clone, Debug)]
pub(super) struct Known {
    /// The one in use first.
    pub(super) links: Vec<Link>,
    /// Where the peer is dialled.
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) meter: Arc<Meter>,
}

impl View {
    pub(super) fn links(&self, node: NodeId) -> &[Link] {
        self.peers.get(&node).map_or(&[], |known| &known.links)
    }
}

/// What last went wrong with an address.
#[derive(Clone, Debug)]
pub struct LastFailure {
    pub failure: Failure,
    pub at: OffsetDateTime,
    /// How often the same has happened since something else did.
    pub count: u64,
}

/// Finds the task for each peer, starts it when needed, and shows what all of them do.
pub(super) struct Router {
    pub(super) context: Context,
    pub(super) sends: mpsc::Receiver<(Receiver, Bytes)>,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) revoked: watch::Receiver<BTreeSet<NodeId>>,
    pub(super) introductions: watch::Receiver<BTreeMap<NodeId, SocketAddr>>,
    pub(super) to_keep: watch::Receiver<BTreeSet<NodeId>>,
    pub(super) published: watch::Sender<Arc<View>>,
    pub(super) peers: BTreeMap<Target, Running>,
    pub(super) directory: Directory,
    pub(super) logged: BTreeMap<SocketAddr, (FailureReason, Instant)>,
}

/// The task of one peer.
#[derive(Debug)]
pub(super) struct Running {
    commands: mpsc::Sender<Command>,
    meter: Arc<Meter>,
}

enum Wake {
    Event(Event),
    Send(Receiver, Bytes),
    Introductions,
    Keep,
    Revoked,
    Stop,
}

impl Router {
    pub(super) async fn run(mut self) {
        let mut look = clock::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wake = tokio::select! {
                biased;
                () = self.context.stop.cancelled() => Wake::Stop,
                Some(event) = self.events.recv() => Wake::Event(event),
                Ok(()) = self.revoked.changed() => Wake::Revoked,
                Ok(()) = self.introductions.changed() => Wake::Introductions,
                Ok(()) = self.to_keep.changed() => Wake::Keep,
                _ = look.tick() => Wake::Keep,
                Some((to, message)) = self.sends.recv() => Wake::Send(to, message),
            };
            match wake {
                Wake::Event(event) => self.take(event),
                Wake::Send(to, message) => self.send(to, message),
                Wake::Introductions => self.learn(),
                Wake::Keep => self.look_after(),
                Wake::Revoked => self.close_where(|link, revoked| {
                    let node = link.peer.node;
                    revoked.contains(&node).then_some(Refusal::Revoked(node))
                }),
                Wake::Stop => return self.stop(),
            }
        }
    }

    /// Hands out what was to be sent. The peers' tasks stop when they have read all of it.
    fn stop(mut self) {
        while let Ok((to, message)) = self.sends.try_recv() {
            self.send(to, message);
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Met { link, waiting } => {
                let node = link.peer.node;
                self.directory.meet(link.address, node, Instant::now());
                self.command(Target::Node(node), Command::Adopt(link));
                for message in waiting {
                    self.command(Target::Node(node), Command::Send(message));
                }
            }
            Event::Linked { node, links, addresses } => {
                // A node that was revoked while its handshake was under way.
                if self.revoked.borrow().contains(&node) {
                    let refusal = Refusal::Revoked(node).to_string();
                    links.iter().for_each(|link| link.close(&refusal));
                }
                self.edit(|view| {
                    if links.iter().any(|link| !link.detoured) {
                        addresses.iter().for_each(|address| drop(view.last.remove(address)));
                    }
                    if let Some(known) = view.peers.get_mut(&node) {
                        known.links = links;
                        known.addresses = addresses;
                    }
                });
                self.end_search(node);
            }
            Event::Failed { address, failure, connected } => {
                self.log(address, &failure, connected);
                self.note(address, failure);
            }
            Event::Idle(target) => {
                // Without its sender the task ends, once it has read what was sent before.
                self.peers.remove(&target);
                if let Target::Node(node) = target {
                    self.edit(|view| drop(view.peers.remove(&node)));
                }
            }
            Event::Unsent(target, messages) => {
                for message in messages {
                    match target {
                        Target::Node(_) => self.command(target, Command::Send(message)),
                        Target::Stranger(address) => self.send((None, address), message),
                    }
                }
            }
        }
    }

    /// Sends `message` to a node, or to whoever is known to be at the address, by whatever
    /// connection there is.
    fn send(&mut self, (node, address): Receiver, message: Bytes) {
        let connected = |node| !self.published.borrow().links(node).is_empty();
        let Some(node) = node.or_else(|| self.directory.node_at(address, connected)) else {
            return self.command(Target::Stranger(address), Command::Send(message));
        };
        let is_lost = !connected(node) && self.directory.claim(node).is_none();
        if is_lost && node_behind(address).is_none() {
            self.command(Target::Node(node), Command::Introduce(address));
        }
        self.command(Target::Node(node), Command::Send(message));
    }

    fn command(&mut self, target: Target, command: Command) {
        if self.peers.get(&target).is_none_or(|running| running.commands.is_closed()) {
            let running = self.start(target);
            self.peers.insert(target, running);
        }
        let running = &self.peers[&target];
        if let Err(refused) = running.commands.try_send(command)
            && let Command::Send(_) = refused.into_inner()
        {
            running.meter.not_sent(1);
        }
    }

    fn start(&self, target: Target) -> Running {
        let (commands, to_obey) = mpsc::channel(COMMANDS);
        let meter = Arc::new(Meter::new(self.context.totals.clone()));
        let mut peer = Peer::new(target, self.context.clone(), meter.clone());
        if let Target::Node(node) = target {
            peer.addresses.extend(self.directory.claim(node));
            let known = Known { links: vec![], addresses: vec![], meter: meter.clone() };
            self.edit(|view| drop(view.peers.insert(node, known)));
        }
        self.context.tracker.spawn(peer.run(to_obey));
        Running { commands, meter }
    }

    /// Takes in who says to be where.
    fn learn(&mut self) {
        let introduced = self.introductions.borrow_and_update().clone();
        for (node, address) in self.directory.introduce(introduced) {
            if self.peers.contains_key(&Target::Node(node)) {
                self.command(Target::Node(node), Command::Introduce(address));
            }
            self.end_search(node);
        }
        self.look_after();
    }

    /// Ends the attempts to find out who is where `node` says that it is, if there is a connection
    /// with it: what waits for them goes over that one.
    fn end_search(&mut self, node: NodeId) {
        let connected = !self.published.borrow().links(node).is_empty();
        if let Some(address) = self.directory.claim(node).filter(|_| connected) {
            // Without its sender the task gives back what waits.
            self.peers.remove(&Target::Stranger(address));
        }
    }

    /// Closes what has expired, and keeps up what is to be kept.
    fn look_after(&mut self) {
        let (own, now) = (self.context.own, self.context.clock.now());
        self.close_where(|link, _| link.expired(own, now));
        let kept = self.to_keep.borrow_and_update().clone();
        let revoked = self.revoked.borrow().clone();
        for node in kept.into_iter().filter(|node| *node != own && !revoked.contains(node)) {
            let target = Target::Node(node);
            if self.directory.claim(node).is_some() || self.peers.contains_key(&target) {
                self.command(target, Command::Want);
            }
        }
    }

    /// Closes the connections against which there is an objection.
    fn close_where(&mut self, object: impl Fn(&Link, &BTreeSet<NodeId>) -> Option<Refusal>) {
        let revoked = self.revoked.borrow_and_update().clone();
        let view = self.published.borrow().clone();
        for link in view.peers.values().flat_map(|known| &known.links) {
            if link.connection.close_reason().is_none()
                && let Some(refusal) = object(link, &revoked)
            {
                link.close(&refusal.to_string());
                let failure = Failure::from(&refusal);
                self.log(link.address, &failure, false);
                self.note(link.address, failure);
            }
        }
    }

    fn log(&mut self, address: SocketAddr, failure: &Failure, connected: bool) {
        let now = Instant::now();
        let lately = self.logged.get(&address).is_some_and(|&(reason, at)| {
            reason == failure.reason && now.duration_since(at) < LOG_AGAIN
        });
        if lately || connected {
            tracing::debug!(%address, reason = %failure, "a connection failed");
        } else {
            tracing::warn!(%address, reason = %failure, "a connection failed");
            bound(&mut self.logged, |(_, at)| *at);
            self.logged.insert(address, (failure.reason, now));
        }
    }

    fn note(&self, address: SocketAddr, failure: Failure) {
        let at = self.context.clock.now();
        self.edit(|view| {
            *view.failures.entry(failure.reason).or_default() += 1;
            bound(&mut view.last, |last| last.at);
            let before = view.last.get(&address).filter(|last| last.failure == failure);
            let count = before.map_or(0, |last| last.count) + 1;
            view.last.insert(address, LastFailure { failure, at, count });
        });
    }

    fn edit(&self, edit: impl FnOnce(&mut View)) {
        self.published.send_modify(|view| edit(Arc::make_mut(view)));
    }
}

const COMMANDS: usize = 256;
const LOG_AGAIN: Duration = Duration::from_secs(60);
/// How often certificates are looked at, and kept peers.
const LOOK: Duration = Duration::from_secs(1);
