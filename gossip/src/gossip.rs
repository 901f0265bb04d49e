use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::{ClusterId, NodeId};

use crate::{
    Carrier, ClusterView, Counters, Liveness, Record,
    command::Command,
    counters::Tally,
    replicator::Replicator,
    table::{EncodeError, Key},
};

/// What gossip needs to know of its node and cluster.
#[derive(Clone, Debug)]
pub struct GossipConfig {
    pub node: NodeId,
    pub cluster: ClusterId,
    /// How often this node's agent has started. The caller keeps it on disk and writes the next
    /// one, synced, before it starts gossip: records written under a generation that was used
    /// before do not spread.
    pub generation: u32,
    /// Where other agents were last known to be.
    pub seeds: Vec<SocketAddr>,
    /// All of this node's records as they stand at the start. What an earlier life published and
    /// this list lacks, peers take for withdrawn.
    pub records: Vec<(Key, Record)>,
    pub timing: Timing,
    /// To how many members a change is pushed at a time, those in the same network first; the next
    /// as many follow 10 ms later. Up to this cluster size a new or returning member is also pushed
    /// all records by everybody, above it by those in the same networks. Zero pushes nothing and
    /// leaves all to anti-entropy.
    pub push_slice: usize,
    /// Seeds the choice of peers.
    pub seed: u64,
}

impl GossipConfig {
    /// The settings for a cluster of up to some hundred nodes, without seeds and records.
    pub fn new(node: NodeId, cluster: ClusterId, generation: u32) -> Self {
        Self {
            node,
            cluster,
            generation,
            seeds: Vec::new(),
            records: Vec::new(),
            timing: Timing::default(),
            push_slice: 64,
            seed: rand::random(),
        }
    }
}

/// Gossip's durations.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two rounds of anti-entropy.
    pub gossip_interval: Duration,
    /// The silence after which a member is suspect. At least five intervals, or message loss makes
    /// suspects: at a loss of 20 %, two nodes miss each other five times in a row once in days.
    pub suspect_after: Duration,
    /// How long chitchat keeps dead nodes and withdrawn keys in every exchange. Minutes: each
    /// restart of an agent adds one dead node, and the exchange has an upper size.
    pub grace: Duration,
    /// How long the records of a member that is not alive stay in the view, unless
    /// [`Gossip::forget`] drops them.
    pub forget_after: Duration,
    /// How long [`Gossip::leave`] waits for the members' receipts.
    pub leave_timeout: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            gossip_interval: Duration::from_millis(500),
            suspect_after: Duration::from_millis(2500),
            grace: Duration::from_secs(15 * 60),
            forget_after: Duration::from_secs(24 * 60 * 60),
            leave_timeout: Duration::from_secs(1),
        }
    }
}

/// A running member of the cluster. Clones are the same member.
#[derive(Clone, Debug)]
pub struct Gossip {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<Arc<ClusterView>>,
    tally: Arc<Tally>,
}

impl Gossip {
    /// Starts gossip on `tracker`; it runs until `cancel`. The view holds this node's own records
    /// at once, but for those that cannot be encoded: they are left out, which is logged.
    pub fn start<C: Carrier>(
        config: GossipConfig,
        carrier: C,
        tracker: &TaskTracker,
        cancel: CancellationToken,
    ) -> Self {
        let (commands, queue) = mpsc::channel(COMMANDS);
        let tally = Arc::new(Tally::default());
        let (replicator, view) = Replicator::new(config, carrier, queue, Arc::clone(&tally));
        tracker.spawn(replicator.run(cancel));
        Self { commands, view, tally }
    }

    /// Sets records of this node, or withdraws those given as `None`. When it returns, the view
    /// holds the change and it is on its way to the members. All of it is one batch: peers get it
    /// in one message where it fits.
    ///
    /// # Errors
    ///
    /// Some records cannot be encoded: then the rest of the batch is published, and under the keys
    /// of those stays what was there before. Or gossip has stopped.
    pub async fn publish(&self, records: Vec<(Key, Option<Record>)>) -> Result<(), PublishError> {
        let refused = self.ask(|reply| Command::Publish { records, reply }).await?;
        if refused.is_empty() { Ok(()) } else { Err(PublishError::Refused(Refused(refused))) }
    }

    /// Announces that this node stops, and waits until all live members have confirmed it, or the
    /// timeout. Returns how many have not. Gossip itself goes on until it is cancelled.
    ///
    /// # Errors
    ///
    /// Gossip has stopped.
    pub async fn leave(&self) -> Result<usize, Stopped> {
        self.ask(|reply| Command::Leave { reply }).await
    }

    /// Drops a member that is not alive, and its records, from the view. It comes back whole if it
    /// is ever heard again.
    ///
    /// # Errors
    ///
    /// The node is alive, or gossip has stopped.
    pub async fn forget(&self, node: NodeId) -> Result<(), ForgetError> {
        self.ask(|reply| Command::Forget { node, reply }).await?
    }

    /// The view, now and as it changes.
    pub fn view(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.view.clone()
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        let mut counters = self.tally.read();
        for member in self.view.borrow().members.values() {
            match member.liveness {
                Liveness::Alive => counters.alive += 1,
                Liveness::Suspect => counters.suspect += 1,
                Liveness::Left => counters.left += 1,
            }
            counters.unknown_keys += member.unknown_keys as u64;
            counters.undecodable += member.undecodable as u64;
        }
        counters
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }
}

/// Gossip was asked after it had stopped.
#[derive(Debug, thiserror::Error)]
#[error("gossip has stopped")]
pub struct Stopped;

/// Records were not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Those that are named; the others were published.
    #[error("{0}")]
    Refused(Refused),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Records that cannot be published, and why.
#[derive(Debug)]
pub struct Refused(pub Vec<EncodeError>);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index > 0 { "; " } else { "" };
            write!(f, "{separator}{error}")?;
        }
        Ok(())
    }
}

/// A member was not forgotten.
#[derive(Debug, thiserror::Error)]
pub enum ForgetError {
    #[error("node {0} is alive: stop its agent or revoke its identity first")]
    Alive(NodeId),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Commands that wait; whoever publishes faster waits for room.
const COMMANDS: usize = 256;
