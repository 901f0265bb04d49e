use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{broadcast, mpsc, watch},
    time::{self, Instant},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_dns::Directory;
use weft_gossip::{ClusterView, Gossip, Key, PublishError, Record};
use weft_ipam::{Ipam, Timing};
use weft_model::{EndpointId, InterfaceName, NetworkId, Node};
use weft_vxlan::{DataPlane, Desired, Gone, Parents, Status};

use super::{
    Command, Snapshot, Snapshots, Verdicts,
    balance::Balancing,
    book::{Book, BookError, BookFile},
    opening::PortChange,
    ports::{Finished, KernelWork, Release},
    waiting::{Answer, Waiting},
};
use crate::{
    chain::Chain,
    cluster::Cluster,
    encryption::Encryption,
    listeners::{Listeners, sandboxes::SandboxListeners},
    projection::{
        Kernel, NamesProjection, OwnRecords, PlaneContext, own_records, plane, with_private,
    },
    remembered::Remembered,
};

/// How often the keeper looks again at what no event tells: rests that ended, work to retry.
const TICK: Duration = Duration::from_millis(500);

/// What the keeper is connected to.
pub struct Links {
    pub gossip: Gossip,
    pub plane: DataPlane,
    pub listeners: Listeners,
    /// What the kernel shall be; nothing until the keeper has understood what there is.
    pub desired: watch::Sender<Option<Arc<Desired>>>,
    pub directory: watch::Sender<Arc<Directory>>,
    /// This host's own record, as the underlay's watcher sees it.
    pub node: watch::Receiver<Node>,
    pub encryption: Encryption,
    /// What the checks of this host's endpoints have found.
    pub verdicts: watch::Receiver<Arc<Verdicts>>,
    pub balance: Balancing,
    /// The interfaces of this host that macvlan networks are on.
    pub parents: Parents,
    pub sandbox_listeners: SandboxListeners,
    pub tracker: TaskTracker,
}

/// What the keeper starts from.
pub struct Start {
    pub context: PlaneContext,
    pub timing: Timing,
    pub file: BookFile,
    pub book: Book,
    pub spaces: BTreeMap<NetworkId, Ipam>,
    /// The public ones are those that gossip was started with.
    pub own: OwnRecords,
    /// What other nodes said before this start.
    pub remembered: Remembered,
    pub names: NamesProjection,
}

/// The task that owns this node's records.
pub struct Keeper {
    pub(super) context: PlaneContext,
    pub(super) timing: Timing,
    pub(super) links: Links,
    pub(super) book: Arc<Book>,
    pub(super) cluster: Arc<Cluster>,
    pub(super) waiting: Vec<Waiting>,
    /// Who waits for an endpoint's kernel work to end.
    pub(super) replies: BTreeMap<EndpointId, Vec<Release>>,
    pub(super) finished: mpsc::Sender<Finished>,
    pub(super) file: BookFile,
    view: watch::Receiver<Arc<ClusterView>>,
    pub(super) plane_status: watch::Receiver<Arc<Status>>,
    remembered: Remembered,
    /// Whether sandboxes may have ended after the start and before the data plane looked at them.
    unwatched: bool,
    started: Instant,
    /// When everything downstream was last brought up to date, and whether that was in the warm-up.
    settled: (Instant, bool),
    /// Whether the cluster must be understood anew although the view is the same.
    pub(super) stale: bool,
    /// What was last told, to the others and to itself.
    own: OwnRecords,
    names: NamesProjection,
    snapshot: watch::Sender<Arc<Snapshot>>,
    inbox: mpsc::Receiver<Command>,
    outcomes: mpsc::Receiver<Finished>,
    /// Kernel work to start once the book that speaks of it is on disk.
    pub(super) starts: Vec<KernelWork>,
    /// Endpoints with kernel work under way.
    pub(super) in_flight: BTreeSet<EndpointId>,
    /// When the host was last to be put back on its networks.
    pub(super) exposed: Option<Instant>,
    /// Endpoints to detach as soon as they are attached.
    pub(super) doomed: BTreeSet<EndpointId>,
    /// Answers to give once the others have been told.
    pub(super) answers: Vec<Answer>,
    /// Changes of endpoints' ports that the kernel is yet to take over.
    pub(super) port_changes: Vec<PortChange>,
    /// Interfaces that are being tried out for networks to come.
    pub(super) tried: Vec<InterfaceName>,
    /// Those that networks were last known to be on.
    pub(super) parents: Option<BTreeSet<InterfaceName>>,
    /// Address spaces at work; the book has what of them must outlive the process.
    pub(super) spaces: BTreeMap<NetworkId, Ipam>,
    /// Whether addresses were given back, or asks for some withdrawn, since the spaces were last
    /// stepped: others may wait for them.
    pub(super) released: bool,
}

