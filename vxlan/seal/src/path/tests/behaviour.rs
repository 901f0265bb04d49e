use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::super::{Action, Book, Candidate, Config, Kind, Route, SMALL, Via, Way};
use super::world::{DELAY, World, node};
use crate::key::{Role, Root, RootId};

const SECOND: Duration = Duration::from_secs(1);

fn pair(lanes: (u8, u8)) -> World {
    let mut world = World::new();
    world.add(1, lanes.0, 1500, false);
    world.add(2, lanes.1, 1500, false);
    world.meet(true);
    world
}

#[test]
fn two_nodes_reach_each_other_as_soon_as_a_reply_is_there() {
    let mut world = pair((2, 2));
    assert_eq!(world.route(1, 2), None);
    let whole = |route: Option<Route>| route.is_some_and(|r| r.up && r.ways.len() == 2);
    world.wait(2 * DELAY, |world| whole(world.route(1, 2)) && whole(world.route(2, 1)));
    let route = world.route(1, 2).unwrap();
    assert_eq!((route.kind, route.up, route.packet), (Kind::Direct, true, 1472));
    assert_eq!(route.rtt, Some(2 * DELAY));
    assert_eq!(route.path_mtu("10.0.0.1".parse().unwrap()), 1500);
}

#[test]
fn each_lane_sends_from_its_own_socket_however_many_the_peer_has() {
    for (lanes, ways) in [
        ((4, 1), ["0>10.0.0.2:6791", "1>10.0.0.2:6791", "2>10.0.0.2:6791", "3>10.0.0.2:6791"]),
        ((4, 2), ["0>10.0.0.2:6791", "1>10.0.0.2:6792", "2>10.0.0.2:6791", "3>10.0.0.2:6792"]),
        ((4, 8), ["0>10.0.0.2:6791", "1>10.0.0.2:6792", "2>10.0.0.2:6793", "3>10.0.0.2:6794"]),
    ] {
        let mut world = pair(lanes);
        world.run(SECOND);
        assert_eq!(world.ways(1, 2), ways);
        assert_eq!(world.route(1, 2).unwrap().kind, Kind::Direct);
    }
}

#[test]
fn a_path_that_answers_is_probed_at_its_pace() {
    for (busy, most) in [(true, 75), (false, 16)] {
        let mut world = World::new();
        world.add(1, 1, 1500, false);
        world.add(2, 1, 1500, false);
        world.meet(busy);
        world.run(10 * SECOND);
        world.sent.clear();
        world.run(60 * SECOND);
        let sent = world.sent.iter().filter(|(from, _)| *from == node(1)).count();
        assert!((6..=most).contains(&sent), "busy {busy}: {sent}");
    }
}

#[test]
fn a_silent_peer_is_probed_ever_more_seldom() {
    let mut world = pair((1, 1));
    world.cut(1, 2);
    world.run(SECOND);
    assert!((5..=8).contains(&(world.sent.len() / 2)), "{}", world.sent.len());
    world.run(120 * SECOND);
    assert!(world.sent.len() / 2 < 45, "{}", world.sent.len());
    assert_eq!(world.route(1, 2), None);
}

#[test]
fn a_path_that_dies_is_known_within_six_seconds_and_given_up_later() {
    let mut world = pair((2, 2));
    world.run(10 * SECOND);
    world.cut(1, 2);
    let took = world.wait(6 * SECOND, |world| !world.route(1, 2).unwrap().up);
    assert!(took >= 2 * SECOND, "{took:?}");
    world.run(20 * SECOND);
    assert!(world.route(1, 2).is_some(), "it may come back");
    world.run(20 * SECOND);
    assert_eq!(world.route(1, 2), None);

    world.mend(1, 2);
    world.wait(6 * SECOND, |world| world.route(1, 2).is_some_and(|route| route.up));
}

#[test]
fn a_peer_that_restarts_in_two_seconds_never_loses_its_route() {
    let mut world = pair((2, 2));
    world.run(10 * SECOND);
    world.routes.clear();
    for _ in 0..20 {
        world.cut(1, 2);
        world.run(2 * SECOND);
        world.mend(1, 2);
        world.run(7 * SECOND);
    }
    let lost =
        world.routes.iter().skip(4).filter(|(.., route)| {
            route.as_ref().is_none_or(|route| !route.up || route.ways.len() < 2)
        });
    assert_eq!(lost.count(), 0);
}

#[test]
fn a_flood_that_loses_half_of_everything_takes_no_path_down() {
    let mut world = pair((1, 1));
    world.run(10 * SECOND);
    world.loss = 50;
    world.routes.clear();
    for _ in 0..600 {
        world.send_frame(1, 2, 0);
        world.send_frame(2, 1, 0);
        world.run(SECOND / 10);
    }
    let down = world.routes.iter().filter(|(.., route)| route.as_ref().is_none_or(|r| !r.up));
    assert_eq!(down.count(), 0, "{:#?}", world.routes);
    assert_eq!(world.route(1, 2).unwrap().packet, 1472);
}

