use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use weft_gossip::{ClusterView, Gossip, GossipConfig, Key, Liveness, Record};
use weft_model::{NetworkId, Node, NodeId, NodeState, WantRecord};

use crate::cluster::{Agent, LIMIT};

/// An agent that gossips.
pub(crate) struct Member {
    pub(crate) agent: Agent,
    pub(crate) gossip: Gossip,
    /// How many things it has published.
    told: AtomicU8,
    _stop: DropGuard,
}

impl Member {
    pub(crate) fn start(agent: Agent, generation: u32, seeds: &[SocketAddr]) -> Self {
        let identity = &agent.identity;
        let mut config = GossipConfig::new(identity.node(), identity.cluster(), generation);
        config.seeds = seeds.to_vec();
        let address = agent.address();
        let node = Node {
            name: identity.name().clone(),
            vtep: address.ip().into(),
            address,
            version: "0.1.0".into(),
            state: NodeState::Up,
            underlay_mtu: 1500,
            routes: vec![],
            resolvers: vec![],
            sealing: None,
            metrics: None,
        };
        config.records = vec![(Key::Node, Record::Node(node))];
        let cancel = CancellationToken::new();
        let carrier = agent.carrier.clone();
        let gossip = Gossip::start(config, carrier, &TaskTracker::new(), cancel.clone());
        Self { agent, gossip, told: AtomicU8::new(0), _stop: cancel.drop_guard() }
    }

    pub(crate) fn node(&self) -> NodeId {
        self.agent.node()
    }

    pub(crate) fn view(&self) -> Arc<ClusterView> {
        self.gossip.view().borrow().clone()
    }

    pub(crate) fn sees_alive(&self, other: &Self) -> bool {
        let view = self.view();
        view.members.get(&other.node()).is_some_and(|member| member.liveness == Liveness::Alive)
    }

    /// Publishes something and waits until `other` has it. Returns how long it took.
    pub(crate) async fn tell(&self, other: &Self) -> Duration {
        let network = NetworkId::from([self.told.fetch_add(1, Ordering::Relaxed); 16]);
        let begin = Instant::now();
        let record = Record::Want(WantRecord::default());
        self.gossip.publish(vec![(Key::Want(network), Some(record))]).await.unwrap();
        let mut view = other.gossip.view();
        let has = |view: &Arc<ClusterView>| {
            view.members.get(&self.node()).is_some_and(|m| m.wants.contains_key(&network))
        };
        let told = tokio::time::timeout(LIMIT, view.wait_for(has)).await.is_ok();
        assert!(told, "no news: {}", other.agent.state());
        begin.elapsed()
    }

    /// Publishes until something has reached `other` while that received nothing of anti-entropy:
    /// so it was pushed.
    pub(crate) async fn push(&self, other: &Self) {
        let exchanges = || other.gossip.counters().gossip.received_messages;
        let end = Instant::now() + LIMIT;
        loop {
            let before = exchanges();
            let took = self.tell(other).await;
            if exchanges() == before {
                return;
            }
            let state = || other.agent.state();
            assert!(
                Instant::now() < end,
                "nothing was pushed, the last took {took:?}: {}",
                state()
            );
        }
    }
}

/// Waits until each of `members` sees all of them alive.
pub(crate) async fn all_alive(members: &[&Member]) {
    for member in members {
        let others = members.iter().filter(|other| other.node() != member.node());
        for other in others {
            let alive = |_: &_| member.sees_alive(other).then_some(());
            member.agent.until("alive for each other", alive).await;
        }
    }
}