/// Why the keeper woke.
enum Wake {
    Command(Option<Command>),
    View,
    Node,
    /// Checks have found something.
    Verdicts,
    /// What is in force of services has changed.
    Balance,
    /// The kernel's tables have changed.
    Plane,
    Finished(Finished),
    /// A sandbox has ended; which one is unknown if there were too many to tell.
    Gone(Option<Gone>),
    Tick,
    Stop,
}

impl Keeper {
    /// Takes over what a predecessor left.
    pub(crate) fn new(
        links: Links,
        start: Start,
        inbox: mpsc::Receiver<Command>,
    ) -> (Self, Snapshots) {
        let Start { context, timing, file, book, spaces, own, remembered, names } = start;
        let view = links.gossip.view();
        let plane_status = links.plane.status();
        let heard = with_private(&remembered.complete(&view.borrow()), context.me, &own.private);
        let cluster = Arc::new(Cluster::resolve(heard, &book.networks, &book.gone()));
        let book = Arc::new(book);
        let snapshot = Snapshot {
            me: context.me,
            cluster: Arc::clone(&cluster),
            book: Arc::clone(&book),
            warming_up: true,
        };
        let (snapshot, snapshots) = watch::channel(Arc::new(snapshot));
        let (finished, outcomes) = mpsc::channel(256);
        let keeper = Self {
            context,
            timing,
            links,
            book,
            cluster,
            waiting: Vec::new(),
            replies: BTreeMap::new(),
            finished,
            file,
            view,
            plane_status,
            remembered,
            unwatched: true,
            started: Instant::now(),
            settled: (Instant::now(), true),
            stale: true,
            own,
            names,
            snapshot,
            inbox,
            outcomes,
            starts: Vec::new(),
            in_flight: BTreeSet::new(),
            exposed: None,
            doomed: BTreeSet::new(),
            answers: Vec::new(),
            port_changes: Vec::new(),
            tried: Vec::new(),
            parents: None,
            spaces,
            released: false,
        };
        (keeper, snapshots)
    }

