use std::time::Duration;

use tokio::time::{self, Instant};
use weft_gossip::Liveness;

use crate::cluster::{Cluster, address, endpoint, has_endpoint, liveness};

#[tokio::test(start_paused = true)]
async fn two_that_reach_each_other_only_by_others_stay_alive_for_each_other() {
    for (size, loss) in [(3, 0.0), (3, 0.05), (6, 0.05)] {
        for seed in 0..10 {
            let cluster = Cluster::of(size, seed).await;
            cluster.network.set_loss(loss);
            cluster.network.cut(address(1), address(2));
            let end = Instant::now() + Duration::from_secs(120);
            while Instant::now() < end {
                time::sleep(Duration::from_millis(50)).await;
                for (at, of) in [(1, 2), (2, 1)] {
                    let found = liveness(&cluster.view(at), of);
                    let case = format!("size {size} loss {loss} seed {seed} node {at}");
                    assert_eq!(found, Some(Liveness::Alive), "{case}");
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn news_gets_round_a_cut_within_two_seconds() {
    let mut slowest = Duration::ZERO;
    for seed in 0..20 {
        let mut cluster = Cluster::of(3, seed).await;
        cluster.network.cut(address(1), address(2));
        time::sleep(Duration::from_millis(10_000 + 41 * seed)).await;
        let (key, record) = endpoint(1, 7, 1);
        cluster.publish(1, vec![(key, Some(record))]).await;
        let arrived = |cluster: &Cluster| {
            let has = has_endpoint(&cluster.view(2), 1, 1, 7);
            (!has).then(|| format!("seed {seed}: nothing"))
        };
        slowest = slowest.max(cluster.until(Duration::from_secs(2), arrived).await);
    }
    println!("RESULT news_round_a_cut_max_ms={}", slowest.as_millis());
}

#[tokio::test(start_paused = true)]
async fn a_node_that_joins_is_seen_by_one_that_it_does_not_reach() {
    for seed in 0..10 {
        let mut cluster = Cluster::of(3, seed).await;
        cluster.network.cut(address(1), address(4));
        cluster.network.cut(address(2), address(4));
        cluster.start(4, [(weft_gossip::Key::Node, crate::cluster::node_record(4))].into());
        cluster.converge(Duration::from_secs(5)).await;
    }
}
