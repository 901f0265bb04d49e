//! What endpoints get, and what they are told when they get nothing.

use std::{collections::BTreeSet, net::IpAddr};

use crate::cluster::{Cluster, TIMING, network, node_id};
use weft_ipam::{Ask, Ipam, Refusal, RestoreError, View};
use weft_model::{EndpointId, Family, Unit};

const ANY: Ask = Ask::Any(Family::V4);

#[test]
fn a_lender_gives_out_addresses_with_nobody_else_there() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/24", "fd00::/64"], 1), 1);
    let ips: BTreeSet<IpAddr> = (0..253).map(|_| cluster.allocate(0, ANY).unwrap().ip).collect();
    assert_eq!(ips.len(), 253);
    assert!(cluster.allocate(0, Ask::Any(Family::V6)).is_ok());
    assert!(matches!(cluster.allocate(0, ANY), Err(Refusal::Exhausted(_))));
}

#[test]
fn an_endpoint_that_asks_again_gets_the_same_address() {
    let mut ipam = Ipam::new(network(&["10.0.0.0/24"], 1), node_id(0), TIMING);
    let view = View::default();
    let grant = ipam.allocate(endpoint(1), ANY, &view, 0).unwrap();
    assert_eq!(ipam.allocate(endpoint(1), ANY, &view, 5).unwrap(), grant);
    assert_eq!(ipam.allocate(endpoint(1), Ask::Fixed(grant.ip), &view, 5).unwrap(), grant);
    assert_ne!(ipam.allocate(endpoint(2), ANY, &view, 5).unwrap().ip, grant.ip);

    let other = Ask::Fixed(ip("10.0.0.99"));
    let refusal = ipam.allocate(endpoint(1), other, &view, 5).unwrap_err();
    assert!(matches!(refusal, Refusal::HasOther { ip, .. } if ip == grant.ip), "{refusal}");
}

#[test]
fn a_released_address_rests_and_then_waits_its_turn() {
    let mut ipam = Ipam::new(network(&["10.0.0.0/29"], 1), node_id(0), TIMING);
    let view = View::default();
    let all: Vec<IpAddr> =
        (1..=5).map(|n| ipam.allocate(endpoint(n), ANY, &view, 0).unwrap().ip).collect();
    assert_eq!(ipam.release(endpoint(2), 10), [all[1]]);
    assert_eq!(ipam.release(endpoint(1), 20), [all[0]]);

    let refusal = ipam.allocate(endpoint(6), ANY, &view, 60).unwrap_err();
    assert!(refusal.to_string().contains("2 resting"), "{refusal}");
    assert_eq!(ipam.allocate(endpoint(7), Ask::Fixed(all[0]), &view, 60).unwrap().ip, all[0]);
    ipam.release(endpoint(7), 61);
    assert_eq!(ipam.allocate(endpoint(6), ANY, &view, 130).unwrap().ip, all[1]);
    assert_eq!(ipam.allocate(endpoint(8), ANY, &view, 130).unwrap().ip, all[0]);
}

#[test]
fn a_clock_set_back_prolongs_no_rest_beyond_its_length() {
    let mut ipam = Ipam::new(network(&["10.0.0.0/29"], 1), node_id(0), TIMING);
    let view = View::default();
    for n in 1..=5 {
        ipam.allocate(endpoint(n), ANY, &view, 1_000_000).unwrap();
    }
    ipam.release(endpoint(1), 1_000_000);
    assert!(ipam.allocate(endpoint(6), ANY, &view, 500).is_err());
    assert!(ipam.allocate(endpoint(6), ANY, &view, 560).is_ok());
}

#[test]
fn every_node_has_space_before_its_first_endpoint() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/24", "fd00::/64"], 2), 5);
    for _ in 0..3 {
        cluster.round();
    }
    for at in 0..5 {
        for family in [Family::V4, Family::V6] {
            let usage = cluster.hosts[at].ipam.usage(family, cluster.now);
            assert!(usage.free > 0, "host {at} has {usage:?}");
            assert!(cluster.allocate(at, Ask::Any(family)).is_ok());
        }
    }
}