    /// Runs until `stop`.
    ///
    /// # Errors
    ///
    /// The book cannot be written. Going on would mean telling others what a crash forgets.
    pub async fn run(
        mut self,
        mut gone: broadcast::Receiver<Gone>,
        stop: CancellationToken,
    ) -> Result<(), BookError> {
        self.adopt();
        self.settle().await?;
        let mut tick = time::interval(TICK);
        tick.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            // Every arm is cancel-safe and none awaits in its body.
            let wake = tokio::select! {
                () = stop.cancelled() => Wake::Stop,
                command = self.inbox.recv() => Wake::Command(command),
                changed = self.view.changed() => match changed {
                    Ok(()) => Wake::View,
                    Err(_) => Wake::Stop,
                },
                Ok(()) = self.links.node.changed() => Wake::Node,
                Ok(()) = self.links.verdicts.changed() => Wake::Verdicts,
                Ok(()) = self.links.balance.status.changed() => Wake::Balance,
                Ok(()) = self.plane_status.changed() => Wake::Plane,
                Some(outcome) = self.outcomes.recv() => Wake::Finished(outcome),
                gone = gone.recv() => Wake::Gone(gone.ok()),
                _ = tick.tick() => Wake::Tick,
            };
            match wake {
                Wake::Stop | Wake::Command(None) => return Ok(()),
                Wake::Command(Some(command)) => self.command(command),
                Wake::Finished(outcome) => self.finish(outcome),
                Wake::Gone(Some(gone)) => self.sandbox_gone(gone.endpoint),
                Wake::Gone(None) => self.look_for_lost().await,
                Wake::Tick => {
                    self.retry_detaching();
                    self.retry_exposing();
                    self.keep_listening();
                    if !self.is_due() {
                        continue;
                    }
                }
                Wake::Plane => {
                    self.project_names();
                    if !self.unwatched || !self.is_watched() {
                        continue;
                    }
                    self.unwatched = false;
                    self.look_for_lost().await;
                }
                Wake::View => self.stale = true,
                Wake::Node | Wake::Verdicts => {}
                Wake::Balance => {
                    self.project_names();
                    if !self.acknowledge() && self.port_changes.is_empty() {
                        continue;
                    }
                }
            }
            self.settle().await?;
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::CreateNetwork(request, reply) => {
                self.begin_create(request, reply);
            }
            Command::RemoveNetwork { network, force, reply } => {
                let _ = reply.send(self.remove_network(&network, force));
            }
            Command::Attach { request, reserved, reply } => self.admit(request, reserved, reply),
            Command::Reserve { network, ask, reply } => self.admit_reservation(network, ask, reply),
            Command::Release(reservation, reply) => {
                if !self.book.endpoints.contains_key(&reservation) {
                    self.release_everywhere(reservation);
                }
                let _ = reply.send(Ok(()));
            }
            Command::Describe(endpoint, description, reply) => {
                let _ = reply.send(self.describe(endpoint, description));
            }
            Command::Detach { endpoint, network, reply } => {
                self.detach_named(&endpoint, network.as_deref(), reply);
            }
            Command::Drain { target, draining, reply } => match self.drain(&target, draining) {
                Ok(endpoints) => self.answers.push(Answer::Drain(reply, endpoints)),
                Err(refusal) => drop(reply.send(Err(refusal))),
            },
            Command::Ports(endpoint, requests, reply) => {
                self.change_ports(endpoint, requests, reply);
            }
            Command::Service(order, reply) => self.admit_order(order, reply),
            Command::Expose { network, addresses, reply } => self.expose(network, addresses, reply),
            Command::Hide { network, reply } => self.hide(&network, reply),
            Command::Usage(reply) => {
                let _ = reply.send(Ok(self.usage()));
            }
        }
    }

    /// Whether the data plane has looked at every network with endpoints: it tells of those that end
    /// from then on.
    fn is_watched(&self) -> bool {
        let plane = self.plane_status.borrow();
        self.book.active().iter().all(|network| plane.networks.contains_key(network))
    }

    /// Whether a tick has more to do than to look: walking every endpoint twice a second is dear.
    fn is_due(&self) -> bool {
        let (at, in_warm_up) = self.settled;
        in_warm_up
            || !(self.waiting.is_empty() && self.starts.is_empty())
            || !self.port_changes.is_empty()
            || self.has_spare_vips()
            || self.released
            || at.elapsed() >= LONGEST_REST
    }

    /// Brings everything downstream of the records up to date: book, gossip, kernel, names.
    async fn settle(&mut self) -> Result<(), BookError> {
        // Each round may cause another: a loan that this node makes to itself, for one, or an
        // address that is free by now and that another node has been waiting for.
        self.settled = (Instant::now(), self.is_warming_up());
        for _ in 0..MAX_ROUNDS {
            self.refresh();
            self.note_verdicts();
            self.drop_removed_networks();
            self.step_spaces();
            self.grant_waiting();
            self.give_back_vips();
            self.acknowledge();
            self.save()?;
            self.project();
            let told = self.publish().await;
            // What is wanted now may be what the kernel has.
            let given_up = self.answer_port_changes();
            if !self.acknowledge() && !told && !self.released && !given_up {
                break;
            }
        }
        self.start_kernel_work();
        for answer in std::mem::take(&mut self.answers) {
            if let Some(unwanted) = answer.send() {
                self.release_everywhere(unwanted);
            }
        }
        Ok(())
    }

    /// Understands the newest view, if there is a newer one or the networks have changed here.
    fn refresh(&mut self) {
        self.stale |= self.view.has_changed().unwrap_or(false);
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let heard = Arc::clone(&self.view.borrow_and_update());
        self.remembered.forget_heard(&heard);
        let view = self.remembered.complete(&heard);
        let view = with_private(&view, self.context.me, &self.own.private);
        let known = &self.book.networks;
        self.cluster = Arc::new(Cluster::resolve(view, known, &self.book.gone()));
        if known.keys().any(|id| self.cluster.is_removed(*id)) {
            let cluster = Arc::clone(&self.cluster);
            Arc::make_mut(&mut self.book).bury(self.context.me, |id| cluster.is_removed(id));
        }
        let known: BTreeMap<NetworkId, _> =
            self.cluster.networks().map(|n| (n.id, n.as_ref().clone())).collect();
        if self.book.networks != known {
            Arc::make_mut(&mut self.book).networks = known;
        }
        self.follow_services();
        self.take_uplinks();
    }

    fn project(&mut self) {
        let desired = plane(self.context, &self.cluster, &self.book, self.is_warming_up());
        self.links.desired.send_if_modified(|current| {
            let changed = current.as_deref() != Some(&desired);
            if changed {
                *current = Some(Arc::new(desired));
            }
            changed
        });
        self.project_balance();
        self.project_names();
        self.links.listeners.retain(&self.book.active());
        self.snapshot.send_replace(Arc::new(Snapshot {
            me: self.context.me,
            cluster: Arc::clone(&self.cluster),
            book: Arc::clone(&self.book),
            warming_up: self.is_warming_up(),
        }));
    }

    /// Whether others may have endpoints here that this agent, just started, has not heard of.
    pub(super) fn is_warming_up(&self) -> bool {
        let age = self.started.elapsed();
        age < WARM_UP || (age < LONGEST_WARM_UP && !self.remembered.are_all_in(&self.view.borrow()))
    }

    /// Names follow what the kernel has, not what it shall have.
    fn project_names(&mut self) {
        let plane = Arc::clone(&self.plane_status.borrow_and_update());
        let me = self.context.me;
        let balance = Arc::clone(&self.links.balance.status.borrow());
        let warming_up = self.is_warming_up();
        let kernel = Kernel { plane: &plane, balance: &balance, warming_up };
        let directory = self.names.directory(me, &self.cluster, &self.book, kernel);
        self.links.directory.send_replace(Arc::new(directory));
    }

    /// Tells the others what changed of this node's records, and itself what is of no concern to
    /// them; returns whether anything did.
    async fn publish(&mut self) -> bool {
        let node = self.links.node.borrow_and_update().clone();
        let OwnRecords { public: mut records, private } =
            own_records(self.context.me, &node, &self.book, &self.spaces);
        let changed_here = self.own.private != private;
        self.own.private = private;
        self.stale |= changed_here;
        let published = &self.own.public;
        keep_empty_buckets(&mut records, published, &self.book);
        let set = records
            .iter()
            .filter(|(key, record)| published.get(key) != Some(record))
            .map(|(key, record)| (*key, Some(record.clone())));
        let withdrawn =
            published.keys().filter(|key| !records.contains_key(key)).map(|key| (*key, None));
        let changes: Vec<_> = set.chain(withdrawn).collect();
        if changes.is_empty() {
            return changed_here;
        }
        if let Err(error) = self.links.gossip.publish(changes).await {
            tracing::error!(error = %Chain(&error), "cannot tell the others what changed");
            // Records that were refused would be refused again; the rest is published.
            if !matches!(error, PublishError::Refused(_)) {
                return changed_here;
            }
        }
        self.own.public = records;
        true
    }
}

