//! Any interleaving of endpoints, gossip, crashes and removals, on the machine itself.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use crate::cluster::{Cluster, network, node_id};
use proptest::{
    collection::vec,
    prelude::*,
    sample::Index,
    test_runner::{FileFailurePersistence, RngAlgorithm, TestError, TestRng, TestRunner},
};
use weft_ipam::{Ask, Layout};
use weft_model::{EndpointId, Family, Network};

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_address_is_on_two_nodes_and_wants_are_met_once_all_hear_all(
        network in networks(),
        hosts in 2_usize..=5,
        acts in vec(act(), 1..120),
    ) {
        let mut cluster = Cluster::new(network, hosts);
        let played = play_all(&mut cluster, &acts);
        prop_assert!(played.is_ok(), "{played:?}");
        let healed = heal_and_serve(&mut cluster);
        prop_assert!(healed.is_ok(), "{healed:?}");
    }
}

#[test]
fn a_host_that_forgets_what_it_released_is_caught() {
    assert!(finds_a_fault("/holds/released"));
}

#[test]
fn a_lender_that_forgets_its_loans_is_caught() {
    assert!(finds_a_fault("/loans/loans"));
}

/// Whether the checks above can fail: a run in which restarts lose a part of the state.
fn finds_a_fault(forgotten: &'static str) -> bool {
    let config = ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() };
    let config = ProptestConfig { max_shrink_iters: 0, ..config };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RNG));
    let input = (networks(), 2_usize..=5, vec(act(), 1..120));
    let outcome = runner.run(&input, |(network, hosts, acts)| {
        let mut cluster = Cluster::new(network, hosts);
        cluster.forgotten = Some(forgotten);
        play_all(&mut cluster, &acts).map_err(TestCaseError::fail)
    });
    matches!(outcome, Err(TestError::Fail(..)))
}

const RNG: RngAlgorithm = RngAlgorithm::ChaCha;

fn play_all(cluster: &mut Cluster, acts: &[Act]) -> Result<(), String> {
    for (turn, act) in acts.iter().enumerate() {
        let at = play(cluster, act);
        let checked = cluster.check().and_then(|()| match at {
            Some(at) => cluster.check_alone(at),
            None => Ok(()),
        });
        checked.map_err(|fault| format!("after act {turn}, {act:?}: {fault}"))?;
    }
    Ok(())
}

#[derive(Clone, Debug)]
enum Act {
    Allocate(Index, Family),
    AllocateFixed(Index, u128, Family),
    AllocateAndCrash(Index, Family),
    Retry(Index, Index),
    Release(Index, Index),
    Step(Index, BTreeSet<usize>),
    /// A node hears another's registers as they are; copies stay on the way.
    Talk(Index, Index),
    Send(Index, Index),
    /// The last field: a copy stays on the way.
    Deliver(Index, bool),
    Lose(Index),
    Crash(Index),
    Pass(u64),
    SetClockBack(u64),
    /// An operator removes a dead node.
    Remove(Index),
    /// An operator removes a node that is alive.
    RemoveWrongly(Index),
    HearOfRemovals(Index),
}

fn act() -> impl Strategy<Value = Act> {
    let family = prop_oneof![3 => Just(Family::V4), 1 => Just(Family::V6)];
    let any = any::<Index>;
    prop_oneof![
        6 => (any(), family.clone()).prop_map(|(at, family)| Act::Allocate(at, family)),
        6 => (any(), 2_u128..9, family.clone())
            .prop_map(|(at, offset, family)| Act::AllocateFixed(at, offset, family)),
        1 => (any(), family).prop_map(|(at, family)| Act::AllocateAndCrash(at, family)),
        6 => (any(), any()).prop_map(|(at, which)| Act::Retry(at, which)),
        6 => (any(), any()).prop_map(|(at, which)| Act::Release(at, which)),
        12 => (any(), proptest::collection::btree_set(0_usize..5, 0..2))
            .prop_map(|(at, unheard)| Act::Step(at, unheard)),
        16 => (any(), any()).prop_map(|(from, to)| Act::Talk(from, to)),
        4 => (any(), any()).prop_map(|(from, to)| Act::Send(from, to)),
        16 => (any(), proptest::bool::weighted(0.2)).prop_map(|(m, keep)| Act::Deliver(m, keep)),
        3 => any().prop_map(Act::Lose),
        3 => any().prop_map(Act::Crash),
        4 => (1_u64..700).prop_map(Act::Pass),
        1 => (1_u64..500).prop_map(Act::SetClockBack),
        1 => any().prop_map(Act::Remove),
        1 => any().prop_map(Act::RemoveWrongly),
        3 => any().prop_map(Act::HearOfRemovals),
    ]
}

fn networks() -> impl Strategy<Value = Arc<Network>> {
    let subnets = prop_oneof![
        4 => Just(vec!["10.0.0.0/29"]),
        1 => Just(vec!["10.0.0.0/26"]),
        1 => Just(vec!["10.0.0.0/24"]),
        1 => Just(vec!["10.0.0.0/29", "fd00::/120"]),
        1 => Just(vec!["10.0.0.0/27", "fd00::/64"]),
    ];
    (subnets, 1_usize..=2).prop_map(|(subnets, lenders)| network(&subnets, lenders))
}

