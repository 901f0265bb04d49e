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
    time::Instant,
};
use weft_model::NodeId;

use super::{
    acceptor::Context,
    link::Link,
    peer::{Command, Peer},
    refusal::{Failure, FailureReason, Refusal},
    traffic::Meter,
};

/// What peers' tasks and the acceptor tell the router.
#[derive(Debug)]
pub(super) enum Event {
    Arrived(SocketAddr, Link),
    /// The connection that a peer's task uses from now on.
    Linked {
        address: SocketAddr,
        link: Option<Link>,
    },
    Failed {
        address: SocketAddr,
        failure: Failure,
    },
    Idle(SocketAddr),
    /// A message that a peer's task could not send before its end.
    Send(SocketAddr, Bytes),
}

/// The state of a carrier at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    pub(super) peers: BTreeMap<SocketAddr, Known>,
    pub(super) failures: BTreeMap<FailureReason, u64>,
    pub(super) last: BTreeMap<SocketAddr, LastFailure>,
}

#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) link: Option<Link>,
    pub(super) meter: Arc<Meter>,
}

/// What last went wrong with an address.
#[derive(Clone, Debug)]
pub struct LastFailure {
    pub failure: Failure,
    pub at: OffsetDateTime,
    /// How often the same has happened since something else did.
    pub count: u64,
}

/// Finds the task for each address, starts it when needed, and shows what all of them do.
pub(super) struct Router {
    pub(super) context: Context,
    pub(super) sends: mpsc::Receiver<(SocketAddr, Bytes)>,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) revoked: watch::Receiver<BTreeSet<NodeId>>,
    pub(super) published: watch::Sender<Arc<View>>,
    pub(super) peers: BTreeMap<SocketAddr, mpsc::Sender<Command>>,
    pub(super) logged: BTreeMap<SocketAddr, (FailureReason, Instant)>,
}

enum Wake {
    Event(Event),
    Send(SocketAddr, Bytes),
    Revoked,
    Stop,
}

impl Router {
    pub(super) async fn run(mut self) {
        loop {
            let wake = tokio::select! {
                biased;
                () = self.context.stop.cancelled() => Wake::Stop,
                Some(event) = self.events.recv() => Wake::Event(event),
                Ok(()) = self.revoked.changed() => Wake::Revoked,
                Some((to, message)) = self.sends.recv() => Wake::Send(to, message),
            };
            match wake {
                Wake::Event(event) => self.take(event),
                Wake::Send(to, message) => self.command(to, Command::Send(message)),
                Wake::Revoked => self.close_revoked(),
                Wake::Stop => return self.stop(),
            }
        }
    }

    /// Hands out what was to be sent. The peers' tasks stop when they have read all of it.
    fn stop(mut self) {
        while let Ok((to, message)) = self.sends.try_recv() {
            self.command(to, Command::Send(message));
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Arrived(address, link) => self.command(address, Command::Adopt(link)),
            Event::Send(address, message) => self.command(address, Command::Send(message)),
            Event::Linked { address, link } => {
                // A node that was revoked while its handshake was under way.
                if let Some(link) = &link
                    && self.revoked.borrow().contains(&link.peer.node)
                {
                    link.close(&Refusal::Revoked(link.peer.node).to_string());
                }
                self.edit(|view| {
                    if link.is_some() {
                        view.last.remove(&address);
                    }
                    if let Some(known) = view.peers.get_mut(&address) {
                        known.link = link;
                    }
                });
            }
            Event::Failed { address, failure } => self.note(address, failure),
            Event::Idle(address) => {
                // Without its sender the task ends, once it has read what was sent before.
                self.peers.remove(&address);
                self.edit(|view| {
                    view.peers.remove(&address);
                });
            }
        }
    }

    fn command(&mut self, address: SocketAddr, command: Command) {
        let sender = match self.peers.get(&address) {
            Some(sender) if !sender.is_closed() => sender.clone(),
            Some(_) | None => self.start(address),
        };
        if sender.try_send(command).is_err()
            && let Some(known) = self.published.borrow().peers.get(&address)
        {
            known.meter.not_sent(1);
        }
    }

    fn start(&mut self, address: SocketAddr) -> mpsc::Sender<Command> {
        let (sender, commands) = mpsc::channel(COMMANDS);
        let meter = Arc::new(Meter::new(self.context.totals.clone()));
        let peer = Peer::new(address, self.context.clone(), meter.clone());
        self.context.tracker.spawn(peer.run(commands));
        self.peers.insert(address, sender.clone());
        self.edit(|view| {
            view.peers.insert(address, Known { link: None, meter });
        });
        sender
    }

    fn note(&mut self, address: SocketAddr, failure: Failure) {
        let now = Instant::now();
        let quiet = self.logged.get(&address).is_some_and(|&(reason, at)| {
            reason == failure.reason && now.duration_since(at) < LOG_AGAIN
        });
        if quiet {
            tracing::debug!(%address, reason = %failure, "a connection failed");
        } else {
            tracing::warn!(%address, reason = %failure, "a connection failed");
            bound(&mut self.logged, |(_, at)| *at);
            self.logged.insert(address, (failure.reason, now));
        }
        let at = self.context.clock.now();
        self.edit(|view| {
            *view.failures.entry(failure.reason).or_default() += 1;
            bound(&mut view.last, |last| last.at);
            let before = view.last.get(&address).filter(|last| last.failure == failure);
            let count = before.map_or(0, |last| last.count) + 1;
            view.last.insert(address, LastFailure { failure, at, count });
        });
    }

    fn close_revoked(&mut self) {
        let revoked = self.revoked.borrow_and_update().clone();
        let view = self.published.borrow().clone();
        for link in view.peers.values().filter_map(|known| known.link.as_ref()) {
            if revoked.contains(&link.peer.node) {
                link.close(&Refusal::Revoked(link.peer.node).to_string());
            }
        }
    }

    fn edit(&self, edit: impl FnOnce(&mut View)) {
        self.published.send_modify(|view| edit(Arc::make_mut(view)));
    }
}

/// Makes room for one more in place of the oldest: strangers must not be able to fill the memory.
fn bound<V, T: Ord>(map: &mut BTreeMap<SocketAddr, V>, age: impl Fn(&V) -> T) {
    if map.len() < REMEMBERED {
        return;
    }
    let oldest = map.iter().min_by_key(|(_, value)| age(value)).map(|(address, _)| *address);
    oldest.and_then(|address| map.remove(&address));
}

const COMMANDS: usize = 256;
const REMEMBERED: usize = 1024;
const LOG_AGAIN: Duration = Duration::from_secs(60);
