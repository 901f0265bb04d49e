use std::{net::SocketAddr, panic::AssertUnwindSafe, sync::Mutex, time::Duration};

use bytes::Bytes;
use chitchat::{
    ChitchatConfig, ChitchatHandle, ChitchatId, ChitchatMessage, Deserializable,
    FailureDetectorConfig, Serializable, spawn_chitchat,
    transport::{Socket, Transport},
};
use futures::FutureExt;
use tokio::time;
use weft_gossip::{
    Carrier, EncodeError, Key, MAX_VALUE_BYTES, PublishError, Record, Refused,
    memory::{MemoryCarrier, MemoryNetwork},
};
use weft_model::{ClusterId, Endpoint, NetworkId, WantRecord};

use crate::cluster::{Cluster, address, endpoint, network, node};

#[tokio::test(start_paused = true)]
async fn a_poisonous_key_of_one_node_stops_nobody() {
    let mut cluster = Cluster::of(3, 1).await;
    let evil = Stranger::join(&cluster.network, 9).await;
    evil.set("é", "x").await;
    evil.set("node", "{}").await;
    time::sleep(Duration::from_secs(20)).await;

    let (key, record) = endpoint(1, 7, 1);
    cluster.publish(1, vec![(key, Some(record))]).await;
    for n in 1..=3 {
        let counters = cluster.running[&n].gossip.counters();
        assert_eq!(counters.restarts, 0, "{counters:?}");
        assert!(counters.rejected > 0, "the key did arrive: {counters:?}");
    }
    evil.leave(&cluster.network).await;
    cluster.converge(Duration::from_secs(5)).await;
}

#[tokio::test(start_paused = true)]
async fn an_oversized_bucket_is_refused_by_name_and_holds_no_other_news_back() {
    let mut cluster = Cluster::of(3, 12).await;
    let (key, before) = endpoint(1, 7, 1);
    cluster.publish(1, vec![(key, Some(before.clone()))]).await;
    let Record::Endpoints(one) = &before else { panic!("{before:?}") };
    let crowd = (0..2000).map(|seq| Endpoint { seq, ..one[0].clone() }).collect();

    let (other, small) = endpoint(2, 8, 1);
    let batch = vec![(key, Some(Record::Endpoints(crowd))), (other, Some(small.clone()))];
    let refused = match cluster.running[&1].gossip.publish(batch).await {
        Err(PublishError::Refused(Refused(refused))) => refused,
        outcome => panic!("{outcome:?}"),
    };
    assert!(
        matches!(refused[..], [EncodeError::TooLong { key: named, bytes, limit }]
            if named == key && bytes > limit),
        "{refused:?}"
    );
    let text = refused[0].to_string();
    assert!(text.contains(&key.to_string()) && text.contains(" bytes"), "{text}");

    // The rest of the batch is told, and under the refused key stays what was there.
    cluster.running.get_mut(&1).unwrap().records.insert(other, small);
    cluster.converge(Duration::from_secs(3)).await;
    let (third, later) = endpoint(3, 9, 1);
    cluster.publish(1, vec![(third, Some(later))]).await;
    cluster.converge(Duration::from_secs(3)).await;
}

#[tokio::test(start_paused = true)]
async fn a_gossip_task_that_dies_is_started_again() {
    let mut cluster = Cluster::of(3, 2).await;
    let evil = cluster.network.carrier(node(9), address(9));
    // More nodes than fit chitchat's digest: its length then underflows.
    evil.send(address(1), syn_of(1000));
    cluster
        .until(Duration::from_secs(2), |cluster| {
            let counters = cluster.running[&1].gossip.counters();
            (counters.restarts == 0).then(|| format!("{counters:?}"))
        })
        .await;
    cluster.network.crash(address(9));

    for n in 1..=3 {
        let (key, record) = endpoint(1, n as u8, 1);
        cluster.publish(n, vec![(key, Some(record))]).await;
    }
    cluster.converge(Duration::from_secs(10)).await;
    // By anti-entropy alone too: what was written while the others could not be reached.
    cluster.network.isolate([address(1)]);
    let (key, record) = endpoint(2, 1, 1);
    cluster.publish(1, vec![(key, Some(record))]).await;
    cluster.network.heal();
    cluster.converge(Duration::from_secs(10)).await;
}

