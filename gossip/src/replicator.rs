use std::{
    collections::{BTreeMap, BTreeSet},
    future,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{self, Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use weft_model::{NetworkId, NodeId};

use crate::{
    Carrier, ClusterView, ForgetError, GossipConfig, Received, Record, Timing,
    command::Command,
    counters::{Tally, count},
    detector::{Detector, DetectorTiming},
    farewell::Farewell,
    frame::{self, Kind},
    membership::{Membership, MembershipConfig, Observation, Write},
    message::{Message, MessageError},
    outbox::Outbox,
    own::{Outcome, OwnRecords, Written},
    push::Push,
    replica::Replica,
    table::Key,
    timers::Timers,
};

/// The one task that owns the replica, the verdicts and the view.
pub(crate) struct Replicator<C> {
    node: NodeId,
    timing: Timing,
    outbox: Outbox,
    membership_config: MembershipConfig,
    carrier: Arc<C>,
    commands: mpsc::Receiver<Command>,
    own: OwnRecords,
    replica: Replica,
    detector: Detector,
    addresses: BTreeMap<NodeId, SocketAddr>,
    /// Absent between two runs of chitchat.
    membership: Option<Membership>,
    /// chitchat has worked on a message.
    changed: Arc<Notify>,
    timers: Timers,
    farewell: Option<Farewell>,
    /// Members whose part of the view is to be made anew.
    dirty: BTreeSet<NodeId>,
    view: watch::Sender<Arc<ClusterView>>,
    tally: Arc<Tally>,
    rng: StdRng,
}

enum Wake {
    Commands,
    Received(Received),
    Changed,
    Timer,
    Tick,
    Ended(String),
}

type Ended = Pin<Box<dyn Future<Output = String> + Send>>;

impl<C: Carrier> Replicator<C> {
    pub(crate) fn new(
        config: GossipConfig,
        carrier: C,
        commands: mpsc::Receiver<Command>,
        tally: Arc<Tally>,
    ) -> (Self, watch::Receiver<Arc<ClusterView>>) {
        let GossipConfig { node, cluster, generation, seeds, records, timing, push_slice, seed } =
            config;
        let now = Instant::now();
        let detector_timing = DetectorTiming {
            tick: timing.gossip_interval / TICKS_PER_INTERVAL,
            interval: timing.gossip_interval,
            suspect_after: timing.suspect_after,
        };
        let (view, watcher) = watch::channel(Arc::default());
        let mut replicator = Self {
            node,
            timing,
            outbox: Outbox::new(push_slice),
            membership_config: MembershipConfig { node, cluster, seeds, timing },
            carrier: Arc::new(carrier),
            commands,
            own: OwnRecords::new(generation),
            replica: Replica::default(),
            detector: Detector::new(detector_timing, now),
            addresses: BTreeMap::new(),
            membership: None,
            changed: Arc::new(Notify::new()),
            timers: Timers::new(now),
            farewell: None,
            dirty: BTreeSet::from([node]),
            view,
            tally,
            rng: StdRng::seed_from_u64(seed),
        };
        let records = records.into_iter().map(|(key, record)| (key, Some(record))).collect();
        let Outcome { written, refused } = replicator.own.write(records);
        for refusal in refused {
            tracing::error!(error = %refusal, "one of the first records is not published");
        }
        replicator.keep(&written);
        replicator.refresh_view();
        (replicator, watcher)
    }

    /// Runs until `cancel`.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let carrier = Arc::clone(&self.carrier);
        let changed = Arc::clone(&self.changed);
        let mut tick = time::interval(self.timing.gossip_interval / TICKS_PER_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ended: Ended = Box::pin(future::pending());
        let mut commands = Vec::new();
        let mut handles_left = true;
        loop {
            let timer = self.next_timer();
            let wake = tokio::select! {
                () = cancel.cancelled() => break,
                count = self.commands.recv_many(&mut commands, COMMAND_BATCH), if handles_left => {
                    handles_left = count > 0;
                    Wake::Commands
                }
                received = carrier.recv() => Wake::Received(received),
                () = changed.notified() => Wake::Changed,
                () = time::sleep_until(timer) => Wake::Timer,
                _ = tick.tick() => Wake::Tick,
                reason = &mut ended => Wake::Ended(reason),
            };
            let now = Instant::now();
            match wake {
                Wake::Commands => self.obey(&mut commands, now).await,
                Wake::Received(received) => self.receive(received, now),
                Wake::Changed => self.timers.want_scan(now),
                Wake::Timer => self.on_timer(now, &mut ended).await,
                Wake::Tick => self.tick(now),
                Wake::Ended(reason) => {
                    tracing::error!(%reason, "gossip task ended by itself, starting it again");
                    count(&self.tally.restarts);
                    ended = Box::pin(future::pending());
                    self.membership = None;
                    self.timers.restart(now);
                }
            }
            self.refresh_view();
        }
        if let Some(membership) = self.membership.take() {
            let late = time::timeout(STOP_TIMEOUT, membership.stop()).await.is_err();
            if late {
                tracing::warn!("gossip task did not stop in time");
            }
        }
    }

    async fn obey(&mut self, commands: &mut Vec<Command>, now: Instant) {
        let mut written = Vec::new();
        let mut replies = Vec::new();
        for command in commands.drain(..) {
            match command {
                Command::Publish { records, reply } => {
                    let outcome = self.own.write(records);
                    written.extend(outcome.written);
                    replies.push((reply, outcome.refused));
                }
                Command::Leave { reply } => self.leave(&mut written, reply, now),
                Command::Forget { node, reply } => {
                    // A caller that has gone away needs no answer; so below.
                    let _ = reply.send(self.forget(node));
                }
            }
        }
        if !written.is_empty() {
            self.keep(&written);
            self.push(&written, now);
            if let Some(membership) = &mut self.membership {
                let writes: Vec<_> = written.into_iter().map(Write::from).collect();
                membership.write(&writes).await;
            }
        }
        self.refresh_view();
        for (reply, refused) in replies {
            let _ = reply.send(refused);
        }
    }

    fn leave(&mut self, written: &mut Vec<Written>, reply: oneshot::Sender<usize>, now: Instant) {
        let Some(node) = self.own.farewell() else {
            tracing::warn!(
                "cannot announce that this node leaves: it has published no node record"
            );
            let _ = reply.send(self.detector.alive().count());
            return;
        };
        let farewell = self.own.write(vec![(Key::Node, Some(Record::Node(node)))]);
        written.extend(farewell.written);
        let waiting = self.detector.alive().collect();
        self.farewell = Some(Farewell::new(reply, waiting, now, self.timing.leave_timeout));
    }

    fn forget(&mut self, node: NodeId) -> Result<(), ForgetError> {
        let left = self.view.borrow().members.get(&node).is_some_and(|member| member.has_left());
        if node == self.node || (self.detector.is_alive(node) && !left) {
            return Err(ForgetError::Alive(node));
        }
        tracing::info!(%node, "forgetting a member");
        self.replica.forget(node);
        self.detector.forget(node);
        self.addresses.remove(&node);
        self.dirty.insert(node);
        Ok(())
    }

    fn receive(&mut self, received: Received, now: Instant) {
        let Received { from, address, message } = received;
        let read =
            if from == self.node { Err(MessageError::Echo) } else { Message::read(&message) };
        let read = match read {
            Ok(read) => read,
            Err(error) => {
                count(&self.tally.rejected);
                tracing::debug!(%from, %address, %error, "message is not readable");
                return;
            }
        };
        self.tally.received(read.kind(), message.len());
        self.addresses.insert(from, address);
        self.hear(from, now);
        match read {
            Message::Gossip(packed) => {
                if let Some(membership) = &self.membership {
                    membership.deliver(address, packed);
                }
            }
            Message::Push(push) => {
                for (key, value) in &push.records {
                    if self.replica.apply(from, key, value) {
                        self.dirty.insert(from);
                    }
                }
                if push.receipt != 0 {
                    self.send((from, address), Kind::Receipt, &push.receipt.to_be_bytes());
                }
            }
            Message::Receipt(number) => {
                if let Some(farewell) = &mut self.farewell {
                    farewell.confirm(from, number);
                }
                self.end_farewell(now);
            }
        }
    }

    /// Notes a sign of life. Who was not alive before gets all of our records at once.
    fn hear(&mut self, node: NodeId, now: Instant) {
        if !self.detector.heard(node, now) {
            return;
        }
        self.dirty.insert(node);
        if self.replica.recall(node) {
            if let Some(membership) = &mut self.membership {
                membership.reread(node);
            }
            self.timers.want_scan(now);
        }
        self.push_all(node);
    }

    /// Sends all of our records to `node`.
    fn push_all(&mut self, node: NodeId) {
        // In a large cluster all would do so at the same time, so only those do that are needed.
        let few = self.detector.alive().count() <= self.outbox.slice();
        let near = few || self.outbox.slice() > 0 && self.shares_network(node);
        if let Some(&address) = self.addresses.get(&node).filter(|_| near) {
            count(&self.tally.full_pushes);
            let records = self.own.values().map(|(key, value)| (key.to_string(), value.clone()));
            for push in Push::split(records) {
                self.send((node, address), Kind::Push, &push.encode());
            }
        }
    }

    async fn scan(&mut self, now: Instant) {
        self.timers.scan = None;
        self.timers.last_scan = now;
        let Some(membership) = &mut self.membership else { return };
        let scan = membership.scan().await;
        for observation in scan.nodes {
            self.observe(observation, now);
        }
        let Some(number) = scan.conflict else { return };
        self.own.observe(number);
        // Once is enough until the next start ends the conflict.
        if self.timers.start.is_none() {
            tracing::error!(
                number,
                "records of an earlier life of this node are as new as its own: was its generation \
                 file lost or restored, or does another agent run with its identity? Going on \
                 with higher numbers"
            );
            count(&self.tally.conflicts);
            self.timers.restart(now);
        }
    }

    fn observe(&mut self, observation: Observation, now: Instant) {
        let Observation { node, address, heard, changes } = observation;
        if heard {
            self.addresses.insert(node, address);
            self.hear(node, now);
        } else if self.replica.is_forgotten(node) {
            return;
        } else if self.detector.mentioned(node, now) {
            self.addresses.entry(node).or_insert(address);
            self.dirty.insert(node);
            // It need not find us by chance. A large cluster is not met all at once.
            if self.detector.known() <= self.outbox.slice() {
                self.push_all(node);
            }
        }
        let Some(changes) = changes else { return };
        let mut changed = false;
        for (key, value) in &changes.values {
            changed |= self.replica.apply(node, key, value);
        }
        changed |= self.replica.retain(node, &changes.present, changes.complete_to);
        if changed {
            self.dirty.insert(node);
        }
    }

    fn tick(&mut self, now: Instant) {
        let verdict = self.detector.tick(now);
        if verdict.froze {
            tracing::warn!("many peers silent or this agent late: withholding verdicts");
            count(&self.tally.frozen);
        }
        for node in verdict.suspects {
            tracing::info!(%node, "member is suspect");
            count(&self.tally.suspicions);
            self.dirty.insert(node);
        }
        if now >= self.timers.round {
            self.timers.round = now + self.timing.gossip_interval;
            count(&self.tally.rounds);
            self.seek_lost_members(now);
        }
        if self.farewell.as_ref().is_some_and(|farewell| farewell.is_due(now)) {
            self.repeat_farewell(now);
        }
        self.timers.want_scan(now);
    }

    /// Talks to one suspect a round, even to those that chitchat has dropped: so a partition that
    /// outlasts the grace time heals without seeds.
    fn seek_lost_members(&mut self, now: Instant) {
        let suspects: Vec<_> = self.detector.suspects().collect();
        for &node in &suspects {
            let silence = self.detector.silence(node, now).unwrap_or_default();
            if silence >= self.timing.forget_after {
                let _ = self.forget(node);
            }
        }
        let Some(&node) = suspects.choose(&mut self.rng) else { return };
        let Some(&address) = self.addresses.get(&node) else { return };
        let old = self.detector.silence(node, now).is_some_and(|s| s > self.timing.grace);
        // All members together try a lost one some times a round.
        let share = TRIES_PER_ROUND / (1.0 + self.detector.alive().count() as f64);
        let share = if old { share / 20.0 } else { share };
        let chosen = self.rng.random_bool(share.min(1.0));
        if let Some(membership) = self.membership.as_ref().filter(|_| chosen) {
            membership.kick(address);
        }
    }

    async fn on_timer(&mut self, now: Instant, ended: &mut Ended) {
        if self.timers.start.is_some_and(|due| due <= now) {
            self.timers.start = None;
            self.start_membership(now, ended).await;
        }
        if self.timers.scan.is_some_and(|due| due <= now) {
            self.scan(now).await;
        }
        if self.outbox.due().is_some_and(|due| due <= now) {
            for (message, slice) in self.outbox.take(now) {
                self.send_to(&slice, &message);
            }
        }
    }

    async fn start_membership(&mut self, now: Instant, ended: &mut Ended) {
        *ended = Box::pin(future::pending());
        if let Some(old) = self.membership.take() {
            old.stop().await;
        }
        let incarnation = self.own.reincarnate();
        let values: Vec<_> =
            self.own.values().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        for (key, value) in &values {
            self.replica.apply(self.node, key, value);
        }
        let started = Membership::start(
            &self.membership_config,
            incarnation,
            values,
            &self.carrier,
            &self.changed,
            &self.tally,
        );
        match started.await {
            Ok(membership) => {
                *ended = membership.ended();
                // Each exchange makes a connection: after a restart peers still use their old ones.
                let seeds = &self.membership_config.seeds;
                for &seed in seeds.choose_multiple(&mut self.rng, SEEDS_AT_START) {
                    membership.kick(seed);
                }
                self.membership = Some(membership);
                self.timers.has_started(now);
            }
            Err(error) => {
                tracing::error!(%error, "gossip does not start, trying again");
                self.timers.restart(now);
            }
        }
    }

    /// Puts writes of our own into our replica and view.
    fn keep(&mut self, written: &[Written]) {
        for Written { key, value, .. } in written {
            self.replica.apply(self.node, &key.to_string(), value);
        }
        self.dirty.insert(self.node);
    }

    /// Sends a change straight to the members, those in the same networks first.
    fn push(&mut self, written: &[Written], now: Instant) {
        count(&self.tally.pushes);
        let networks: BTreeSet<_> = written.iter().filter_map(|w| w.key.network()).collect();
        let mut receivers: Vec<_> = self.detector.alive().collect();
        if receivers.len() > self.outbox.slice() {
            receivers.sort_by_cached_key(|&node| {
                (!self.is_in_any(node, &networks), self.rng.random::<u32>())
            });
        }
        let records = written.iter().map(|w| (w.key.to_string(), Arc::clone(&w.value)));
        let mut pushes = Push::split(records);
        if let Some(farewell) = self.farewell.as_mut().filter(|farewell| farewell.is_new()) {
            let number = farewell.number();
            pushes.iter_mut().for_each(|push| push.receipt = number);
            farewell.set_pushes(pushes.clone());
        }
        for push in pushes {
            let message = frame::seal(Kind::Push, &push.encode());
            let first = self.outbox.post(message.clone(), receivers.clone(), now);
            self.send_to(&first, &message);
        }
    }

    fn repeat_farewell(&mut self, now: Instant) {
        let Some(farewell) = &mut self.farewell else { return };
        let (nodes, pushes) = farewell.repeat(now);
        for push in &pushes {
            self.send_to(&nodes, &frame::seal(Kind::Push, &push.encode()));
        }
        self.end_farewell(now);
    }

    fn end_farewell(&mut self, now: Instant) {
        if self.farewell.as_ref().is_some_and(|farewell| farewell.is_over(now)) {
            self.farewell.take().into_iter().for_each(Farewell::end);
        }
    }

    fn send_to(&self, nodes: &[NodeId], push: &Bytes) {
        for &node in nodes {
            let Some(&address) = self.addresses.get(&node) else { continue };
            self.tally.sent(Kind::Push, push.len());
            self.carrier.send_to(node, address, push.clone());
        }
    }

    fn send(&self, (node, address): (NodeId, SocketAddr), kind: Kind, body: &[u8]) {
        let message = frame::seal(kind, body);
        self.tally.sent(kind, message.len());
        self.carrier.send_to(node, address, message);
    }

    fn is_in_any(&self, node: NodeId, networks: &BTreeSet<NetworkId>) -> bool {
        let view = self.view.borrow();
        view.members
            .get(&node)
            .is_some_and(|member| networks.iter().any(|&network| member.is_in(network)))
    }

    fn shares_network(&self, node: NodeId) -> bool {
        let view = self.view.borrow();
        let own = view.members.get(&self.node);
        let networks = own
            .into_iter()
            .flat_map(|own| own.networks.keys().chain(own.endpoints.keys()))
            .copied()
            .collect();
        drop(view);
        self.is_in_any(node, &networks)
    }

    fn refresh_view(&mut self) {
        if self.dirty.is_empty() {
            return;
        }
        let dirty = std::mem::take(&mut self.dirty);
        let heard = |node| node == self.node || self.detector.is_alive(node);
        let refreshed = self.view.borrow().refreshed(dirty, &self.replica, heard);
        if let Some(view) = refreshed {
            self.view.send_replace(Arc::new(view));
        }
    }

    fn next_timer(&self) -> Instant {
        let Timers { scan, start, .. } = self.timers;
        let idle = self.timers.round + self.timing.gossip_interval;
        [scan, start, self.outbox.due()].into_iter().flatten().min().unwrap_or(idle)
    }
}

impl From<Written> for Write {
    fn from(Written { key, value, withdrawn }: Written) -> Self {
        if withdrawn {
            Self::Drop(key.to_string(), value.to_string())
        } else {
            Self::Set(key.to_string(), value)
        }
    }
}

const TICKS_PER_INTERVAL: u32 = 5;
const COMMAND_BATCH: usize = 64;
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
const TRIES_PER_ROUND: f64 = 4.0;
const SEEDS_AT_START: usize = 16;