#[test]
fn a_new_record_is_taken_into_use_when_it_answers_and_not_before() {
    let mut world = pair((1, 1));
    world.run(10 * SECOND);
    let moved = Candidate { address: "10.0.0.9:6791".parse().unwrap(), ..world.candidate(2) };
    world.tell(1, |book, now| book.set_peers(now, &BTreeMap::from([(node(2), moved)])));
    world.run(10 * SECOND);
    assert_eq!(world.ways(1, 2), ["0>10.0.0.2:6791"]);
    assert!(world.route(1, 2).unwrap().up);

    let back = world.candidate(2);
    world.tell(1, |book, now| book.set_peers(now, &BTreeMap::from([(node(2), back)])));
    world.run(10 * SECOND);
    assert_eq!(world.ways(1, 2), ["0>10.0.0.2:6791"]);
    assert_eq!(world.route(1, 2).unwrap().kind, Kind::Direct);
}

#[test]
fn a_peer_that_left_has_no_route() {
    let mut world = pair((1, 1));
    world.run(SECOND);
    world.routes.clear();
    world.tell(1, |book, now| book.set_peers(now, &BTreeMap::new()));
    assert_eq!(world.routes.len(), 1);
    assert_eq!(world.routes[0].3, None);
    world.run(SECOND);
    assert_eq!(world.route(1, 2), None);
}

#[test]
fn a_root_gets_probes_of_its_own_until_it_is_confirmed() {
    let mut world = pair((1, 1));
    world.run(10 * SECOND);
    let root = Root::new(&[1; 32], Role::Dialler, world.now + SECOND).id();
    let start = world.now;
    let under = |world: &World| -> usize {
        let of_root = |action: &Action| matches!(action, Action::Probe { root: Some(under), .. } if *under == root);
        world.sent.iter().filter(|(_, action)| of_root(action)).count()
    };
    world.tell(1, |book, now| book.unconfirmed(now, node(2), &BTreeSet::from([root])));
    assert_eq!(under(&world), 1);
    for (ms, probes) in [(20, 2), (60, 3), (140, 4)] {
        let passed = world.now - start;
        world.run(Duration::from_millis(ms) - passed);
        assert_eq!(under(&world), probes, "after {ms} ms");
    }
    world.tell(1, |book, now| book.unconfirmed(now, node(2), &BTreeSet::new()));
    world.run(60 * SECOND);
    assert_eq!(under(&world), 4);
}

#[test]
fn a_new_root_has_silent_ways_probed_at_once() {
    let mut world = pair((1, 1));
    world.cut(1, 2);
    world.run(60 * SECOND);
    world.mend(1, 2);
    let root = Root::new(&[1; 32], Role::Dialler, world.now + SECOND).id();
    world.tell(1, |book, now| book.unconfirmed(now, node(2), &BTreeSet::from([root])));
    world.wait(2 * DELAY, |world| world.route(1, 2).is_some_and(|route| route.up));
}

/// What can befall a network.
#[derive(Clone, Debug)]
enum Fate {
    Pass { seconds: u8 },
    Cut(u8, u8),
    Mend(u8, u8),
    Rebind,
    Loss(u64),
    Mtu(u16),
    Frame(u8, u8),
}