/// Returns the host that acted, if one did.
fn play(cluster: &mut Cluster, act: &Act) -> Option<usize> {
    let present = cluster.present();
    let place = |index: &Index| present[index.index(present.len())];
    match act {
        Act::Allocate(at, family) => {
            let _ = cluster.allocate(place(at), Ask::Any(*family));
            Some(place(at))
        }
        Act::AllocateFixed(at, offset, family) => {
            let ip = cluster.network.pool(*family)?.subnet.nth(*offset)?;
            let _ = cluster.allocate(place(at), Ask::Fixed(ip));
            Some(place(at))
        }
        Act::AllocateAndCrash(at, family) => {
            cluster.allocate_and_crash(place(at), Ask::Any(*family));
            Some(place(at))
        }
        Act::Retry(at, which) => {
            let endpoint = pick(cluster.hosts[place(at)].waiting.keys(), which)?;
            let _ = cluster.retry(place(at), endpoint);
            Some(place(at))
        }
        Act::Release(at, which) => {
            let endpoint = pick(cluster.hosts[place(at)].running.keys(), which)?;
            cluster.release(place(at), endpoint);
            Some(place(at))
        }
        Act::Step(at, unheard) => {
            cluster.step(place(at), unheard);
            Some(place(at))
        }
        Act::Crash(at) => {
            cluster.crash(place(at));
            Some(place(at))
        }
        Act::Talk(from, to) => {
            if place(from) != place(to) {
                let before = cluster.flying.len();
                cluster.send(place(from), place(to));
                let fresh = cluster.flying[before..].to_vec();
                for message in fresh {
                    cluster.deliver(message);
                }
                cluster.step(place(to), &BTreeSet::new());
            }
            Some(place(to))
        }
        Act::Send(from, to) => {
            if place(from) != place(to) {
                cluster.send(place(from), place(to));
            }
            None
        }
        Act::Deliver(which, keep) if !cluster.flying.is_empty() => {
            let which = which.index(cluster.flying.len());
            let message = match keep {
                true => cluster.flying[which].clone(),
                false => cluster.flying.swap_remove(which),
            };
            cluster.deliver(message);
            None
        }
        Act::Lose(which) if !cluster.flying.is_empty() => {
            cluster.flying.swap_remove(which.index(cluster.flying.len()));
            None
        }
        Act::Deliver(..) | Act::Lose(_) => None,
        Act::Pass(seconds) => {
            cluster.now += seconds;
            None
        }
        Act::SetClockBack(seconds) => {
            cluster.now = cluster.now.saturating_sub(*seconds);
            None
        }
        Act::Remove(at) => {
            if present.len() > 2 && cluster.removed.insert(place(at)) {
                cluster.hosts[place(at)].stopped = true;
                cluster.hosts[place(at)].running.clear();
            }
            None
        }
        Act::RemoveWrongly(at) => {
            cluster.removed.insert(place(at));
            None
        }
        Act::HearOfRemovals(at) => {
            let removed: Vec<_> = cluster.removed.iter().copied().map(node_id).collect();
            cluster.hosts[place(at)].revoked.extend(removed);
            None
        }
    }
}

fn pick<'a>(
    mut of: impl ExactSizeIterator<Item = &'a EndpointId>,
    which: &Index,
) -> Option<EndpointId> {
    let len = of.len();
    if len == 0 { None } else { of.nth(which.index(len)).copied() }
}

/// I5: with all links up, every node gets an address while there are blocks enough, and an
/// address that nobody uses can be had by number from any node.
fn heal_and_serve(cluster: &mut Cluster) -> Result<(), String> {
    const ROUNDS: usize = 8;
    for at in cluster.removed.clone() {
        cluster.hosts[at].stopped = true;
        cluster.hosts[at].running.clear();
    }
    let members = cluster.present();
    let lenders = &cluster.network.lenders;
    if lenders.iter().any(|lender| !members.iter().any(|&at| node_id(at) == *lender)) {
        return Ok(());
    }
    for &at in &members {
        let known = [
            cluster.hosts[at].running.keys().copied().collect::<Vec<_>>(),
            cluster.hosts[at].waiting.keys().copied().collect(),
        ];
        for endpoint in known.into_iter().flatten() {
            cluster.release(at, endpoint);
        }
    }
    for &at in &members {
        let _ = cluster.allocate(at, Ask::Any(Family::V4));
    }
    serve(cluster, &members, ROUNDS)?;

    let used: BTreeSet<IpAddr> =
        cluster.hosts.iter().flat_map(|host| host.running.values().map(|grant| grant.ip)).collect();
    let layout = Layout::of(&cluster.network);
    let blocks = layout.blocks(Family::V4).ok_or("no IPv4 pool")?.count();
    let free = (0..blocks)
        .flat_map(|index| layout.usable_in(Family::V4, index))
        .find(|ip| !used.contains(ip));
    let Some(ip) = free else { return Ok(()) };
    let _ = cluster.allocate(*members.last().ok_or("no member")?, Ask::Fixed(ip));
    serve(cluster, &members, ROUNDS)
}

fn serve(cluster: &mut Cluster, members: &[usize], rounds: usize) -> Result<(), String> {
    for _ in 0..rounds {
        cluster.now += 70;
        cluster.round();
        for &at in members {
            for endpoint in cluster.hosts[at].waiting.keys().copied().collect::<Vec<_>>() {
                let _ = cluster.retry(at, endpoint);
            }
        }
        cluster.check()?;
        if members.iter().all(|&at| cluster.hosts[at].waiting.is_empty()) {
            return Ok(());
        }
    }
    let waiting: Vec<_> = members.iter().map(|&at| (at, &cluster.hosts[at].waiting)).collect();
    let states: Vec<_> = members.iter().map(|&at| &cluster.hosts[at].disk).collect();
    Err(format!("still waiting after {rounds} rounds: {waiting:?}\n{states:#?}"))
}