#[test]
fn the_next_block_is_there_before_the_first_is_used_up() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/24"], 1), 2);
    for _ in 0..40 {
        for _ in 0..3 {
            cluster.round();
        }
        cluster.allocate(1, ANY).unwrap();
    }
}

#[test]
fn blocks_beyond_the_reserve_go_back_after_a_while() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/24"], 1), 1);
    for _ in 0..100 {
        cluster.allocate(0, ANY).unwrap();
    }
    assert!(cluster.hosts[0].ipam.usage(Family::V4, cluster.now).blocks >= 13);
    for endpoint in cluster.hosts[0].running.keys().copied().collect::<Vec<_>>() {
        cluster.release(0, endpoint);
    }
    cluster.now += TIMING.rest.as_secs();
    cluster.round();
    assert!(cluster.hosts[0].ipam.usage(Family::V4, cluster.now).blocks >= 13);
    cluster.now += TIMING.idle.as_secs();
    cluster.round();
    assert_eq!(cluster.hosts[0].ipam.usage(Family::V4, cluster.now).blocks, 1);
}

#[test]
fn a_fixed_address_comes_out_of_another_nodes_block() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/24"], 1), 3);
    for _ in 0..3 {
        cluster.round();
    }
    let taken = cluster.allocate(1, ANY).unwrap();
    let layout_end = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => IpAddr::V4((u32::from(ip) | 7).into()),
        IpAddr::V6(ip) => IpAddr::V6(ip),
    };
    let wanted = layout_end(taken.ip);

    let refusal = cluster.allocate(2, Ask::Fixed(wanted)).unwrap_err();
    assert_eq!(refusal, kept(wanted, 1));
    let grant = until_served(&mut cluster, 2);
    assert_eq!((grant.ip, grant.unit), (wanted, Unit::Address(wanted)));
    cluster.round();
    assert!((0..3).all(|observer| cluster.is_accepted(observer, 2, &grant)));

    for _ in 0..6 {
        assert_ne!(cluster.allocate(1, ANY).unwrap().ip, wanted);
    }
    let refusal = cluster.allocate(1, Ask::Fixed(wanted)).unwrap_err();
    assert!(matches!(refusal, Refusal::InUse { node, .. } if node == node_id(2)), "{refusal}");
}

/// Lender and holder are the same node, or different ones.
#[test]
fn an_address_in_use_is_kept_and_handed_over_once_it_is_given_back() {
    for (holder, asker) in [(0, 1), (1, 0), (1, 2)] {
        let mut cluster = Cluster::new(network(&["10.0.0.0/24"], 1), 3);
        for _ in 0..3 {
            cluster.round();
        }
        let used = cluster.allocate(holder, ANY).unwrap();
        // In use, but not told to anybody: set aside for an endpoint to come, for one.
        let refusal = cluster.allocate(asker, Ask::Fixed(used.ip)).unwrap_err();
        assert_eq!((refusal.may_pass(), &refusal), (true, &kept(used.ip, holder)));
        let endpoint = *cluster.hosts[holder].running.keys().next().unwrap();
        cluster.send(asker, holder);
        for message in std::mem::take(&mut cluster.flying) {
            cluster.deliver(message);
        }
        cluster.step(holder, &BTreeSet::new());
        let holds = |cluster: &Cluster| cluster.hosts[holder].ipam.records().holds.held.clone();
        assert!(holds(&cluster).values().all(|hold| hold.ceded.is_empty()), "ceded while in use");

        cluster.release(holder, endpoint);
        assert_eq!(until_served(&mut cluster, asker).ip, used.ip);
        assert!(holds(&cluster)[&used.unit].ceded.contains(&used.ip));
        // And back: it rests where it was last, and is had from there too.
        let endpoint = *cluster.hosts[asker].running.keys().next().unwrap();
        cluster.release(asker, endpoint);
        cluster.round();
        let again = cluster.allocate(holder, Ask::Fixed(used.ip));
        let again = again.unwrap_or_else(|_| until_served(&mut cluster, holder));
        assert_eq!((again.ip, again.unit), (used.ip, Unit::Address(used.ip)));
    }
}

