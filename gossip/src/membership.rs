use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
};

use bytes::Bytes;
use chitchat::{
    Chitchat, ChitchatConfig, ChitchatHandle, ChitchatId, FailureDetectorConfig, NodeState,
    spawn_chitchat,
};
use tokio::sync::{Notify, mpsc};
use weft_model::{ClusterId, NodeId};

use crate::{
    Carrier, Timing,
    counters::{Tally, count},
    table::peek_ver,
    wire::Wire,
};

/// One run of chitchat: anti-entropy among the nodes of the cluster.
///
/// What others wrote is read by comparing versions under chitchat's lock. Its listeners do not
/// fire for deletions or deaths, and its watcher clones the state of every node upon each change.
pub(crate) struct Membership {
    handle: ChitchatHandle,
    id: ChitchatId,
    inbound: mpsc::Sender<(SocketAddr, Bytes)>,
    tally: Arc<Tally>,
    /// How far the state of each incarnation has been read.
    seen: BTreeMap<ChitchatId, Seen>,
    /// chitchat's version of our own state after our last write.
    written: u64,
}

/// What a run of chitchat needs.
pub(crate) struct MembershipConfig {
    pub(crate) node: NodeId,
    pub(crate) cluster: ClusterId,
    pub(crate) seeds: Vec<SocketAddr>,
    pub(crate) timing: Timing,
}

impl Membership {
    /// Starts a run as `incarnation`, which must be higher than in all runs before: records of an
    /// incarnation that others remember would never spread, and the others' would come back here.
    ///
    /// # Errors
    ///
    /// chitchat does not start.
    pub(crate) async fn start<C: Carrier>(
        config: &MembershipConfig,
        incarnation: u64,
        key_values: Vec<(String, String)>,
        carrier: &Arc<C>,
        changed: &Arc<Notify>,
        tally: &Arc<Tally>,
    ) -> anyhow::Result<Self> {
        let address = carrier.address();
        let id = ChitchatId::new(config.node.to_string(), incarnation, address);
        let (inbound, queue) = mpsc::channel(INBOUND_MESSAGES);
        let (to_carrier, to_changed) = (Arc::clone(carrier), Arc::clone(changed));
        let wire = Wire::new(config.node, to_carrier, queue, to_changed, Arc::clone(tally));
        let handle =
            spawn_chitchat(chitchat_config(config, id.clone(), address), key_values, &wire).await?;
        let written = handle.with_chitchat(|chitchat| chitchat.self_node_state().max_version());
        let written = written.await;
        let (seen, tally) = (BTreeMap::new(), Arc::clone(tally));
        Ok(Self { handle, id, inbound, tally, seen, written })
    }

    /// Passes a message that arrived for chitchat on to it.
    pub(crate) fn deliver(&self, from: SocketAddr, packed: Bytes) {
        if self.inbound.try_send((from, packed)).is_err() {
            count(&self.tally.overflowed);
        }
    }

    /// Starts an exchange with the node at `address`, besides the regular ones.
    pub(crate) fn kick(&self, address: SocketAddr) {
        count(&self.tally.kicks);
        // Fails only after the run has ended, which `ended` reports.
        let _ = self.handle.gossip(address);
    }

    /// Writes to our own state, in this order.
    pub(crate) async fn write(&mut self, writes: &[Write]) {
        let written = self.handle.with_chitchat(|chitchat| {
            let state = chitchat.self_node_state();
            for write in writes {
                match write {
                    Write::Set(key, value) => state.set(key, value),
                    // Peers read the withdrawal and its number, until chitchat drops the key
                    // everywhere after the grace time.
                    Write::Drop(key, withdrawal) => state.set_with_ttl(key, withdrawal),
                }
            }
            state.max_version()
        });
        self.written = written.await;
    }

    /// Finds what has changed since the last scan.
    pub(crate) async fn scan(&mut self) -> Scan {
        let Self { handle, id, seen, tally, written, .. } = self;
        let chitchat = handle.chitchat();
        let mut guard = chitchat.lock().await;
        // Records of ours that we did not write in this run: from an earlier life with this number.
        let foreign = guard.self_node_state().max_version() > *written;
        let scan = scan(&guard, id, seen, foreign);
        let digest = guard.node_states().keys().map(digest_entry_bytes).sum::<usize>();
        tally.digest_bytes.store(digest as u64, std::sync::atomic::Ordering::Relaxed);
        scan
    }

    /// Reads the whole state of `node` again at the next scan.
    pub(crate) fn reread(&mut self, node: NodeId) {
        self.seen.retain(|_, seen| seen.node != node);
    }

    /// Resolves when the run has ended by itself, with the reason.
    pub(crate) fn ended(&self) -> Pin<Box<dyn Future<Output = String> + Send>> {
        let watcher = self.handle.termination_watcher();
        Box::pin(async move {
            match watcher.await {
                Ok(()) => "it was told to stop".to_owned(),
                Err(error) => format!("{error:#}"),
            }
        })
    }

    /// Ends the run and waits until it has ended.
    pub(crate) async fn stop(self) {
        if let Err(error) = self.handle.shutdown().await {
            tracing::debug!(%error, "gossip had ended before it was stopped");
        }
    }
}

/// A write to our own state.
#[derive(Clone, Debug)]
pub(crate) enum Write {
    Set(String, Arc<str>),
    Drop(String, String),
}

/// What one scan found.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) nodes: Vec<Observation>,
    /// A number of ours that somebody else has used as ours: one of our earlier lives.
    pub(crate) conflict: Option<u64>,
}

