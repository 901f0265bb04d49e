use std::{collections::BTreeMap, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use tokio::time;
use weft_gossip::{Key, Record};
use weft_model::NetworkRecord;

use crate::cluster::{Cluster, address, endpoint, endpoint_key, network, node_record};

#[tokio::test(start_paused = true)]
async fn fifty_nodes_converge_whatever_happens_to_them() {
    for seed in [1, 2, 3] {
        converges(Story { seed, size: 50, steps: 120, push_slice: None }).await;
    }
}

#[tokio::test(start_paused = true)]
async fn small_clusters_converge_whatever_happens_to_them() {
    for seed in 100..130 {
        converges(Story { seed, size: 2 + (seed % 9) as u16, steps: 60, push_slice: None }).await;
    }
}

#[tokio::test(start_paused = true)]
async fn clusters_that_push_in_small_slices_or_not_at_all_converge_too() {
    for seed in 200..206 {
        converges(Story { seed, size: 12, steps: 60, push_slice: Some(2) }).await;
    }
    for seed in 300..304 {
        converges(Story { seed, size: 8, steps: 60, push_slice: Some(0) }).await;
    }
}

struct Story {
    seed: u64,
    size: u16,
    steps: usize,
    push_slice: Option<usize>,
}

/// Plays a random story of joins, departures, crashes, restarts, partitions and writes, a fifth of
/// all messages lost, and checks that all live nodes agree some time after its end.
async fn converges(story: Story) {
    let Story { seed, size, steps, push_slice } = story;
    println!("seed {seed}: {size} nodes, {steps} steps");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = match push_slice {
        None => Cluster::new(seed),
        Some(0) => Cluster::configured(seed, |config| config.push_slice = 0),
        Some(_) => Cluster::configured(seed, |config| config.push_slice = 2),
    };
    cluster.network.set_loss(0.2);
    let mut down = BTreeMap::new();
    for n in 1..=size {
        cluster.start(n, [(Key::Node, node_record(n))].into());
    }
    for _ in 0..steps {
        step(&mut cluster, &mut down, size, &mut rng).await;
        time::sleep(Duration::from_millis(rng.random_range(0..800))).await;
    }
    cluster.network.heal();
    if cluster.running.is_empty() {
        cluster.start(1, [(Key::Node, node_record(1))].into());
    }
    let took = cluster.converge(Duration::from_secs(30)).await;
    println!("RESULT converged_{size}_nodes_seed_{seed}_ms={}", took.as_millis());
}

async fn step(
    cluster: &mut Cluster,
    down: &mut BTreeMap<u16, BTreeMap<Key, Record>>,
    size: u16,
    rng: &mut StdRng,
) {
    let Some(&n) = cluster.running.keys().choose(rng) else {
        return revive(cluster, down, rng);
    };
    let (net, number) = (rng.random_range(1..4), rng.random_range(0..20));
    match rng.random_range(0..100) {
        0..45 => {
            let (key, record) = endpoint(net, number, rng.random());
            cluster.publish(n, vec![(key, Some(record))]).await;
        }
        45..55 => {
            let empty = Record::Endpoints(vec![]);
            cluster.publish(n, vec![(endpoint_key(net, number), Some(empty))]).await;
        }
        55..60 => {
            let record = Record::Network(NetworkRecord::Removed);
            cluster.publish(n, vec![(Key::Network(network(net)), Some(record))]).await;
        }
        60..65 => cluster.publish(n, vec![(Key::Network(network(net)), None)]).await,
        65..70 => drop(down.insert(n, cluster.crash(n).await)),
        70..73 => {
            let records = cluster.running[&n].records.clone();
            cluster.leave(n).await;
            down.insert(n, records);
        }
        73..78 => {
            let records = cluster.crash(n).await;
            cluster.start(n, records);
        }
        78..90 => revive(cluster, down, rng),
        90..95 => {
            let count = rng.random_range(1..=size / 2);
            cluster
                .network
                .isolate((1..=size).choose_multiple(rng, count.into()).into_iter().map(address));
        }
        _ => cluster.network.heal(),
    }
}

/// Starts a node that is down, often with less than it had before.
fn revive(
    cluster: &mut Cluster,
    down: &mut BTreeMap<u16, BTreeMap<Key, Record>>,
    rng: &mut StdRng,
) {
    let Some(&n) = down.keys().choose(rng) else { return };
    let Some(mut records) = down.remove(&n) else { return };
    records.retain(|key, _| *key == Key::Node || rng.random_bool(0.7));
    cluster.start(n, records);
}