/// A lender that has lost its view may hear an old register first, in which its borrower has ceded
/// the address: at an earlier turn of the block.
#[test]
fn what_was_ceded_at_an_earlier_turn_of_a_block_is_not_lent() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/24"], 1), 3);
    for _ in 0..3 {
        cluster.round();
    }
    let first = cluster.allocate(1, ANY).unwrap();
    let endpoint = *cluster.hosts[1].running.keys().next().unwrap();
    cluster.release(1, endpoint);
    cluster.allocate(2, Ask::Fixed(first.ip)).unwrap_err();
    until_served(&mut cluster, 2);
    cluster.send(1, 0);
    let old = std::mem::take(&mut cluster.flying);

    // All goes back to the lender, and the block comes once more to the same node.
    let endpoint = *cluster.hosts[2].running.keys().next().unwrap();
    cluster.release(2, endpoint);
    let more: Vec<IpAddr> =
        (0..10).filter_map(|_| cluster.allocate(1, ANY).ok()).map(|g| g.ip).collect();
    assert!(more.len() > 6, "{more:?}");
    for endpoint in cluster.hosts[1].running.keys().copied().collect::<Vec<_>>() {
        cluster.release(1, endpoint);
    }
    for pause in [TIMING.rest, TIMING.idle] {
        cluster.now += pause.as_secs();
        cluster.round();
        cluster.round();
    }
    let held = |cluster: &Cluster| cluster.hosts[1].ipam.records().holds.held.clone();
    assert!(!held(&cluster).contains_key(&first.unit), "{:?}", held(&cluster));
    for _ in 0..24 {
        cluster.round();
        if held(&cluster).contains_key(&first.unit) {
            break;
        }
        let _ = cluster.allocate(1, ANY);
    }
    let again = cluster.allocate(1, Ask::Fixed(first.ip)).unwrap();
    assert_eq!((again.unit, again.seq), (first.unit, 2));

    cluster.crash(0);
    for message in old {
        cluster.deliver(message);
    }
    let _ = cluster.allocate(2, Ask::Fixed(first.ip));
    cluster.send(2, 0);
    for message in std::mem::take(&mut cluster.flying) {
        cluster.deliver(message);
    }
    cluster.step(0, &BTreeSet::new());
    let loans = &cluster.hosts[0].ipam.records().loans.loans;
    assert_eq!(loans[&Unit::Address(first.ip)].seq, 1, "{loans:?}");
    assert_eq!(cluster.check(), Ok(()));
}

#[test]
fn who_asks_for_an_address_of_a_node_that_is_away_is_told_of_that_node() {
    let away = |gone: usize| {
        let mut cluster = Cluster::new(network(&["10.0.0.0/24"], 1), 3);
        for _ in 0..3 {
            cluster.round();
        }
        let used = cluster.allocate(1, ANY).unwrap();
        let endpoint = *cluster.hosts[1].running.keys().next().unwrap();
        cluster.release(1, endpoint);
        cluster.hosts[gone].stopped = true;
        let refusal = cluster.allocate(2, Ask::Fixed(used.ip)).unwrap_err();
        for _ in 0..3 {
            cluster.round();
        }
        let waiting = *cluster.hosts[2].waiting.keys().next().unwrap();
        assert_eq!(
            cluster.retry(2, waiting).unwrap_err(),
            refusal,
            "nobody gives it out meanwhile"
        );
        cluster.hosts[gone].stopped = false;
        assert_eq!(until_served(&mut cluster, 2).ip, used.ip);
        refusal
    };
    let lender = away(0);
    assert!(matches!(lender, Refusal::LenderUnreachable { node, .. } if node == node_id(0)));
    let holder = away(1);
    assert!(matches!(holder, Refusal::HolderUnreachable { node, .. } if node == node_id(1)));
    for refusal in [lender, holder] {
        assert!(refusal.may_pass() && refusal.to_string().contains("ask for another"), "{refusal}");
    }
}

