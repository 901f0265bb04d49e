use weft_seal::PathStatus;

use crate::{
    lab::{Lab, Options, inner_v4, node},
    stream,
};

#[test]
fn two_hosts_that_do_not_reach_each_other_are_relayed() {
    let lab = Lab::new(Options { hosts: 3, ..Options::default() });
    let [one, two, three] = [lab.host(1), lab.host(2), lab.host(3)];
    one.reaches(2);

    for (host, other) in [(one, 2), (two, 1)] {
        host.namespace.nft(&format!(
            "table inet cut {{\n chain in {{\n type filter hook input priority 0\n ip saddr 192.0.2.{other} drop\n }}\n }}"
        ));
    }
    for (host, other) in [(one, 2), (two, 1)] {
        let status = host.until(other, |status| matches!(status.path, PathStatus::Relay { .. }));
        assert_eq!(status.path, PathStatus::Relay { via: node(3) });
    }
    one.reaches(2);
    stream::tcp(&one.container, &two.container, &inner_v4(2), 2 << 20);
    // The relay opens nothing of it.
    let relay = three.counters();
    assert!(relay.tunnel.opened_packets > 1000, "{relay:#?}");
    assert!(relay.networks.values().all(|t| t.opened_bytes < 1 << 20), "{relay:#?}");

    for host in [one, two] {
        host.namespace.nft("delete table inet cut");
    }
    one.until(2, |status| matches!(status.path, PathStatus::Direct(_)));
    one.reaches(2);
}

#[test]
fn a_detour_brings_datagrams_between_hosts_without_a_session() {
    let mut lab = Lab::strangers(Options { hosts: 3, ..Options::default() });
    lab.acquaint();
    for (one, other) in [(1, 2), (2, 1)] {
        let host = lab.host(one);
        let mut members = (**host.members.borrow()).clone();
        members.peers.get_mut(&node(other)).unwrap().roots.clear();
        host.members.send_replace(members.into());
    }
    for number in [1, 2] {
        lab.host(number).until(3, |status| status.confirmed && status.fault.is_none());
        lab.host(3).until(number, |status| status.confirmed && status.fault.is_none());
    }
    let (from, mut to) =
        (lab.host(1).tunnel.detour().unwrap(), lab.host(2).tunnel.detour().unwrap());
    assert!(lab.host(1).tunnel.detour().is_none());

    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let received = runtime.block_on(async {
        for _ in 0..50 {
            from.send(node(2), (&b"hello"[..]).into()).unwrap();
            let wait = tokio::time::timeout(std::time::Duration::from_millis(200), to.recv());
            if let Ok(received) = wait.await {
                return received;
            }
        }
        None
    });
    assert_eq!(received, Some((node(1), (&b"hello"[..]).into())));
}

#[test]
fn a_host_behind_a_nat_is_reached_where_its_packets_come_from() {
    let lab = Lab::new(Options { nat: true, ..Options::default() });
    let [one, two] = [lab.host(1), lab.host(2)];
    one.reaches(2);
    two.reaches(1);
    let status = two.until(1, |status| matches!(status.path, PathStatus::Observed(_)));
    assert!(matches!(status.path, PathStatus::Observed(at) if at.ip() == lab.address(99)));
    stream::tcp(&two.container, &one.container, &inner_v4(1), 4 << 20);
    stream::tcp(&one.container, &two.container, &inner_v4(2), 4 << 20);
}
