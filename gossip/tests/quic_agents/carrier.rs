use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use tokio::time::Instant;
use weft_gossip::{
    Carrier, MAX_MESSAGE_BYTES,
    quic::{FailureReason, Timing},
};

use crate::cluster::{Agent, Cluster, LIMIT, settled};

#[tokio::test]
async fn a_message_arrives_with_the_senders_identity_and_can_be_answered() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    beta.send(&cluster.issuer, "ping");

    let received = cluster.issuer.recv().await;
    assert_eq!(received.from, beta.node());
    assert_eq!(received.address, beta.address());
    assert_eq!(&received.message[..], b"ping");

    cluster.issuer.carrier.send(received.address, "pong".into());
    let answer = beta.recv().await;
    assert_eq!((answer.from, &answer.message[..]), (cluster.issuer.node(), &b"pong"[..]));

    let peers = cluster.issuer.carrier.peers();
    assert_eq!(peers.len(), 1, "one connection serves both directions: {peers:?}");
    assert_eq!(peers[0].name.as_deref(), Some("beta"));
    assert_eq!((peers[0].node, peers[0].dialled), (beta.node(), false));
    assert_eq!((peers[0].traffic.sent_datagrams, peers[0].traffic.received_datagrams), (1, 1));
}

#[tokio::test]
async fn a_large_message_arrives_whole_and_one_that_is_too_large_is_counted() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    let large: Vec<u8> = (0..MAX_MESSAGE_BYTES).map(|i| (i * 7 % 251) as u8).collect();
    beta.send(&cluster.issuer, vec![0; MAX_MESSAGE_BYTES + 1]);
    beta.send(&cluster.issuer, large.clone());

    assert_eq!(cluster.issuer.recv().await.message, large);
    let traffic = beta.carrier.traffic();
    assert_eq!((traffic.dropped_oversized, traffic.sent_streams), (1, 1));
    assert_eq!(traffic.sent_bytes, MAX_MESSAGE_BYTES as u64);
}

#[tokio::test]
async fn many_messages_of_all_sizes_arrive_without_loss() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    beta.send(&cluster.issuer, vec![0; 1]);
    cluster.issuer.recv().await;
    let sizes: Vec<usize> = (1..200).map(|i| i * i % 5000 + 1).collect();
    for &size in &sizes {
        beta.send(&cluster.issuer, vec![0; size]);
    }

    let mut received = Vec::new();
    while received.len() < sizes.len() {
        received.push(cluster.issuer.recv().await.message.len());
    }
    let mut expected = sizes;
    expected.sort_unstable();
    received.sort_unstable();
    assert_eq!(received, expected);
}

#[tokio::test]
async fn two_that_dial_at_once_settle_on_one_connection_and_lose_nothing() {
    let cluster = Cluster::start();
    let (beta, gamma) = (cluster.member("beta").await, cluster.member("gamma").await);
    beta.send(&gamma, "from beta");
    gamma.send(&beta, "from gamma");
    assert_eq!(&gamma.recv().await.message[..], b"from beta");
    assert_eq!(&beta.recv().await.message[..], b"from gamma");

    let id = |a: &Agent, b: &Agent| a.carrier.session(b.node()).and_then(|s| s.id().ok());
    // Longer than a surplus connection lingers: then there is no other, and this one has stayed.
    let span = Timing::default().linger + Duration::from_millis(500);
    let agreed = || id(&beta, &gamma).filter(|one| Some(*one) == id(&gamma, &beta));
    let exchange = async {
        for sent in 0_u32.. {
            beta.send(&gamma, sent.to_be_bytes().to_vec());
            assert_eq!(gamma.recv().await.message[..], sent.to_be_bytes());
        }
    };
    tokio::select! {
        _ = settled(span, agreed) => {}
        () = exchange => {}
    }
}