#[tokio::test(start_paused = true)]
async fn a_generation_that_did_not_grow_is_noticed_and_overcome() {
    for (seed, generation) in [(1, 3), (2, 3), (3, 2), (4, 0)] {
        let mut cluster = Cluster::of(3, seed).await;
        for _ in 0..2 {
            let records = cluster.crash(3).await;
            cluster.start(3, records);
        }
        for e in 0..10 {
            let (key, record) = endpoint(1, e, 1);
            cluster.publish(3, vec![(key, Some(record))]).await;
        }
        cluster.converge(Duration::from_secs(5)).await;

        let mut records = cluster.crash(3).await;
        let (key, record) = endpoint(1, 0, 2);
        records.insert(key, record);
        records.remove(&endpoint(1, 5, 1).0);
        cluster.start_as(3, generation, records);
        cluster.converge(Duration::from_secs(20)).await;
        assert!(cluster.running[&3].gossip.counters().conflicts > 0, "generation {generation}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_starts_as_its_own_double_overcomes_its_past() {
    for seed in 0..5 {
        let mut cluster = Cluster::of(3, seed).await;
        for e in 0..10 {
            let (key, record) = endpoint(1, e, 1);
            cluster.publish(3, vec![(key, Some(record))]).await;
        }
        // Until anti-entropy has spread it too, not the push alone.
        time::sleep(Duration::from_secs(5)).await;
        // The same generation and the same first records: to chitchat the very same node.
        let mut records = cluster.crash(3).await;
        records.retain(|key, _| *key == Key::Node);
        cluster.start_as(3, 1, records);
        cluster.converge(Duration::from_secs(20)).await;
        assert_eq!(cluster.running[&3].gossip.counters().conflicts, 1);
        let (key, record) = endpoint(1, 3, 1);
        cluster.publish(3, vec![(key, Some(record))]).await;
        cluster.converge(Duration::from_secs(5)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_longest_value_still_travels_by_anti_entropy_and_blocks_nothing() {
    let mut cluster = Cluster::configured(5, |config| config.push_slice = 0);
    cluster.start_all(3).await;
    let mut record = WantRecord::default();
    let key = Key::Want(network(1));
    // Random addresses, which do not compress, up to the limit.
    for n in 0u128.. {
        let digest = NetworkId::from(n.to_be_bytes()).digest(b"ip");
        let bits = u128::from_be_bytes(digest[..16].try_into().unwrap());
        let mut longer = record.clone();
        longer.addresses.insert(std::net::Ipv6Addr::from(bits).into());
        if n % 50 == 0 || n > 1800 {
            let batch = vec![(key, Some(Record::Want(longer.clone())))];
            if cluster.running[&1].gossip.publish(batch).await.is_err() {
                break;
            }
        }
        record = longer;
    }
    cluster.publish(1, vec![(key, Some(Record::Want(record)))]).await;
    let (later, record) = endpoint(1, 7, 1);
    cluster.publish(1, vec![(later, Some(record))]).await;
    cluster.converge(Duration::from_secs(10)).await;
    assert!(cluster.running[&2].gossip.counters().push.received_messages == 0);
}

#[tokio::test(start_paused = true)]
async fn chitchat_blocks_all_later_keys_behind_a_value_longer_than_its_message() {
    for (length, arrives) in [(MAX_VALUE_BYTES, true), (65_500, false)] {
        let cluster = Cluster::of(2, 6).await;
        let stranger = Stranger::join(&cluster.network, 9).await;
        stranger.set("large", &"x".repeat(length)).await;
        stranger.set("later", "{}").await;
        time::sleep(Duration::from_secs(20)).await;
        let unknown = cluster.view(1).members[&node(9)].unknown_keys;
        assert_eq!(unknown, if arrives { 2 } else { 0 }, "{length}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_newer_agent_writes_is_kept_and_counted_and_the_rest_is_read() {
    let cluster = Cluster::of(2, 7).await;
    let newer = Stranger::join(&cluster.network, 9).await;
    newer.set("future/1", r#"{"v":7}"#).await;
    newer.set(&Key::Want(network(1)).to_string(), r#"{"v":2,"ver":5}"#).await;
    let wants = r#"{"v":1,"ver":6,"sig":"x","record":{"blocks":[],"hue":3}}"#;
    newer.set(&Key::Want(network(2)).to_string(), wants).await;
    cluster
        .until(Duration::from_secs(5), |cluster| {
            let member = cluster.view(1).members.get(&node(9)).cloned();
            let read = member.as_ref().is_some_and(|member| {
                (member.unknown_keys, member.undecodable) == (1, 1)
                    && member.wants.contains_key(&network(2))
            });
            (!read).then(|| format!("{member:?}"))
        })
        .await;
    let counters = cluster.running[&1].gossip.counters();
    assert_eq!((counters.unknown_keys, counters.undecodable), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_push_speaks_for_its_sender_only() {
    let cluster = Cluster::of(2, 8).await;
    let stranger = cluster.network.carrier(node(9), address(9));
    let value = r#"{"v":1,"ver":18446744073709551615,"record":"removed"}"#;
    stranger.send(address(1), push_of(&Key::Network(network(1)).to_string(), value));
    cluster
        .until(Duration::from_secs(1), |cluster| {
            let view = cluster.view(1);
            let arrived =
                view.members.get(&node(9)).is_some_and(|m| m.networks.contains_key(&network(1)));
            (!arrived).then(|| format!("{view:?}"))
        })
        .await;
    for n in [1, 2] {
        assert!(cluster.view(1).members[&node(n)].networks.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn messages_that_nobody_sends_are_counted_and_change_nothing() {
    let mut cluster = Cluster::of(2, 9).await;
    let before = cluster.running[&1].gossip.counters().rejected;
    let evil = cluster.network.carrier(node(9), address(9));
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    for junk in [&[][..], &[0], &[1], &[2], &[3], &[9, 9], &[2, 0x28, 0xb5, 0x2f, 0xfd]] {
        evil.send(address(1), Bytes::copy_from_slice(junk));
    }
    for kind in 1..=3 {
        evil.send(address(1), [&[kind], &bomb[..]].concat().into());
    }
    let echo = cluster.network.carrier(node(1), address(8));
    echo.send(address(1), push_of("node", "{}"));
    cluster
        .until(Duration::from_secs(2), |cluster| {
            let rejected = cluster.running[&1].gossip.counters().rejected - before;
            (rejected != 11).then(|| format!("{rejected} rejected"))
        })
        .await;
    cluster.network.crash(address(9));
    let (key, record) = endpoint(1, 7, 1);
    cluster.publish(2, vec![(key, Some(record))]).await;
    cluster.converge(Duration::from_secs(10)).await;
}

#[tokio::test(start_paused = true)]
async fn a_stalled_agent_accuses_nobody() {
    let cluster = Cluster::of(3, 10).await;
    // All tasks stand still while the clock goes on.
    time::advance(Duration::from_secs(30)).await;
    time::sleep(Duration::from_secs(10)).await;
    for n in 1..=3 {
        let counters = cluster.running[&n].gossip.counters();
        assert_eq!((counters.suspicions, counters.frozen), (0, 1), "{n}");
    }
}

#[tokio::test(start_paused = true)]
async fn endpoint_churn_leaves_nothing_behind_in_chitchat() {
    let mut cluster = Cluster::of(2, 11).await;
    let watcher = Stranger::join(&cluster.network, 9).await;
    for round in 0..50 {
        for e in 0..10 {
            let (key, record) = endpoint(1, e, round);
            cluster.publish(1, vec![(key, Some(record))]).await;
            cluster.publish(1, vec![(key, Some(Record::Endpoints(vec![])))]).await;
        }
    }
    time::sleep(Duration::from_secs(10)).await;
    let keys = watcher
        .handle
        .with_chitchat(|chitchat| {
            let states = chitchat.node_states().iter();
            let own = states.filter(|(id, _)| *id.node_id == *node(1).to_string());
            own.map(|(_, state)| state.key_values_including_deleted().count()).max()
        })
        .await;
    assert_eq!(keys, Some(11), "the node's record and ten buckets");
}

/// A node that speaks chitchat and the frames around it, and nothing else.
struct Stranger {
    handle: ChitchatHandle,
}

impl Stranger {
    async fn join(network: &MemoryNetwork, n: u16) -> Self {
        let config = ChitchatConfig {
            chitchat_id: ChitchatId::new(node(n).to_string(), 1, address(n)),
            cluster_id: ClusterId::from([9; 16]).to_string(),
            gossip_interval: Duration::from_millis(500),
            listen_addr: address(n),
            seed_nodes: vec![address(1).to_string()],
            failure_detector_config: FailureDetectorConfig::default(),
            marked_for_deletion_grace_period: Duration::from_secs(900),
            catchup_callback: None,
            extra_liveness_predicate: None,
        };
        let carrier = Frames(Mutex::new(Some(network.carrier(node(n), address(n)))));
        Self { handle: spawn_chitchat(config, vec![], &carrier).await.unwrap() }
    }

    /// Sets a key. The one who sets a poisonous one panics too, after it is set.
    async fn set(&self, key: &str, value: &str) {
        let set = self.handle.with_chitchat(|chitchat| chitchat.self_node_state().set(key, value));
        let _ = AssertUnwindSafe(set).catch_unwind().await;
    }

    async fn leave(self, network: &MemoryNetwork) {
        let address = self.handle.chitchat_id().gossip_advertise_addr;
        network.crash(address);
        self.handle.shutdown().await.unwrap();
    }
}

struct Frames(Mutex<Option<MemoryCarrier>>);

struct Framed(MemoryCarrier);

#[async_trait::async_trait]
impl Transport for Frames {
    async fn open(&self, _: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        Ok(Box::new(Framed(self.0.lock().unwrap().take().unwrap())))
    }
}

#[async_trait::async_trait]
impl Socket for Framed {
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        self.0.send(to, frame(1, &message.serialize_to_vec()));
        Ok(())
    }

    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        loop {
            let received = self.0.recv().await;
            if received.message.first() == Some(&1) {
                let body = zstd::bulk::decompress(&received.message[1..], 1 << 20)?;
                let message = ChitchatMessage::deserialize(&mut &body[..])?;
                return Ok((received.address, message));
            }
        }
    }
}

fn frame(kind: u8, body: &[u8]) -> Bytes {
    let mut message = vec![kind];
    message.extend(zstd::bulk::compress(body, 1).unwrap());
    message.into()
}

fn push_of(key: &str, value: &str) -> Bytes {
    let mut body = vec![1];
    body.extend(0u64.to_be_bytes());
    for text in [key, value] {
        body.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
        body.extend(text.as_bytes());
    }
    frame(2, &body)
}

/// A first message that speaks of `count` nodes.
fn syn_of(count: u16) -> Bytes {
    let mut body = 45_139u16.to_le_bytes().to_vec();
    body.extend([0, 0]);
    body.extend(count.to_le_bytes());
    for n in 0..count {
        let id = node(1000 + n).to_string();
        body.extend(32u16.to_le_bytes());
        body.extend(id.as_bytes());
        body.extend(1u64.to_le_bytes());
        body.extend([4, 10, 1, 0, 1, 0, 1]);
        body.extend([1u64, 0, 0].map(u64::to_le_bytes).concat());
    }
    let cluster = ClusterId::from([9; 16]).to_string();
    body.extend(32u16.to_le_bytes());
    body.extend(cluster.as_bytes());
    frame(1, &body)
}
