use std::collections::BTreeSet;
use std::time::Duration;

use super::super::{Kind, Unrelayed, Via, Way, relay_overhead};
use super::world::{World, node};
use crate::key::{Role, Root};

const SECOND: Duration = Duration::from_secs(1);

/// Nodes 1 and 2, and as many relays from 3 on.
fn world(relays: u8) -> World {
    let mut world = World::new();
    world.add(1, 2, 1500, false);
    world.add(2, 2, 1500, false);
    for number in 3..3 + relays {
        world.add(number, 2, 1500, true);
    }
    world
}

fn relay_of(world: &World, from: u8, to: u8) -> Option<u8> {
    let route = world.route(from, to)?;
    route.relay.filter(|_| route.up).map(|relay| relay.as_bytes()[0])
}

#[test]
fn two_nodes_that_do_not_reach_each_other_find_a_relay() {
    let mut world = world(1);
    world.cut(1, 2);
    world.meet(true);
    world.wait(3 * SECOND, |world| relay_of(world, 1, 2) == Some(3));
    world.wait(3 * SECOND, |world| relay_of(world, 2, 1) == Some(3));
    let route = world.route(1, 2).unwrap();
    assert_eq!((route.kind, route.ways.len()), (Kind::Relay, 0));
    assert_eq!(route.packet, 1472 - relay_overhead());
    assert_eq!(route.path_mtu("10.0.0.1".parse().unwrap()), 1500);

    world.routes.clear();
    world.run(300 * SECOND);
    assert_eq!(world.routes, [], "the relayed route is stable");
}

#[test]
fn a_path_that_dies_is_replaced_by_a_relay_and_taken_back_when_it_answers() {
    let mut world = world(1);
    world.meet(true);
    world.run(10 * SECOND);
    assert_eq!(world.route(1, 2).unwrap().kind, Kind::Direct);
    world.cut(1, 2);
    world.wait(12 * SECOND, |world| relay_of(world, 1, 2) == Some(3));
    world.wait(12 * SECOND, |world| relay_of(world, 2, 1) == Some(3));
    world.run(60 * SECOND);
    world.mend(1, 2);
    world.wait(6 * SECOND, |world| world.route(1, 2).unwrap().kind == Kind::Direct);
    world.run(10 * SECOND);
    assert_eq!(world.route(2, 1).unwrap().kind, Kind::Direct);
    assert_eq!(world.ways(1, 2).len(), 2);
}

#[test]
fn a_relay_that_does_not_reach_the_peer_says_so_and_the_next_one_is_tried() {
    let mut world = world(3);
    world.cut(1, 2);
    world.cut(3, 2);
    world.cut(4, 2);
    world.meet(true);
    world.wait(5 * SECOND, |world| relay_of(world, 1, 2) == Some(5));
    world.wait(5 * SECOND, |world| relay_of(world, 2, 1) == Some(5));
}

#[test]
fn a_relay_that_goes_away_is_replaced() {
    let mut world = world(2);
    world.cut(1, 2);
    world.meet(true);
    world.wait(5 * SECOND, |world| relay_of(world, 1, 2).is_some());
    let first = relay_of(&world, 1, 2).unwrap();
    for peer in [1, 2] {
        world.cut(first, peer);
    }
    let other = 7 - first;
    world.wait(20 * SECOND, |world| relay_of(world, 1, 2) == Some(other));
    world.wait(20 * SECOND, |world| relay_of(world, 2, 1) == Some(other));
}

#[test]
fn nobody_relays_who_does_not_offer_it() {
    let mut world = World::new();
    for number in 1..=3 {
        world.add(number, 1, 1500, false);
    }
    world.cut(1, 2);
    world.meet(true);
    world.run(60 * SECOND);
    assert_eq!(world.route(1, 2), None);
    assert!(world.book(1).relays(world.now, node(2)).is_empty());
}

#[test]
fn datagrams_of_agents_without_a_session_are_offered_the_same_relays() {
    let mut world = world(2);
    world.cut(1, 2);
    world.meet(true);
    world.run(SECOND / 2);
    assert_eq!(world.book(1).relays(world.now, node(2)), [node(3), node(4)]);
    world.tell(1, |book, now| book.cannot_relay(now, node(2), node(3)));
    assert_eq!(world.book(1).relays(world.now, node(2)), [node(4), node(3)]);
}

#[test]
fn a_new_session_is_tried_through_a_relay_at_once() {
    let mut world = world(1);
    world.cut(1, 2);
    world.meet(true);
    world.run(SECOND / 2);
    for _ in 0..8 {
        world.tell(1, |book, now| book.cannot_relay(now, node(2), node(3)));
    }
    world.run(10 * SECOND);
    assert_eq!(relay_of(&world, 1, 2), None);
    let root = Root::new(&[1; 32], Role::Dialler, world.now + SECOND).id();
    world.tell(1, |book, now| book.unconfirmed(now, node(2), &BTreeSet::from([root])));
    world.wait(SECOND / 10, |world| relay_of(world, 1, 2) == Some(3));
}

#[test]
fn only_members_with_a_direct_path_are_relayed_and_only_once() {
    let mut world = world(1);
    world.add(9, 1, 1500, false);
    world.cut(3, 9);
    world.meet(true);
    world.run(2 * SECOND);
    let way = Via::Way(Way { socket: 0, remote: "10.0.0.1:6791".parse().unwrap() });
    let relay = world.book(3);
    let admit = |via, to, len| relay.admit(node(1), via, node(to), len).map(|route| route.kind);

    assert_eq!(admit(way, 2, 1472), Ok(Kind::Direct));
    let (packet, big) = (1472, Unrelayed::TooBig { node: node(2), len: 1473, packet: 1472 });
    assert_eq!(admit(way, 2, packet + 1), Err(big));
    assert_eq!(admit(Via::Relay(node(2)), 2, 100), Err(Unrelayed::Again));
    assert_eq!(admit(way, 1, 100), Err(Unrelayed::Loop));
    assert_eq!(admit(way, 3, 100), Err(Unrelayed::Loop));
    assert_eq!(admit(way, 8, 100), Err(Unrelayed::Stranger(node(8))));
    assert_eq!(admit(way, 9, 100), Err(Unrelayed::NoDirectPath(node(9))));
    let off = world.book(2).admit(node(1), way, node(3), 100);
    assert_eq!(off, Err(Unrelayed::Off));
}