#[tokio::test]
async fn a_cluster_that_speaks_all_at_once_settles_on_one_connection_for_each_pair() {
    let cluster = Cluster::start();
    let mut agents = Vec::new();
    for index in 0..8 {
        agents.push(cluster.member(&format!("node{index}")).await);
    }
    let pairs = || agents.iter().flat_map(|a| agents.iter().map(move |b| (a, b)));
    for (a, b) in pairs().filter(|(a, b)| a.node() != b.node()) {
        a.send(b, "hello");
    }
    for agent in &agents {
        let mut heard = BTreeSet::new();
        while heard.len() < agents.len() - 1 {
            heard.insert(agent.recv().await.from);
        }
    }

    let id = |a: &Agent, b: &Agent| a.carrier.session(b.node()).and_then(|s| s.id().ok());
    let snapshot = || {
        let ids = pairs().filter(|(a, b)| a.node() < b.node()).map(|(a, b)| (id(a, b), id(b, a)));
        ids.collect::<Vec<_>>()
    };
    let agreed = || {
        let ids = snapshot();
        ids.iter().all(|(one, other)| one.is_some() && one == other).then_some(ids)
    };
    settled(Timing::default().linger + Duration::from_millis(500), agreed).await;
}

#[tokio::test]
async fn a_cluster_that_keeps_all_connections_settles_on_one_for_each_pair() {
    let cluster = Cluster::start();
    let mut agents = Vec::new();
    for index in 0..8 {
        agents.push(cluster.member(&format!("node{index}")).await);
    }
    let pairs = || agents.iter().flat_map(|a| agents.iter().map(move |b| (a, b)));
    for (a, b) in pairs().filter(|(a, b)| a.node() != b.node()) {
        a.carrier.introduce(b.node(), b.address());
        a.carrier.keep(agents.iter().map(Agent::node).filter(|node| *node != a.node()).collect());
    }
    let agreed = || {
        let ids = pairs().filter(|(a, b)| a.node() != b.node()).map(|(a, b)| {
            let sessions = a.carrier.sessions(b.node());
            sessions.iter().filter_map(|session| session.id().ok()).collect::<Vec<_>>()
        });
        let ids: Vec<_> = ids.collect();
        let distinct: BTreeSet<_> = ids.iter().flatten().copied().collect();
        (ids.iter().all(|ids| ids.len() == 1) && distinct.len() == 8 * 7 / 2).then_some(distinct)
    };
    settled(Duration::from_secs(3), agreed).await;
}

#[tokio::test]
async fn both_ends_derive_the_same_keys_and_others_for_another_context() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    beta.send(&cluster.issuer, "hello");
    cluster.issuer.recv().await;

    let here = beta.carrier.session(cluster.issuer.node()).unwrap();
    let there = cluster.issuer.carrier.session(beta.node()).unwrap();
    let key = |s: &weft_gossip::quic::Session, context: &[u8]| {
        s.export::<32>("weft data 1", context).unwrap()
    };
    assert_eq!(here.id().unwrap(), there.id().unwrap());
    assert_eq!(key(&here, b"epoch 1"), key(&there, b"epoch 1"));
    assert_ne!(key(&here, b"epoch 1"), key(&here, b"epoch 2"));
    assert_ne!(here.export::<32>("another", b"epoch 1").unwrap(), key(&here, b"epoch 1"));
    assert!(here.dialled() && !there.dialled());
    assert_eq!(there.peer().node, beta.node());
}