#[test]
fn an_address_that_moved_to_another_node_is_no_longer_accepted_of_the_first() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/24"], 1), 3);
    for _ in 0..3 {
        cluster.round();
    }
    let old = cluster.allocate(1, ANY).unwrap();
    cluster.round();
    assert!(cluster.is_accepted(0, 1, &old));

    let first = *cluster.hosts[1].running.keys().next().unwrap();
    cluster.release(1, first);
    cluster.round();
    cluster.allocate(2, Ask::Fixed(old.ip)).ok();
    let new = until_served(&mut cluster, 2);
    cluster.round();
    assert!(cluster.is_accepted(0, 2, &new));
    assert!(!cluster.is_accepted(0, 1, &old), "a late record of the old endpoint");
}

#[test]
fn a_fixed_address_outside_the_range_is_lent_and_given_back() {
    let mut cluster = Cluster::new(network(&["fd00::/64"], 2), 3);
    let wanted = ip("fd00::beef:0:0:1");
    assert!(cluster.allocate(2, Ask::Fixed(wanted)).is_err());
    let grant = until_served(&mut cluster, 2);
    assert_eq!(grant.ip, wanted);

    let first = *cluster.hosts[2].running.keys().next().unwrap();
    cluster.release(2, first);
    cluster.now += TIMING.rest.as_secs();
    cluster.round();
    cluster.round();
    let again = cluster.allocate(0, Ask::Fixed(wanted));
    assert_eq!(again.unwrap_or_else(|_| until_served(&mut cluster, 0)).seq, 2);
}

#[test]
fn asks_that_no_waiting_can_meet_are_refused_for_good() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/24"], 1), 2);
    for (ask, text) in [
        (Ask::Any(Family::V6), "has no IPv6 subnet"),
        (Ask::Fixed(ip("10.1.0.5")), "is not in network app (10.0.0.0/24)"),
        (Ask::Fixed(ip("10.0.0.1")), "is the gateway"),
        (Ask::Fixed(ip("10.0.0.255")), "is not a host address"),
    ] {
        let refusal = cluster.allocate(0, ask).unwrap_err();
        assert!(!refusal.may_pass() && refusal.to_string().contains(text), "{refusal}");
    }
}

#[test]
fn an_exhausted_network_names_who_has_what() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/29"], 1), 2);
    for _ in 0..5 {
        cluster.allocate(0, ANY).unwrap();
    }
    cluster.round();
    let refusal = cluster.allocate(1, ANY).unwrap_err();
    assert!(refusal.may_pass());
    assert_eq!(
        refusal.to_string(),
        "network app has no free address left for this node: of the 5 blocks of 1 in \
         10.0.0.0/29, 0 are here (0 of 0 addresses leased, 0 resting) and 5 on 1 other nodes \
         (010101010101 has 5); release endpoints or make a network with a larger subnet"
    );
}

#[test]
fn a_node_cut_off_from_the_lenders_names_them() {
    let mut ipam = Ipam::new(network(&["10.0.0.0/24"], 2), node_id(4), TIMING);
    let refusal = ipam.allocate(endpoint(1), ANY, &View::default(), 0).unwrap_err();
    let text = refusal.to_string();
    assert!(text.contains("010101010101") && text.contains("020202020202"), "{text}");
}

