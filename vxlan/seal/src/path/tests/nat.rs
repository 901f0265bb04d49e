use std::time::Duration;

use super::super::{Action, Kind, Via, Way};
use super::world::{DELAY, World, node};

const SECOND: Duration = Duration::from_secs(1);

/// Node 1 is reached by everybody, node 2 is behind a NAT.
fn world(lanes: (u8, u8)) -> World {
    let mut world = World::new();
    world.add(1, lanes.0, 1500, false);
    world.add(2, lanes.1, 1500, false);
    world.put_behind_nat(2);
    world
}

#[test]
fn a_peer_behind_a_nat_is_reached_where_its_packets_come_from() {
    for (lanes, ways) in [
        ((1, 1), vec!["0>198.51.100.2:40000"]),
        ((2, 2), vec!["0>198.51.100.2:40000", "1>198.51.100.2:40001"]),
        ((4, 1), vec!["0>198.51.100.2:40000"]),
    ] {
        let mut world = world(lanes);
        world.meet(true);
        world.wait(SECOND, |world| world.route(1, 2).is_some_and(|route| route.up));
        world.run(SECOND);
        assert_eq!(world.ways(1, 2), ways);
        assert_eq!(world.route(1, 2).unwrap().kind, Kind::Observed);
        assert_eq!(world.route(2, 1).unwrap().kind, Kind::Direct);
    }
}

#[test]
fn replies_of_a_peer_with_more_lanes_come_from_the_sockets_that_its_nat_let_out() {
    let mut world = world((1, 4));
    world.meet(true);
    world.run(SECOND);
    let ways = world.ways(1, 2);
    assert_eq!(ways.len(), 1, "one socket has one way in use: {ways:?}");
    assert!(ways[0].starts_with("0>198.51.100.2:4000"), "{ways:?}");
    assert_eq!(world.ways(2, 1).len(), 4);
}

#[test]
fn the_mapping_of_an_idle_pair_is_kept_alive() {
    let mut world = world((2, 2));
    world.meet(false);
    world.run(10 * SECOND);
    world.routes.clear();
    world.run(600 * SECOND);
    assert_eq!(world.routes, []);
    assert_eq!(world.ways(1, 2).len(), 2);
}

#[test]
fn a_nat_that_rebinds_costs_less_than_two_seconds_once_the_peer_sends() {
    let mut world = world((1, 1));
    world.meet(true);
    world.run(10 * SECOND);
    world.rebind(2);
    world.send_frame(2, 1, 0);
    world.wait(2 * SECOND, |world| world.ways(1, 2) == ["0>198.51.100.2:40100"]);
    world.run(60 * SECOND);
    assert_eq!(world.ways(1, 2), ["0>198.51.100.2:40100"]);
    assert_eq!(world.ways(2, 1), ["0>10.0.0.1:6791"]);
}

#[test]
fn a_packet_replayed_from_another_address_first_steals_no_path() {
    let mut world = world((1, 1));
    world.meet(true);
    world.run(10 * SECOND);
    let before = world.ways(1, 2);
    world.sent.clear();
    let thief = Via::Way(Way { socket: 0, remote: "203.0.113.66:6666".parse().unwrap() });
    world.tell(1, |book, now| book.heard(now, node(2), thief));
    for _ in 0..120 {
        world.run(SECOND / 2);
        assert_eq!(world.ways(1, 2), before);
    }
    let to_thief = |(_, action): &&(_, Action)| matches!(action, Action::Probe { via, size, .. } if *via == thief && *size == 64);
    let probes = world.sent.iter().filter(to_thief).count();
    assert!((1..=7).contains(&probes), "{probes} small probes");
}

#[test]
fn many_replayed_packets_from_many_addresses_steal_no_path_either() {
    let mut world = world((1, 1));
    world.meet(true);
    world.run(10 * SECOND);
    let before = world.ways(1, 2);
    for number in 0..1000u16 {
        let remote = ([203, 0, 113, (number % 256) as u8], 1000 + number).into();
        let thief = Via::Way(Way { socket: 0, remote });
        world.tell(1, |book, now| book.heard(now, node(2), thief));
        world.run(SECOND / 50);
        assert_eq!(world.ways(1, 2), before);
    }
    assert!(world.sent.len() < 8000, "{}", world.sent.len());
}

#[test]
fn while_nothing_works_an_address_that_was_heard_is_used_before_it_is_proved() {
    let mut world = world((1, 1));
    world.meet(true);
    world.cut(1, 2);
    world.run(10 * SECOND);
    assert_eq!(world.route(1, 2), None);
    let heard = Way { socket: 0, remote: "198.51.100.2:40000".parse().unwrap() };
    world.tell(1, |book, now| book.heard(now, node(2), Via::Way(heard)));
    let route = world.route(1, 2).unwrap();
    assert_eq!((route.ways, route.kind, route.up), (vec![heard], Kind::Observed, false));
    world.run(4 * SECOND);
    assert_eq!(world.route(1, 2), None, "it was not proved in time");
}

#[test]
fn a_peer_that_comes_out_of_its_nat_is_reached_by_its_record_again() {
    let mut world = world((1, 1));
    world.meet(true);
    world.run(10 * SECOND);
    world.add(2, 1, 1500, false);
    world.meet(true);
    world.wait(SECOND, |world| world.route(1, 2).unwrap().kind == Kind::Direct);
    world.run(DELAY);
    assert_eq!(world.ways(1, 2), ["0>10.0.0.2:6791"]);
}
