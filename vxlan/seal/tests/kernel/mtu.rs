use std::time::Duration;

use crate::{
    lab::{Lab, Options, Underlay, eventually, inner_v4, inner_v6},
    stream,
};

/// Data of an echo request that makes an IPv4 packet of as many bytes.
fn data(mtu: usize) -> usize {
    mtu - 28
}

#[test]
fn a_narrower_path_is_found_and_containers_are_told() {
    let lab = Lab::new(Options::default());
    let [one, two] = [lab.host(1), lab.host(2)];
    assert!(one.container.pings(&inner_v4(2), data(1398)));

    for host in [one, two] {
        host.namespace.ip("link set eth0 mtu 1400");
    }
    // Somebody has to send what does not fit for the change to be noticed at once.
    let told = eventually(Duration::from_secs(30), || {
        let output = one.container.ping(&inner_v4(2), data(1398));
        let text = format!("{output:?}");
        (text.contains("Frag needed") || text.contains("too long")).then_some(text)
    });
    assert!(told.is_some(), "{:#?}", one.status(2));
    one.until(2, |status| status.path_mtu == Some(1400));
    assert!(one.container.pings(&inner_v4(2), data(1400 - 82)));
    stream::tcp(&one.container, &two.container, &inner_v4(2), 4 << 20);
    stream::tcp(&one.container, &two.container, &inner_v6(2), 4 << 20);
    // What may be fragmented is.
    stream::udp(&one.container, &two.container, &inner_v4(2), &[1370, 3000]);
}

#[test]
fn a_stream_survives_a_path_that_becomes_narrower() {
    for underlay in [Underlay::V4, Underlay::V6] {
        let lab = Lab::new(Options { underlay, ..Options::default() });
        let [one, two] = [lab.host(1), lab.host(2)];
        std::thread::scope(|scope| {
            let stream = scope.spawn(|| {
                stream::tcp(&one.container, &two.container, &inner_v4(2), 64 << 20);
            });
            one.until_counted(|counters| counters.total.sealed_bytes > 4 << 20);
            for host in [one, two] {
                host.namespace.ip("link set eth0 mtu 1380");
            }
            stream.join().unwrap();
        });
    }
}