/// Empties buckets rather than withdrawing them while their network exists: so the coming and
/// going of endpoints leaves no tombstones.
fn keep_empty_buckets(
    records: &mut BTreeMap<Key, Record>,
    published: &BTreeMap<Key, Record>,
    book: &Book,
) {
    for key in published.keys() {
        let empty = match key {
            Key::Endpoints(..) => Record::Endpoints(Vec::new()),
            Key::Services(..) => Record::Services(Vec::new()),
            Key::Conditions(..) => Record::Conditions(Vec::new()),
            Key::Drained(_) => Record::Drained(BTreeSet::new()),
            Key::Node | Key::Network(_) | Key::Loan(_) | Key::Hold(_) | Key::Want(_) => continue,
        };
        if key.network().is_some_and(|network| book.networks.contains_key(&network)) {
            records.entry(*key).or_insert(empty);
        }
    }
}

/// How long an agent listens before it takes entries out of the kernel, at least, and at most
/// while nodes that it remembers are silent.
const WARM_UP: Duration = Duration::from_secs(2);
const LONGEST_WARM_UP: Duration = Duration::from_secs(10);
/// How long nothing may be brought up to date where nothing happens: rests of addresses end, and
/// what failed is tried again.
const LONGEST_REST: Duration = Duration::from_secs(10);
/// More rounds than any chain of own consequences has; what is left waits for the next wake.
const MAX_ROUNDS: usize = 8;
