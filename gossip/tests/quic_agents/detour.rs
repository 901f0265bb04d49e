use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use weft_gossip::{
    identity::Identity,
    quic::{DETOURED_BYTES, Detour, PeerStatus, QuicCarrier, Session, Timing},
};
use weft_model::NodeId;

use crate::{
    cluster::{Agent, Cluster, LIMIT, throughout},
    gateway::Gateway,
    member::{Member, all_alive},
};

type Shore = mpsc::Sender<(NodeId, Bytes)>;

/// Carries datagrams between those that it knows, as a third member would.
#[derive(Default)]
struct Ferry {
    shores: Arc<Mutex<BTreeMap<NodeId, Shore>>>,
    carried: Arc<AtomicU64>,
    sunk: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Ferry {
    fn detour(&mut self, node: NodeId) -> Detour {
        let (outbound, mut to_carry) = mpsc::channel::<(NodeId, Bytes)>(256);
        let (landing, inbound) = mpsc::channel(256);
        self.shores.lock().unwrap().insert(node, landing);
        let (shores, carried) = (self.shores.clone(), self.carried.clone());
        let sunk = self.sunk.clone();
        self.tasks.spawn(async move {
            while let Some((to, datagram)) = to_carry.recv().await {
                assert!(datagram.len() <= DETOURED_BYTES.into(), "{}", datagram.len());
                carried.fetch_add(1, Ordering::Relaxed);
                let shore = shores.lock().unwrap().get(&to).cloned();
                if let Some(shore) = shore.filter(|_| !sunk.load(Ordering::Relaxed)) {
                    let _ = shore.try_send((node, datagram));
                }
            }
        });
        Detour { outbound, inbound }
    }

    fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }
}

/// Three members, of which the first two cannot send each other anything.
struct Lab {
    gateways: [Gateway; 2],
    ferry: Ferry,
    cut_off: [Member; 2],
    third: Member,
    _dir: tempfile::TempDir,
}

impl Lab {
    async fn start(has_ferry: bool) -> Self {
        let cluster = Cluster::start();
        let mut ferry = Ferry::default();
        let gateways = [Gateway::start().await, Gateway::start().await];
        let mut agents = Vec::new();
        for (gateway, name) in gateways.iter().zip(["one", "two"]) {
            let identity = cluster.admit(name).await;
            let detour = has_ferry.then(|| ferry.detour(identity.node()));
            agents.push(sheltered(identity, gateway, detour));
        }
        gateways[0].block(gateways[1].host());
        gateways[1].block(gateways[0].host());
        let seeds = [cluster.issuer.address()];
        let third = Member::start(cluster.issuer, 1, &[]);
        let cut_off = agents.into_iter().map(|agent| Member::start(agent, 1, &seeds));
        let cut_off = <[Member; 2]>::try_from(cut_off.collect::<Vec<_>>()).ok().unwrap();
        let lab = Self { gateways, ferry, cut_off, third, _dir: cluster.dir };
        all_alive(&[&lab.cut_off[0], &lab.cut_off[1], &lab.third]).await;
        lab
    }

    fn assert_alive(&self) {
        let [one, two] = &self.cut_off;
        assert!(one.sees_alive(two) && two.sees_alive(one), "{}", one.agent.state());
    }

    /// Watches that both stay alive for each other.
    async fn watch(&self, span: Duration) {
        throughout(span, || self.assert_alive()).await;
    }

    /// The session on which both agree.
    async fn agreed(&self, detoured: bool) -> [Session; 2] {
        let [one, two] = &self.cut_off;
        let both = |_: &QuicCarrier| {
            let here = one.agent.carrier.session(two.node())?;
            let there = two.agent.carrier.session(one.node())?;
            let same = here.id().unwrap() == there.id().unwrap();
            (same && here.detoured() == detoured).then_some([here, there])
        };
        one.agent.until("agreed", both).await
    }
}

fn sheltered(identity: Identity, gateway: &Gateway, detour: Option<Detour>) -> Agent {
    Agent::start_with(identity, |config| {
        gateway.shelter(config);
        config.detour = detour;
        let retry_direct = Duration::from_secs(2);
        config.timing = Timing { retry_direct, overlap: retry_direct, ..Timing::default() };
    })
}

fn status(at: &Member, of: &Member) -> Option<PeerStatus> {
    at.agent.carrier.peers().into_iter().find(|peer| peer.node == of.node())
}

#[tokio::test]
async fn two_that_cannot_reach_each_other_have_a_session_by_the_detour() {
    let lab = Lab::start(true).await;
    let [one, two] = &lab.cut_off;
    let [here, there] = lab.agreed(true).await;
    assert_eq!(here.peer().node, two.node());
    assert_eq!(there.peer().node, one.node());
    assert_ne!(here.dialled(), there.dialled());
    let root = |s: &Session| s.export::<32>("weft data root", b"").unwrap();
    assert_eq!(root(&here), root(&there));

    let peer = status(one, two).unwrap();
    assert!(peer.detoured && peer.address == two.agent.address(), "{peer:?}");
    assert!(status(one, &lab.third).is_some_and(|peer| !peer.detoured));
    one.push(two).await;
    two.push(one).await;

    // Longer than one datagram, by far.
    let large: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
    let before = lab.ferry.carried();
    one.agent.carrier.introduce(two.node(), two.agent.address());
    let rejected = two.gossip.counters().rejected;
    one.agent.send(&two.agent, [&[0xff][..], &large].concat());
    two.agent
        .until("received", |_| (two.gossip.counters().rejected > rejected).then_some(()))
        .await;
    assert!(lab.ferry.carried() - before > 250);
    lab.watch(Duration::from_secs(3)).await;
}

