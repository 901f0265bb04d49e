use std::{collections::BTreeMap, time::Duration};

use tokio::time::{self, Instant};
use weft_gossip::{ForgetError, Key, Liveness, Record};
use weft_model::{NetworkRecord, WantRecord};

use crate::cluster::{
    Cluster, address, endpoint, endpoint_key, has_endpoint, liveness, network, node, node_record,
};

#[tokio::test(start_paused = true)]
async fn a_leaving_node_is_hidden_at_once_and_knows_that_all_have_heard() {
    let mut cluster = Cluster::of(5, 1).await;
    let start = Instant::now();
    assert_eq!(cluster.leave(5).await, 0);
    assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
    for n in 1..=4 {
        assert_eq!(liveness(&cluster.view(n), 5), Some(Liveness::Left), "{n}");
    }
    time::sleep(Duration::from_secs(10)).await;
    assert_eq!(liveness(&cluster.view(1), 5), Some(Liveness::Left), "nor suspect later");

    cluster.start(5, [(Key::Node, node_record(5))].into());
    cluster.converge(Duration::from_secs(3)).await;
}

#[tokio::test(start_paused = true)]
async fn leaving_takes_no_longer_than_its_timeout_when_nobody_answers() {
    let mut cluster = Cluster::of(3, 1).await;
    cluster.network.isolate([address(3)]);
    let start = Instant::now();
    assert_eq!(cluster.leave(3).await, 2);
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_farewell_is_repeated_until_it_arrives() {
    let mut arrived = 0;
    for seed in 0..10 {
        let mut cluster = Cluster::of(3, seed).await;
        cluster.network.set_loss(0.4);
        arrived += usize::from(cluster.leave(3).await == 0);
    }
    assert!(arrived >= 8, "{arrived} of 10");
}

#[tokio::test(start_paused = true)]
async fn what_a_restarted_node_no_longer_publishes_is_withdrawn_and_the_rest_never_flickers() {
    for seed in 0..5 {
        let mut cluster = Cluster::of(3, seed).await;
        let kept: Vec<_> = (0..30).map(|e| endpoint(1, e, 1)).collect();
        let batch = kept.iter().cloned().chain([endpoint(2, 99, 1)]);
        cluster.publish(3, batch.map(|(key, record)| (key, Some(record))).collect()).await;
        cluster.converge(Duration::from_secs(3)).await;

        let mut view = cluster.running[&1].gossip.view();
        let mut records = cluster.crash(3).await;
        records.remove(&endpoint_key(2, 99));
        cluster.start(3, records);
        let deadline = Instant::now() + Duration::from_secs(5);
        while has_endpoint(&view.borrow_and_update(), 3, 2, 99) {
            let changed = time::timeout_at(deadline, view.changed()).await;
            changed.expect("the endpoint is withdrawn in time").unwrap();
            let current = view.borrow();
            assert!((0..30).all(|e| has_endpoint(&current, 3, 1, e)), "{current:?}");
        }
        cluster.converge(Duration::from_secs(3)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_restarted_node_replaces_its_earlier_life() {
    let mut cluster = Cluster::of(3, 4).await;
    for life in 1..6 {
        let records = cluster.crash(3).await;
        cluster.start(3, records);
        let (key, record) = endpoint(1, 7, life);
        cluster.publish(3, vec![(key, Some(record))]).await;
        cluster.converge(Duration::from_secs(4)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_removed_key_is_gone_everywhere_even_where_the_removal_was_missed() {
    let mut cluster = Cluster::of(3, 5).await;
    let key = Key::Network(network(1));
    let record = Record::Network(NetworkRecord::Removed);
    cluster.publish(1, vec![(key, Some(record))]).await;
    cluster.converge(Duration::from_secs(3)).await;

    cluster.network.isolate([address(3)]);
    cluster.publish(1, vec![(key, None)]).await;
    // Longer than withdrawn keys are kept: nobody can tell node 3 of the removal any more.
    time::sleep(Duration::from_secs(40 * 60)).await;
    let (endpoint, record) = endpoint(1, 7, 1);
    cluster.publish(1, vec![(endpoint, Some(record))]).await;
    assert!(cluster.view(3).members[&node(1)].networks.contains_key(&network(1)));
    cluster.network.heal();
    cluster.converge(Duration::from_secs(5)).await;
}

#[tokio::test(start_paused = true)]
async fn a_suspect_is_kept_beyond_chitchats_memory_and_dropped_when_it_is_forgotten() {
    let mut cluster = Cluster::of(3, 6).await;
    let (key, record) = endpoint(1, 7, 1);
    cluster.publish(3, vec![(key, Some(record))]).await;
    let refused = cluster.running[&1].gossip.forget(node(3)).await;
    assert!(matches!(refused, Err(ForgetError::Alive(_))), "{refused:?}");

    let records = cluster.crash(3).await;
    time::sleep(Duration::from_secs(3600)).await;
    assert!(has_endpoint(&cluster.view(1), 3, 1, 7));
    cluster.running[&1].gossip.forget(node(3)).await.unwrap();
    assert_eq!(liveness(&cluster.view(1), 3), None);
    time::sleep(Duration::from_secs(60)).await;
    assert_eq!(liveness(&cluster.view(1), 3), None, "and does not come back from others");
    assert_eq!(liveness(&cluster.view(2), 3), Some(Liveness::Suspect));

    cluster.start(3, records);
    cluster.converge(Duration::from_secs(3)).await;
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_node_that_was_only_cut_off_comes_back_whole() {
    let mut cluster = Cluster::of(3, 7).await;
    let (key, record) = endpoint(1, 7, 1);
    cluster.publish(3, vec![(key, Some(record))]).await;
    cluster.network.isolate([address(3)]);
    time::sleep(Duration::from_secs(10)).await;
    for n in [1, 2] {
        cluster.running[&n].gossip.forget(node(3)).await.unwrap();
    }
    time::sleep(Duration::from_secs(10)).await;
    assert_eq!(liveness(&cluster.view(1), 3), None);
    cluster.network.heal();
    cluster.converge(Duration::from_secs(3)).await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_member_is_forgotten_after_the_long_grace() {
    let mut cluster = Cluster::of(2, 8).await;
    cluster.crash(2).await;
    time::sleep(Duration::from_secs(24 * 3600 - 60)).await;
    assert_eq!(liveness(&cluster.view(1), 2), Some(Liveness::Suspect));
    time::sleep(Duration::from_secs(120)).await;
    assert_eq!(liveness(&cluster.view(1), 2), None);
}

#[tokio::test(start_paused = true)]
async fn only_the_changed_member_of_a_view_is_made_anew() {
    let mut cluster = Cluster::of(3, 9).await;
    let before = cluster.view(1);
    let (key, record) = endpoint(1, 7, 1);
    cluster.publish(3, vec![(key, Some(record))]).await;
    cluster.converge(Duration::from_secs(3)).await;
    let after = cluster.view(1);
    for n in 1..=3 {
        let same = std::sync::Arc::ptr_eq(&before.members[&node(n)], &after.members[&node(n)]);
        assert_eq!(same, n != 3, "{n}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_quiet_cluster_makes_no_new_views() {
    let mut cluster = Cluster::of(4, 10).await;
    cluster.start(5, BTreeMap::new());
    cluster.converge(Duration::from_secs(5)).await;
    let mut view = cluster.running[&1].gossip.view();
    view.borrow_and_update();
    time::sleep(Duration::from_secs(120)).await;
    assert!(!view.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn records_of_the_same_batch_travel_in_one_message() {
    let mut cluster = Cluster::of(2, 11).await;
    let before = cluster.running[&1].gossip.counters().push.sent_messages;
    let batch = (0..50).map(|e| endpoint(1, e, 1));
    cluster.publish(1, batch.map(|(key, record)| (key, Some(record))).collect()).await;
    let counters = cluster.running[&1].gossip.counters();
    assert_eq!(counters.push.sent_messages - before, 1);
    cluster.converge(Duration::from_millis(10)).await;
}

#[tokio::test(start_paused = true)]
async fn changes_asked_for_at_the_same_time_are_pushed_together() {
    let cluster = Cluster::of(2, 12).await;
    let gossip = &cluster.running[&1].gossip;
    let before = gossip.counters().push.sent_messages;
    let want = |n| (Key::Want(network(n)), Some(Record::Want(WantRecord::default())));
    let all = (0..20).map(|n| gossip.publish(vec![want(n)]));
    for result in futures::future::join_all(all).await {
        result.unwrap();
    }
    assert_eq!(gossip.counters().push.sent_messages - before, 1);
}
