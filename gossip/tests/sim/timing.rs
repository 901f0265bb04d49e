use std::time::Duration;

use tokio::time::{self, Instant};
use weft_gossip::{Key, Liveness};

use crate::cluster::{Cluster, address, endpoint, has_endpoint, liveness, node_record};

#[tokio::test(start_paused = true)]
async fn an_endpoint_is_on_all_of_three_nodes_within_5_ms_and_one_latency() {
    for seed in 0..20 {
        let mut cluster = Cluster::of(3, seed).await;
        let latency = Duration::from_millis(2);
        let start = Instant::now();
        let (key, record) = endpoint(1, 7, 1);
        cluster.publish(1, vec![(key, Some(record))]).await;
        assert!(has_endpoint(&cluster.view(1), 1, 1, 7), "own view when publish returns");
        for n in [2, 3] {
            let mut view = cluster.running[&n].gossip.view();
            view.wait_for(|view| has_endpoint(view, 1, 1, 7)).await.unwrap();
        }
        let took = start.elapsed();
        assert!(took <= latency + Duration::from_millis(5), "seed {seed}: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_crashed_node_of_three_is_suspect_within_4_s_and_keeps_its_records() {
    let mut slowest = Duration::ZERO;
    for seed in 0..20 {
        let mut cluster = Cluster::of(3, seed).await;
        let (key, record) = endpoint(1, 7, 1);
        cluster.publish(3, vec![(key, Some(record))]).await;
        time::sleep(Duration::from_millis(7001 + 37 * seed)).await;
        cluster.crash(3).await;
        let took = cluster
            .until(Duration::from_secs(4), |cluster| {
                [1, 2].into_iter().find_map(|n| {
                    let found = liveness(&cluster.view(n), 3);
                    (found != Some(Liveness::Suspect))
                        .then(|| format!("seed {seed} {n}: {found:?}"))
                })
            })
            .await;
        slowest = slowest.max(took);
        for n in [1, 2] {
            assert!(has_endpoint(&cluster.view(n), 3, 1, 7), "hidden is not forgotten");
        }
    }
    println!("RESULT dead_node_suspect_3_nodes_max_ms={}", slowest.as_millis());
}

#[tokio::test(start_paused = true)]
async fn a_node_that_was_cut_off_is_back_everywhere_within_1500_ms() {
    let mut slowest = Duration::ZERO;
    for seed in 0..10 {
        for cut_for in [10, 100, 1000] {
            let mut cluster = Cluster::of(3, seed).await;
            cluster.network.isolate([address(3)]);
            time::sleep(Duration::from_secs(cut_for)).await;
            let (key, record) = endpoint(1, 7, 1);
            cluster.publish(3, vec![(key, Some(record))]).await;
            assert_eq!(liveness(&cluster.view(1), 3), Some(Liveness::Suspect));
            assert_eq!(liveness(&cluster.view(3), 1), Some(Liveness::Suspect));
            time::sleep(Duration::from_millis(29 * seed)).await;
            cluster.network.heal();
            slowest = slowest.max(cluster.converge(Duration::from_millis(1500)).await);
        }
    }
    println!("RESULT heal_3_nodes_max_ms={}", slowest.as_millis());
}

#[tokio::test(start_paused = true)]
async fn nobody_is_suspected_wrongly_when_a_fifth_of_all_messages_is_lost() {
    for (size, seeds, minutes) in [(2, 2, 30), (3, 2, 30), (5, 1, 10), (12, 1, 4), (50, 1, 1)] {
        for seed in 0..seeds {
            let cluster = Cluster::of(size, seed).await;
            cluster.network.set_loss(0.2);
            time::sleep(Duration::from_secs(60 * minutes)).await;
            for n in 1..=size {
                let counters = cluster.running[&n].gossip.counters();
                assert_eq!(counters.suspicions, 0, "size {size}, seed {seed}, node {n}");
                assert_eq!(counters.frozen, 0, "size {size}, seed {seed}, node {n}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn half_of_a_cluster_falling_silent_is_believed_within_5_s() {
    for seed in 0..20 {
        let cluster = Cluster::of(6, seed).await;
        cluster.network.isolate([4, 5, 6].map(address));
        let took = cluster
            .until(Duration::from_secs(5), |cluster| {
                (1..=6).find_map(|n| {
                    let others = if n <= 3 { 4..=6 } else { 1..=3 };
                    let view = cluster.view(n);
                    others
                        .into_iter()
                        .find(|&other| liveness(&view, other) != Some(Liveness::Suspect))
                        .map(|other| format!("{n} still sees {other}"))
                })
            })
            .await;
        assert!(cluster.running[&1].gossip.counters().frozen >= 1, "verdicts waited first");
        println!("RESULT half_silent_6_nodes_ms={}", took.as_millis());
        cluster.network.heal();
        cluster.converge(Duration::from_millis(2000)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_joining_node_has_the_whole_view_within_2_s() {
    for seed in 0..10 {
        let mut cluster = Cluster::of(5, seed).await;
        for n in 1..=5 {
            let batch = (0..40).map(|e| endpoint(n as u8, e, 1));
            cluster.publish(n, batch.map(|(key, record)| (key, Some(record))).collect()).await;
        }
        cluster.converge(Duration::from_secs(5)).await;
        cluster.start(6, [(Key::Node, node_record(6))].into());
        cluster.converge(Duration::from_secs(2)).await;
    }
}
