use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{net::UdpSocket, time::Instant};
use weft_gossip::{
    Carrier,
    identity::Identity,
    quic::{FailureReason, Timing},
};

use crate::cluster::{Agent, Cluster};

#[tokio::test]
async fn a_wrong_cluster_is_named_on_both_sides() {
    let (ours, theirs) = (Cluster::start(), Cluster::start());
    ours.issuer.send(&theirs.issuer, "hello");

    let here = ours.issuer.failure_with(theirs.issuer.address()).await;
    let there = theirs.issuer.failure_with(ours.issuer.address()).await;
    let clusters = [&ours, &theirs].map(|c| c.issuer.identity.cluster().to_string());
    for failure in [&here, &there] {
        assert_eq!(failure.reason, FailureReason::WrongCluster, "{failure}");
        assert!(clusters.iter().all(|c| failure.text.contains(c)), "{failure}");
    }
    assert!(there.text.starts_with("the other side refuses: "), "{there}");
    assert!(theirs.issuer.carrier.peers().is_empty());
}

#[tokio::test]
async fn a_revoked_node_is_disconnected_and_stays_out() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    beta.send(&cluster.issuer, "hello");
    cluster.issuer.recv().await;

    cluster.issuer.revoked.send_replace(BTreeSet::from([beta.node()]));
    cluster.issuer.until("disconnected", |c| c.peers().is_empty().then_some(())).await;
    beta.until("disconnected", |c| c.peers().is_empty().then_some(())).await;

    beta.send(&cluster.issuer, "let me in");
    let refused = beta.failure_with(cluster.issuer.address()).await;
    assert_eq!(refused.reason, FailureReason::Revoked, "{refused}");
    assert!(refused.text.contains(&beta.node().to_string()), "{refused}");
    let refusal = cluster.issuer.failure_with(beta.address()).await;
    assert_eq!(refusal.reason, FailureReason::Revoked, "{refusal}");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_with_both_times() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    beta.clock_error.store(31 * 86_400, Ordering::Relaxed);
    beta.send(&cluster.issuer, "hello");

    let here = beta.failure_with(cluster.issuer.address()).await;
    let there = cluster.issuer.failure_with(beta.address()).await;
    let until = cluster.issuer.identity.certificate().validity().until.date().to_string();
    for failure in [here, there] {
        assert_eq!(failure.reason, FailureReason::Clock, "{failure}");
        assert!(failure.text.contains(&until), "{failure}");
        assert!(failure.text.contains("the clock here says"), "{failure}");
    }
}

#[tokio::test]
async fn a_copied_identity_is_recognised() {
    let cluster = Cluster::start();
    let copy = Agent::start(Identity::load(&cluster.state_dir("alpha")).unwrap());
    copy.send(&cluster.issuer, "hello");
    let failure = copy.failure_with(cluster.issuer.address()).await;
    assert_eq!(failure.reason, FailureReason::OwnIdentity, "{failure}");
}

#[test]
fn a_peer_that_was_killed_is_reached_again_as_soon_as_it_is_back() {
    let stays = tokio::runtime::Runtime::new().unwrap();
    let dies = tokio::runtime::Runtime::new().unwrap();
    let cluster = stays.block_on(async { Cluster::start() });
    let identity = stays.block_on(cluster.admit("beta"));
    let beta = dies.block_on(async { Agent::start(identity.clone()) });
    let address = beta.address();
    stays.block_on(async {
        cluster.issuer.send(&beta, "before");
        beta.recv().await;
    });

    // Nothing runs any more that could say goodbye.
    dies.shutdown_background();
    drop(beta);
    let took = stays.block_on(async {
        let again = rebind(identity, address).await;
        let begin = Instant::now();
        let mut attempt = 0_u32;
        loop {
            cluster.issuer.send(&again, attempt.to_be_bytes().to_vec());
            attempt += 1;
            let received =
                tokio::time::timeout(Duration::from_millis(20), again.carrier.recv()).await;
            if received.is_ok() {
                break begin.elapsed();
            }
            assert!(begin.elapsed() < Duration::from_secs(5), "{}", cluster.issuer.state());
        }
    });
    // Before the connection would have timed out.
    assert!(took < Timing::default().silence, "{took:?}");
}

#[tokio::test]
async fn a_healed_link_is_used_again_at_the_next_attempt() {
    let cluster = Cluster::start();
    let quick = Timing {
        silence: Duration::from_millis(900),
        keep_alive: Duration::from_millis(300),
        ..Timing::default()
    };
    let beta = Agent::start_with(cluster.admit("beta").await, |config| config.timing = quick);
    let relay = Relay::start(cluster.issuer.address()).await;
    beta.carrier.send(relay.address, "through".into());
    cluster.issuer.recv().await;

    relay.cut.store(true, Ordering::Relaxed);
    beta.until("cut off", |c| c.peers().is_empty().then_some(())).await;
    // While it is cut off, gossip goes on trying.
    let cut = Instant::now();
    while cut.elapsed() < Duration::from_secs(2) {
        beta.carrier.send(relay.address, "into the void".into());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    relay.cut.store(false, Ordering::Relaxed);
    let healed = Instant::now();
    cluster.issuer.recv().await;
    let patience = 2 * (quick.dial + quick.retry);
    assert!(healed.elapsed() < patience, "{:?}", healed.elapsed());
}

/// Waits for the system to give the port of a killed agent free.
async fn rebind(identity: Identity, address: SocketAddr) -> Agent {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        if std::net::UdpSocket::bind(address).is_ok() {
            return Agent::start_with(identity, |config| config.bind = address);
        }
        assert!(Instant::now() < end, "{address} is still taken");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A link that can be cut: passes packets between whoever sends to it first and one target.
struct Relay {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    _tasks: tokio::task::JoinSet<()>,
}

impl Relay {
    async fn start(target: SocketAddr) -> Self {
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let far = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        far.connect(target).await.unwrap();
        let address = near.local_addr().unwrap();
        let cut = Arc::new(AtomicBool::new(false));
        let (client, known) = tokio::sync::watch::channel(None);
        let mut tasks = tokio::task::JoinSet::new();

        let (from, to, blocked) = (near.clone(), far.clone(), cut.clone());
        tasks.spawn(async move {
            let mut packet = [0; 65_536];
            while let Ok((length, source)) = from.recv_from(&mut packet).await {
                client.send_replace(Some(source));
                if !blocked.load(Ordering::Relaxed) {
                    // A packet that cannot be sent is a lost packet.
                    let _ = to.send(&packet[..length]).await;
                }
            }
        });
        let blocked = cut.clone();
        tasks.spawn(async move {
            let mut packet = [0; 65_536];
            while let Ok(length) = far.recv(&mut packet).await {
                let client = *known.borrow();
                if let Some(client) = client
                    && !blocked.load(Ordering::Relaxed)
                {
                    let _ = near.send_to(&packet[..length], client).await;
                }
            }
        });
        Self { address, cut, _tasks: tasks }
    }
}