#[tokio::test]
async fn ipv6_carries_as_ipv4_does_and_a_dual_stack_agent_speaks_both() {
    let cluster = Cluster::start();
    let bind = |address: &str, identity| {
        let address: SocketAddr = address.parse().unwrap();
        Agent::start_with(identity, |config| config.bind = address)
    };
    let v6 = bind("[::1]:0", cluster.admit("beta").await);
    let both = bind("[::]:0", cluster.admit("gamma").await);
    let port = both.address().port();

    v6.carrier.send(SocketAddr::new("::1".parse().unwrap(), port), "by v6".into());
    let received = both.recv().await;
    assert_eq!((received.from, received.address), (v6.node(), v6.address()));

    both.carrier.send(cluster.issuer.address(), "by v4".into());
    let received = cluster.issuer.recv().await;
    assert_eq!(received.address, SocketAddr::new("127.0.0.1".parse().unwrap(), port));
    cluster.issuer.carrier.send(received.address, "back".into());
    assert_eq!(both.recv().await.address, cluster.issuer.address());
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_made_again_when_needed() {
    let cluster = Cluster::start();
    let short = Timing { idle: Duration::from_millis(200), ..Timing::default() };
    let beta = Agent::start_with(cluster.admit("beta").await, |config| config.timing = short);
    beta.send(&cluster.issuer, "one");
    cluster.issuer.recv().await;

    beta.until("idle", |carrier| carrier.peers().is_empty().then_some(())).await;
    cluster.issuer.until("idle", |carrier| carrier.peers().is_empty().then_some(())).await;
    beta.send(&cluster.issuer, "two");
    assert_eq!(&cluster.issuer.recv().await.message[..], b"two");
}

#[tokio::test]
async fn sending_to_nobody_neither_blocks_nor_keeps_more_than_the_newest() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    // Bound and never read: packets vanish there.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let nobody = silent.local_addr().unwrap();
    let begin = Instant::now();
    for _ in 0..1000 {
        beta.carrier.send(nobody, "lost".into());
    }
    assert!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());

    let dropped = |c: &weft_gossip::quic::QuicCarrier| {
        (c.traffic().dropped_outgoing >= 1000 - 16).then_some(())
    };
    beta.until("dropped all but the newest", dropped).await;
    let failure = beta.failure_with(nobody).await;
    assert_eq!(failure.reason, FailureReason::Timeout, "{failure}");
    assert!(beta.carrier.failures()[&FailureReason::Timeout] >= 1);

    // Others are served meanwhile.
    beta.send(&cluster.issuer, "hello");
    cluster.issuer.recv().await;
}

#[tokio::test]
async fn what_was_sent_before_a_shutdown_arrives_and_the_peer_knows_at_once() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    beta.send(&cluster.issuer, "first");
    cluster.issuer.recv().await;
    beta.send(&cluster.issuer, vec![1; 300_000]);
    beta.send(&cluster.issuer, "last words");
    let begin = Instant::now();
    beta.carrier.shutdown(LIMIT).await;
    let mut lengths = [0, 0];
    for length in &mut lengths {
        *length = cluster.issuer.recv().await.message.len();
    }
    lengths.sort_unstable();
    assert_eq!(lengths, [10, 300_000]);
    cluster.issuer.until("rid of it", |c| c.peers().is_empty().then_some(())).await;
    let silence = Timing::default().silence;
    assert!(begin.elapsed() < silence, "told, not noticed: {:?}", begin.elapsed());
}

#[tokio::test]
async fn a_member_renews_its_certificate_and_presents_the_new_one() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    beta.send(&cluster.issuer, "hello");
    cluster.issuer.recv().await;

    beta.clock_error.store(3 * 86_400, std::sync::atomic::Ordering::Relaxed);
    cluster.issuer.clock_error.store(3 * 86_400, std::sync::atomic::Ordering::Relaxed);
    let newer = beta.carrier.renew(cluster.issuer.node()).await.unwrap();
    assert!(newer.validity().until > beta.identity.certificate().validity().until);
    beta.carrier.present(newer.clone()).unwrap();

    assert_eq!(beta.carrier.identity().certificate(), &newer);
    let loaded = weft_gossip::identity::Identity::load(&cluster.state_dir("beta")).unwrap();
    assert_eq!(loaded.certificate(), &newer);
    let refused = beta.carrier.renew(beta.node()).await.unwrap_err();
    assert_eq!(refused.reason, FailureReason::Unreachable, "{refused}");

    let own = cluster.issuer.carrier.renew(cluster.issuer.node()).await.unwrap();
    cluster.issuer.carrier.present(own.clone()).unwrap();
    assert!(own.validity().until > cluster.issuer.identity.certificate().validity().until);
}
