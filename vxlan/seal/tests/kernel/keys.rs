use std::{sync::Arc, thread, time::Duration};

use weft_model::Suite;
use weft_seal::{DropReason, key::Limits};

use crate::{
    lab::{Lab, Options, inner_v4, node, root},
    stream,
};

#[test]
fn a_rekey_every_megabyte_loses_nothing_and_changes_nothing() {
    let limits = Limits { bytes: 1 << 20, ..Limits::default() };
    let lab = Lab::new(Options { limits, ..Options::default() });
    let [one, two] = [lab.host(1), lab.host(2)];
    // What containers said before there was a session counts as well.
    let before = [one, two].map(|host| host.counters().total);
    stream::tcp(&one.container, &two.container, &inner_v4(2), 256 << 20);

    let rekeys = one.counters().rekeys;
    assert!(rekeys >= 256, "{rekeys}");
    for (host, before) in [one, two].into_iter().zip(before) {
        let after = host.counters().total;
        for reason in [DropReason::Epoch, DropReason::Auth, DropReason::NoKey, DropReason::Replay] {
            assert_eq!(after.dropped(reason), before.dropped(reason), "{reason}: {after:#?}");
        }
    }
}

#[test]
fn every_suite_carries() {
    use Suite::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
    for suites in [
        [Aes256Gcm, Aes128Gcm, Chacha20Poly1305],
        // Whoever likes ChaCha20 best has no AES instructions.
        [Chacha20Poly1305, Aes256Gcm, Aes128Gcm],
    ] {
        let lab = Lab::new(Options { suites, ..Options::default() });
        let [one, two] = [lab.host(1), lab.host(2)];
        assert_eq!(one.status(2).unwrap().suite, Some(suites[0]));
        stream::tcp(&one.container, &two.container, &inner_v4(2), 8 << 20);
    }
}

#[test]
fn new_sessions_take_over_while_a_stream_goes_on() {
    let mut lab = Lab::new(Options::default());
    let before = lab.host(1).members.borrow().peers[&node(2)].roots[0].id();
    for _ in 0..3 {
        let [one, two] = [lab.host(1), lab.host(2)];
        thread::scope(|scope| {
            let stream = scope.spawn(|| {
                stream::tcp(&one.container, &two.container, &inner_v4(2), 64 << 20);
            });
            one.reaches(2);
            stream.join().unwrap();
        });
        lab.acquaint();
        lab.until_confirmed();
    }
    // The older ones are withdrawn: the newest one carries alone.
    for host in lab.hosts.values() {
        let mut members = (**host.members.borrow()).clone();
        for peer in members.peers.values_mut() {
            peer.roots.drain(..peer.roots.len() - 1);
        }
        host.members.send_replace(Arc::new(members));
    }
    assert_ne!(lab.host(1).members.borrow().peers[&node(2)].roots[0].id(), before);
    let [one, two] = [lab.host(1), lab.host(2)];
    one.reaches(2);
    stream::tcp(&two.container, &one.container, &inner_v4(1), 16 << 20);
    assert_eq!(one.counters().total.dropped(DropReason::Auth), 0);
}

#[test]
fn a_session_that_expires_stops_carrying_and_says_so() {
    let lab = Lab::strangers(Options::default());
    let life = Duration::from_secs(6);
    for (one, other) in [(1, 2), (2, 1)] {
        let host = lab.host(one);
        let mut members = weft_seal::Members::default();
        let mut peer = lab.peer(one, other);
        peer.roots.push(root(one, other, 9, life));
        members.peers.insert(node(other), peer);
        host.members.send_replace(Arc::new(members));
    }
    lab.until_confirmed();
    lab.host(1).reaches(2);

    let status = lab.host(1).until(2, |status| !status.confirmed);
    assert!(status.fault.as_ref().unwrap().contains("expired"), "{status:?}");
    assert!(!lab.host(1).container.pings(&inner_v4(2), 56));
    let counters = lab.host(1).counters();
    assert!(counters.total.dropped(DropReason::Expired) > 0, "{counters:#?}");
}