#[test]
fn the_last_address_goes_to_the_node_that_has_none() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/29"], 2), 5);
    for at in 0..4 {
        cluster.allocate(at, ANY).ok();
        cluster.round();
        cluster.round();
    }
    cluster.allocate(4, ANY).ok();
    for _ in 0..6 {
        cluster.round();
        for at in 0..5 {
            for endpoint in cluster.hosts[at].waiting.keys().copied().collect::<Vec<_>>() {
                cluster.retry(at, endpoint).ok();
            }
        }
    }
    assert!((0..5).all(|at| cluster.hosts[at].running.len() == 1));
}

#[test]
fn a_node_removed_while_alive_loses_its_addresses_at_every_observer() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/29"], 1), 3);
    cluster.allocate(1, ANY).ok();
    let old = until_served(&mut cluster, 1);
    cluster.round();
    assert!(cluster.is_accepted(2, 1, &old));

    // The lender knows of the removal, the removed node does not.
    cluster.removed.insert(1);
    cluster.hosts[0].revoked.insert(node_id(1));
    let mut others = (0..5).map_while(|_| cluster.allocate(0, ANY).ok());
    let new = others.find(|grant| grant.ip == old.ip).unwrap();
    assert_eq!(new.seq, old.seq + 1);
    for from in [0, 1] {
        cluster.send(from, 2);
    }
    for message in std::mem::take(&mut cluster.flying) {
        cluster.deliver(message);
    }
    assert!(cluster.is_accepted(2, 0, &new) && !cluster.is_accepted(2, 1, &old));

    cluster.send(0, 1);
    for message in std::mem::take(&mut cluster.flying) {
        cluster.deliver(message);
    }
    cluster.step(1, &BTreeSet::new());
    assert!(cluster.hosts[1].running.is_empty(), "the fenced endpoint is detached");
}

#[test]
fn nothing_is_published_before_it_is_saved() {
    let mut ipam = Ipam::new(network(&["10.0.0.0/24"], 1), node_id(0), TIMING);
    let grant = ipam.allocate(endpoint(1), ANY, &View::default(), 0).unwrap();
    assert!(ipam.records().loans.loans.is_empty() && ipam.records().holds.held.is_empty());

    let unsaved = ipam.unsaved().unwrap();
    let file = serde_json::to_string(unsaved.state()).unwrap();
    ipam.saved(unsaved);
    assert!(ipam.unsaved().is_none());
    assert!(ipam.records().loans.loans.contains_key(&grant.unit));

    let state = serde_json::from_str(&file).unwrap();
    let back = Ipam::restore(ipam.network().clone(), node_id(0), TIMING, state).unwrap();
    assert_eq!(back.leases().map(|lease| lease.grant).collect::<Vec<_>>(), [grant]);
    let state = serde_json::from_str(&file).unwrap();
    let foreign = Ipam::restore(ipam.network().clone(), node_id(1), TIMING, state);
    assert!(matches!(foreign, Err(RestoreError::Node { .. })));
}

#[test]
fn two_hundred_nodes_all_have_a_block_after_three_rounds() {
    let mut cluster = Cluster::new(network(&["10.0.0.0/16"], 3), 200);
    for _ in 0..3 {
        cluster.round();
    }
    let empty = |at: &usize| cluster.hosts[*at].ipam.usage(Family::V4, cluster.now).free == 0;
    assert_eq!((0..200).filter(empty).count(), 0);
}

/// Rounds until the one waiting endpoint of `at` has its address.
fn until_served(cluster: &mut Cluster, at: usize) -> weft_model::AddressGrant {
    let endpoint = *cluster.hosts[at].waiting.keys().next().unwrap();
    for _ in 0..6 {
        cluster.round();
        if let Ok(grant) = cluster.retry(at, endpoint) {
            return grant;
        }
    }
    panic!("still waiting: {:?}", cluster.retry(at, endpoint));
}

fn kept(ip: IpAddr, holder: usize) -> Refusal {
    Refusal::Kept { network: "app".parse().unwrap(), ip, node: node_id(holder) }
}

fn endpoint(number: u64) -> EndpointId {
    crate::cluster::endpoint_id(number)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