/// The newest incarnation of another node, of which something is new.
#[derive(Debug)]
pub(crate) struct Observation {
    pub(crate) node: NodeId,
    pub(crate) address: SocketAddr,
    /// Its heartbeat has moved on while we watched.
    pub(crate) heard: bool,
    pub(crate) changes: Option<Changes>,
}

/// What is new in a node's state.
#[derive(Debug)]
pub(crate) struct Changes {
    pub(crate) values: Vec<(String, String)>,
    /// All keys that the state holds.
    pub(crate) present: BTreeSet<String>,
    /// The write number up to which the state is complete.
    pub(crate) complete_to: u64,
}

#[derive(Debug)]
struct Seen {
    node: NodeId,
    heartbeat: u64,
    max_version: u64,
    last_gc_version: u64,
    /// The highest write number among the values.
    ver: u64,
    /// The state holds the node's own record, which closes each batch of writes.
    has_node_record: bool,
}

fn scan(
    chitchat: &Chitchat,
    own: &ChitchatId,
    seen: &mut BTreeMap<ChitchatId, Seen>,
    foreign: bool,
) -> Scan {
    let states = chitchat.node_states();
    let mut result = Scan::default();
    if foreign {
        let vers = states[own].key_values().map(|(_, value)| peek_ver(value));
        result.conflict = vers.chain([own.generation_id]).max();
    }
    seen.retain(|id, _| states.contains_key(id));

    // Incarnations of one node are neighbours in this order, the newest last.
    let mut states = states.iter().peekable();
    while let Some((id, state)) = states.next() {
        if id.node_id == own.node_id {
            if id != own {
                let newest = earlier_life(id, state, seen);
                result.conflict = result.conflict.max(newest.filter(|&n| n > own.generation_id));
            }
        } else if states.peek().is_none_or(|(next, _)| next.node_id != id.node_id) {
            result.nodes.extend(observe(id, state, seen));
        }
    }
    result
}

/// The highest number that another life of this node has used, if something is new of it.
fn earlier_life(
    id: &ChitchatId,
    state: &NodeState,
    seen: &mut BTreeMap<ChitchatId, Seen>,
) -> Option<u64> {
    let observation = observe(id, state, seen)?;
    let values = observation.changes.into_iter().flat_map(|changes| changes.values);
    values.map(|(_, value)| peek_ver(&value)).chain([id.generation_id]).max()
}

fn observe(
    id: &ChitchatId,
    state: &NodeState,
    seen: &mut BTreeMap<ChitchatId, Seen>,
) -> Option<Observation> {
    let heartbeat = u64::from(state.heartbeat());
    let (known, seen) = match seen.get_mut(id) {
        Some(seen) => (true, seen),
        None => {
            // Not a node of ours, whatever it is: chitchat knows it, we do not.
            let node = id.node_id.parse().ok()?;
            let blank = Seen {
                node,
                heartbeat,
                max_version: 0,
                last_gc_version: 0,
                ver: 0,
                has_node_record: false,
            };
            (false, seen.entry(id.clone()).or_insert(blank))
        }
    };
    let heard = heartbeat > seen.heartbeat;
    seen.heartbeat = heartbeat;
    let changes = seen.changes(id, state);
    (heard || !known || changes.is_some()).then_some(Observation {
        node: seen.node,
        address: id.gossip_advertise_addr,
        heard,
        changes,
    })
}

impl Seen {
    fn changes(&mut self, id: &ChitchatId, state: &NodeState) -> Option<Changes> {
        if (state.max_version(), state.last_gc_version())
            == (self.max_version, self.last_gc_version)
        {
            return None;
        }
        // After a reset the state may hold less than what was read of it before.
        let from = if state.last_gc_version() > self.max_version { 0 } else { self.max_version };
        let mut values = Vec::new();
        let mut present = BTreeSet::new();
        for (key, value) in state.key_values_including_deleted().filter(|(_, v)| !v.is_deleted()) {
            present.insert(key.to_owned());
            if value.version > from {
                let ver = peek_ver(&value.value);
                self.ver = self.ver.max(ver);
                self.has_node_record |= key == NODE_KEY && ver > id.generation_id;
                values.push((key.to_owned(), value.value.clone()));
            }
        }
        self.max_version = state.max_version();
        self.last_gc_version = state.last_gc_version();
        let complete_to = if self.has_node_record { self.ver } else { 0 };
        Some(Changes { values, present, complete_to })
    }
}

fn chitchat_config(
    config: &MembershipConfig,
    chitchat_id: ChitchatId,
    listen_addr: SocketAddr,
) -> ChitchatConfig {
    let Timing { gossip_interval, suspect_after, grace, .. } = config.timing;
    ChitchatConfig {
        chitchat_id,
        cluster_id: config.cluster.to_string(),
        gossip_interval,
        listen_addr,
        seed_nodes: config.seeds.iter().map(SocketAddr::to_string).collect(),
        // Decides only whom chitchat prefers to talk to, and when it drops a node.
        failure_detector_config: FailureDetectorConfig {
            phi_threshold: 16.0,
            sampling_window_size: 100,
            max_interval: 4 * suspect_after,
            initial_interval: 2 * gossip_interval,
            dead_node_grace_period: grace,
        },
        marked_for_deletion_grace_period: grace,
        catchup_callback: None,
        // Nobody reads chitchat's watcher: let it clone nothing.
        extra_liveness_predicate: Some(Box::new(|_| false)),
    }
}

/// Bytes that chitchat's digest takes for one incarnation.
fn digest_entry_bytes(id: &ChitchatId) -> usize {
    let address = if id.gossip_advertise_addr.is_ipv4() { 7 } else { 19 };
    id.node_id.len() + address + 34
}

const INBOUND_MESSAGES: usize = 1024;
const NODE_KEY: &str = "node";
