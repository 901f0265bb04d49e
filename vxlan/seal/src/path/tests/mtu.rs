use std::time::Duration;

use super::super::{Kind, relay_overhead};
use super::world::{World, node};

const SECOND: Duration = Duration::from_secs(1);

fn pair(underlay: u16, carried: u16) -> World {
    let mut world = World::new();
    world.add(1, 2, underlay, false);
    world.add(2, 2, underlay, false);
    world.mtu = carried;
    world.meet(true);
    world
}

#[test]
fn the_mtu_of_a_path_is_found_while_its_routes_are_in_use() {
    for (underlay, carried) in [(1500, 1500), (9000, 9000), (9000, 1500), (1500, 1420)] {
        let mut world = pair(underlay, carried);
        world
            .wait(15 * SECOND, |world| world.route(1, 2).is_some_and(|r| r.packet + 28 == carried));
        world.run(60 * SECOND);
        assert_eq!(world.route(1, 2).unwrap().packet + 28, carried);
        assert!(world.route(1, 2).unwrap().up);
    }
}

#[test]
fn a_path_that_narrows_is_noticed_and_one_that_widens_is_used_again() {
    let mut world = pair(1500, 1500);
    world.run(10 * SECOND);
    world.routes.clear();
    world.mtu = 1400;
    world.wait(20 * SECOND, |world| world.route(1, 2).unwrap().packet == 1372);
    world.mtu = 1500;
    world.wait(620 * SECOND, |world| world.route(1, 2).unwrap().packet == 1472);
    let down = world.routes.iter().any(|(.., route)| route.as_ref().is_none_or(|r| !r.up));
    assert!(!down, "{:#?}", world.routes);
}

#[test]
fn a_packet_that_this_host_cannot_send_lowers_the_size_at_once() {
    let mut world = pair(9000, 9000);
    world.run(10 * SECOND);
    world.mtu = 1500;
    world.tell(1, |book, now| book.too_big(now, node(2), 8972));
    assert!(world.route(1, 2).unwrap().packet < 8972);
    world.wait(15 * SECOND, |world| world.route(1, 2).unwrap().packet == 1472);
}

#[test]
fn a_relayed_path_is_measured_end_to_end() {
    let mut world = World::new();
    world.add(1, 1, 9000, false);
    world.add(2, 1, 1500, false);
    world.add(3, 1, 9000, true);
    world.cut(1, 2);
    world.mtu = 1500;
    world.meet(true);
    let relayed = 1472 - relay_overhead();
    world.wait(30 * SECOND, |world| {
        world.route(1, 2).is_some_and(|r| r.kind == Kind::Relay && r.packet == relayed)
    });
    world.run(60 * SECOND);
    assert_eq!(world.route(1, 2).unwrap().packet, relayed);
}