fn fate() -> impl Strategy<Value = Fate> {
    let pair = || (1u8..5, 1u8..4).prop_map(|(one, step)| (one, (one + step - 1) % 4 + 1));
    prop_oneof![
        3 => (0u8..40).prop_map(|seconds| Fate::Pass { seconds }),
        2 => pair().prop_map(|(one, other)| Fate::Cut(one, other)),
        1 => pair().prop_map(|(one, other)| Fate::Mend(one, other)),
        1 => Just(Fate::Rebind),
        1 => (0u64..60).prop_map(Fate::Loss),
        1 => (1280u16..=1500).prop_map(Fate::Mtu),
        2 => pair().prop_map(|(one, other)| Fate::Frame(one, other)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn whatever_befell_a_network_its_nodes_reach_each_other_directly_once_it_is_whole(
        fates in prop::collection::vec(fate(), 1..40),
    ) {
        let mut world = World::new();
        for number in 1..=4 {
            world.add(number, number.min(2), 1500, number > 2);
        }
        world.put_behind_nat(2);
        world.meet(true);
        for fate in fates {
            match fate {
                Fate::Pass { seconds } => world.run(u32::from(seconds) * SECOND),
                Fate::Cut(one, other) => world.cut(one, other),
                Fate::Mend(one, other) => world.mend(one, other),
                Fate::Rebind => world.rebind(2),
                Fate::Loss(percent) => world.loss = percent,
                Fate::Mtu(mtu) => world.mtu = mtu,
                Fate::Frame(from, to) => if world.route(from, to).is_some() {
                    world.send_frame(from, to, 0);
                },
            }
        }
        world.cut.clear();
        (world.loss, world.mtu) = (0, 1500);
        world.run(90 * SECOND);
        for (from, to) in [(1, 2), (1, 3), (2, 1), (2, 4), (3, 1), (3, 2), (4, 3)] {
            let route = world.route(from, to);
            let direct = |route: &Route| route.up && route.relay.is_none();
            prop_assert!(route.as_ref().is_some_and(direct), "{from} to {to}: {route:?}");
        }
        world.run(700 * SECOND);
        prop_assert_eq!(world.route(1, 3).map(|route| route.packet), Some(1472));
    }
}

/// Anything that a book can be told.
#[derive(Clone, Debug)]
enum News {
    Pass(u16),
    Peers { number: u8, lanes: u8, relay: bool, busy: bool },
    Heard { number: u8, via: Via },
    Replied { number: u8, id: u32 },
    Latest { number: u8 },
    Unreachable { number: u8, via: Via },
    TooBig { number: u8, size: u16 },
    CannotRelay { number: u8, relay: u8 },
    Unconfirmed { number: u8, root: bool },
}

fn via() -> impl Strategy<Value = Via> {
    prop_oneof![
        3 => (0u8..4, 0u8..4, 6790u16..6796).prop_map(|(socket, host, port)| Via::Way(Way {
            socket,
            remote: ([10, 0, 0, host], port).into(),
        })),
        1 => (0u8..5).prop_map(|relay| Via::Relay(node(relay))),
    ]
}

fn news() -> impl Strategy<Value = News> {
    let number = 0u8..4;
    prop_oneof![
        (0u16..8000).prop_map(News::Pass),
        (number.clone(), 1u8..9, any::<bool>(), any::<bool>())
            .prop_map(|(number, lanes, relay, busy)| News::Peers { number, lanes, relay, busy }),
        (number.clone(), via()).prop_map(|(number, via)| News::Heard { number, via }),
        (number.clone(), 0u32..300).prop_map(|(number, id)| News::Replied { number, id }),
        number.clone().prop_map(|number| News::Latest { number }),
        (number.clone(), via()).prop_map(|(number, via)| News::Unreachable { number, via }),
        (number.clone(), any::<u16>()).prop_map(|(number, size)| News::TooBig { number, size }),
        (number.clone(), 0u8..5).prop_map(|(number, relay)| News::CannotRelay { number, relay }),
        (number, any::<bool>()).prop_map(|(number, root)| News::Unconfirmed { number, root }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn whatever_a_book_is_told_its_routes_make_sense(
        script in prop::collection::vec(news(), 1..200),
        underlay_mtu in prop_oneof![Just(1500u16), any::<u16>()],
    ) {
        let mut now = Instant::now();
        let root: RootId = Root::new(&[1; 32], Role::Dialler, now).id();
        let mut book = Book::new(Config {
            own: node(0), underlay: "10.0.0.9".parse().unwrap(), underlay_mtu, sockets: 4, relay: true,
        });
        let mut peers = BTreeMap::new();
        let mut latest = BTreeMap::new();
        for event in script {
            match event {
                News::Pass(ms) => now += Duration::from_millis(ms.into()),
                News::Peers { number, lanes, relay, busy } => {
                    let address = ([10, 0, 0, number], 6791).into();
                    let candidate = Candidate { address, lanes, relay, busy };
                    if peers.insert(node(number), candidate).is_some_and(|before| before == candidate) {
                        peers.remove(&node(number));
                    }
                    book.set_peers(now, &peers);
                }
                News::Heard { number, via } => book.heard(now, node(number), via),
                News::Replied { number, id } => { book.replied(now, node(number), id); }
                News::Latest { number } => if let Some(&id) = latest.get(&node(number)) {
                    book.replied(now, node(number), id);
                },
                News::Unreachable { number, via } => book.unreachable(now, node(number), via),
                News::TooBig { number, size } => book.too_big(now, node(number), size),
                News::CannotRelay { number, relay } => book.cannot_relay(now, node(number), node(relay)),
                News::Unconfirmed { number, root: some } => {
                    let roots = some.then_some(root).into_iter().collect();
                    book.unconfirmed(now, node(number), &roots);
                }
            }
            book.tick(now);
            prop_assert!(book.deadline().is_none_or(|deadline| deadline > now));
            for action in book.actions() {
                match action {
                    Action::Probe { peer, id, size, .. } => {
                        latest.insert(peer, id);
                        prop_assert!(size >= SMALL || underlay_mtu < 200);
                    }
                    Action::Route { peer, route: Some(route) } => {
                        prop_assert_ne!(peer, node(0));
                        prop_assert_eq!(route.ways.is_empty(), route.relay.is_some());
                        prop_assert_eq!(route.kind == Kind::Relay, route.relay.is_some());
                        prop_assert!(route.relay != Some(peer));
                    }
                    Action::Route { route: None, .. } => {}
                }
            }
            for number in 1..4 {
                let listed = peers.contains_key(&node(number));
                prop_assert!(listed || book.route(node(number)).is_none());
            }
        }
    }
}