#[tokio::test]
async fn the_direct_way_is_used_as_soon_as_there_is_one_and_what_the_detour_carries_still_arrives()
{
    let lab = Lab::start(true).await;
    let detoured = lab.agreed(true).await;
    lab.gateways.iter().for_each(Gateway::unblock_all);
    let direct = lab.agreed(false).await;
    let [one, two] = &lab.cut_off;
    assert!(detoured.iter().all(Session::is_live), "make before break");
    let mut all = one.agent.carrier.sessions(two.node()).into_iter();
    assert!(all.any(|session| session.detoured()), "{}", one.agent.state());
    one.agent.until("rid of the detour", |_| (!detoured[0].is_live()).then_some(())).await;
    assert!(direct.iter().all(Session::is_live));
    assert!(status(one, two).is_some_and(|peer| !peer.detoured));

    let before = lab.ferry.carried();
    lab.watch(Duration::from_secs(2)).await;
    assert!(lab.ferry.carried() - before < 10, "nothing goes by the detour any more");
    let failures = one.agent.carrier.last_failures();
    assert!(!failures.contains_key(&two.agent.address()), "{failures:?}");

    // And back again, when the way is lost once more.
    lab.gateways[0].block_all();
    lab.gateways[1].block_all();
    lab.agreed(true).await;
}

#[tokio::test]
async fn a_detour_that_loses_everything_harms_nothing() {
    let lab = Lab::start(true).await;
    lab.ferry.sunk.store(true, Ordering::Relaxed);
    let [one, two] = &lab.cut_off;
    let lost = |_: &QuicCarrier| status(one, two).is_none().then_some(());
    one.agent.until("without a connection", lost).await;
    lab.watch(Duration::from_secs(4)).await;
    one.tell(two).await;
    one.push(&lab.third).await;

    lab.gateways.iter().for_each(Gateway::unblock_all);
    lab.agreed(false).await;
}

#[tokio::test]
async fn without_a_detour_two_that_cannot_reach_each_other_hear_by_the_third() {
    let lab = Lab::start(false).await;
    lab.watch(Duration::from_secs(8)).await;
    let [one, two] = &lab.cut_off;
    one.tell(two).await;
    two.tell(one).await;
    assert!(status(one, two).is_none() && status(two, one).is_none());
}

#[tokio::test]
async fn a_forged_datagram_of_the_detour_opens_nothing() {
    let cluster = Cluster::start();
    let mut ferry = Ferry::default();
    let identity = cluster.admit("beta").await;
    let detour = ferry.detour(identity.node());
    let beta = Agent::start_with(identity, |config| config.detour = Some(detour));
    let landing = ferry.shores.lock().unwrap()[&beta.node()].clone();
    for length in [0, 1, 20, 1200, 1500, 65_000] {
        for fill in [0, 0x40, 0xc0, 0xff] {
            let datagram = Bytes::from(vec![fill; length]);
            landing.send((NodeId::from([7; 16]), datagram)).await.unwrap();
        }
    }
    let drained = async {
        while landing.capacity() < landing.max_capacity() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, drained).await.expect("all are read");
    assert!(beta.carrier.peers().is_empty());
    beta.send(&cluster.issuer, "still here");
    assert_eq!(&cluster.issuer.recv().await.message[..], b"still here");
}

#[tokio::test]
async fn a_host_of_ipv4_alone_and_one_of_ipv6_alone_meet_by_the_detour() {
    let cluster = Cluster::start();
    let mut ferry = Ferry::default();
    let mut agents = Vec::new();
    for (name, bind) in [("four", "127.0.0.1:0"), ("six", "[::1]:0")] {
        let identity = cluster.admit(name).await;
        let detour = ferry.detour(identity.node());
        agents.push(Agent::start_with(identity, |config| {
            config.bind = bind.parse().unwrap();
            config.detour = Some(detour);
        }));
    }
    let (four, six) = (&agents[0], &agents[1]);
    for (here, there) in [(four, six), (six, four)] {
        here.carrier.introduce(there.node(), there.address());
        here.carrier.keep([there.node()].into());
    }
    let begin = Instant::now();
    let both = |_: &QuicCarrier| {
        let here = four.carrier.session(six.node())?;
        let there = six.carrier.session(four.node())?;
        (here.detoured() && here.id().unwrap() == there.id().unwrap()).then_some(())
    };
    four.until("agreed", both).await;
    println!("RESULT detour_after_ms={}", begin.elapsed().as_millis());
    // Each still speaks its own language.
    four.send(&cluster.issuer, "hello");
    assert_eq!(cluster.issuer.recv().await.address, four.address());
}
