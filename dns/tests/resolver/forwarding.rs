use std::{collections::BTreeSet, time::Duration};

use domain::base::{Message, Rtype, iana::Rcode};
use weft_dns::{Config, UpstreamLimits};

use crate::{lab::*, service::*};

/// Limits under which a test that waits for a timeout is quick.
fn hasty() -> Config {
    let upstream = UpstreamLimits {
        attempt: Duration::from_secs(1),
        deadline: Duration::from_secs(30),
        ..UpstreamLimits::default()
    };
    Config { upstream, ..Config::default() }
}

#[tokio::test]
async fn a_foreign_name_is_answered_by_the_upstream_server() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![stub.address]);
    let packet = query("wWw.Example.com", Rtype::A);

    // A server that does not keep the spelling of the name.
    let lower = |query: &[u8]| {
        let mut query = query.to_vec();
        query[12..].make_ascii_lowercase();
        reply(&query, Rcode::NOERROR)
    };
    let (got, sent) = tokio::join!(bench.ask_udp(&packet), stub.serve_udp(lower));
    assert_eq!(line_of(&got), "192.0.2.1");
    assert_eq!(got[..2], packet[..2]);
    assert_eq!(got[12..packet.len()], packet[12..]);
    assert_eq!(sent[2..], packet[2..]);

    let nxdomain = |query: &[u8]| reply(query, Rcode::NXDOMAIN);
    let (got, _) = tokio::join!(bench.ask_udp(&packet), stub.serve_udp(nxdomain));
    assert_eq!(line_of(&got), "NXDOMAIN");

    let snapshot = bench.server.counters().snapshot();
    assert_eq!(bench.counts().forwarded, 2);
    assert_eq!((snapshot.upstream.queries, snapshot.upstream.replies), (2, 2));
}

#[tokio::test]
async fn nobody_upstream_denies_a_name_that_may_be_ours() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![stub.address]);
    let nxdomain = |query: &[u8]| reply(query, Rcode::NXDOMAIN);
    for (incomplete, name, denied) in
        [(true, "new", "SERVFAIL"), (true, "example.com", "NXDOMAIN"), (false, "new", "NXDOMAIN")]
    {
        let mut directory = directory();
        directory.incomplete = incomplete;
        bench.directory.send_replace(std::sync::Arc::new(directory));
        let packet = query(name, Rtype::A);
        let (got, _) = tokio::join!(bench.ask_udp(&packet), stub.serve_udp(nxdomain));
        assert_eq!(line_of(&got), denied, "{name}");
        let known = |query: &[u8]| reply(query, Rcode::NOERROR);
        let (got, _) = tokio::join!(bench.ask_udp(&packet), stub.serve_udp(known));
        assert_eq!(line_of(&got), "192.0.2.1", "{name}");
    }
}

#[tokio::test]
async fn every_query_has_a_random_id_and_port() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![stub.address]);
    let packet = query("example.com", Rtype::A);
    let (mut ids, mut ports) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..32 {
        let serve = async {
            let (sent, from) = stub.next_udp().await;
            ids.insert([sent[0], sent[1]]);
            ports.insert(from.port());
            stub.reply_udp(&reply(&sent, Rcode::NOERROR), from).await;
        };
        tokio::join!(bench.ask_udp(&packet), serve);
    }
    // Chance makes some alike now and then, but not this many of 32.
    assert!(ids.len() > 29 && ports.len() > 24, "{ids:?} {ports:?}");
}

#[tokio::test]
async fn only_the_reply_to_what_was_asked_is_taken() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![stub.address]);
    let serve = async {
        let (sent, from) = stub.next_udp().await;
        let mut wrong_id = reply_with(&sent, Rcode::NOERROR, 2);
        wrong_id[0] ^= 1;
        let other_name = reply_with(&query("example.org", Rtype::A), Rcode::NOERROR, 2);
        let other_name = [&sent[..2], &other_name[2..]].concat();
        let no_question = [&sent[..2], &[0x81, 0x80, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
        for wrong in [wrong_id, other_name, no_question, sent.clone(), vec![0; 5]] {
            stub.reply_udp(&wrong, from).await;
        }
        // The right one, from a socket that was not asked.
        let stranger = Stub::start();
        stranger.reply_udp(&reply_with(&sent, Rcode::NOERROR, 2), from).await;
        stub.reply_udp(&reply(&sent, Rcode::NOERROR), from).await;
    };
    let packet = query("example.com", Rtype::A);
    let (got, ()) = tokio::join!(bench.ask_udp(&packet), serve);
    assert_eq!(line_of(&got), "192.0.2.1");
    assert_eq!(bench.server.counters().snapshot().upstream.mismatches, 5);
}

#[tokio::test]
async fn a_server_that_fails_or_is_silent_is_passed_over() {
    let (failing, silent, good) = (Stub::start(), Stub::start(), Stub::start());
    let closed = {
        let (udp, _tcp) = socket_pair();
        udp.local_addr().unwrap()
    };
    let servers = vec![failing.address, closed, silent.address, good.address];
    let upstream = UpstreamLimits { attempt: Duration::from_secs(2), ..UpstreamLimits::default() };
    let bench = Bench::start(Config { upstream, ..Config::default() }, servers);
    let packet = query("example.com", Rtype::A);
    let (got, _, _, _) = tokio::join!(
        bench.ask_udp(&packet),
        failing.serve_udp(|query| reply(query, Rcode::SERVFAIL)),
        silent.next_udp(),
        good.serve_udp(|query| reply(query, Rcode::NOERROR)),
    );
    assert_eq!(line_of(&got), "192.0.2.1");
    let upstream = bench.server.counters().snapshot().upstream;
    assert_eq!((upstream.replies, upstream.errors, upstream.timeouts), (2, 1, 1), "{upstream:?}");
}

#[tokio::test]
async fn a_server_that_was_silent_delays_one_query_and_not_the_next() {
    let (silent, good) = (Stub::start(), Stub::start());
    let bench = Bench::start(hasty(), vec![silent.address, good.address]);
    let packet = query("example.com", Rtype::A);
    for _ in 0..3 {
        let (got, _) = tokio::join!(
            bench.ask_udp(&packet),
            good.serve_udp(|query| reply(query, Rcode::NOERROR)),
        );
        assert_eq!(line_of(&got), "192.0.2.1");
    }
    assert_eq!(bench.server.counters().snapshot().upstream.timeouts, 1);

    // It is still asked if the others say nothing.
    let (got, _, _) = tokio::join!(bench.ask_udp(&packet), good.next_udp(), async {
        silent.next_udp().await;
        silent.serve_udp(|query| reply(query, Rcode::NOERROR)).await
    },);
    assert_eq!(line_of(&got), "192.0.2.1");
}

#[tokio::test]
async fn if_all_servers_fail_the_client_gets_the_first_ones_reply() {
    let (first, second) = (Stub::start(), Stub::start());
    let bench = Bench::start(Config::default(), vec![first.address, second.address]);
    let packet = query("example.com", Rtype::A);
    let (got, _, _) = tokio::join!(
        bench.ask_udp(&packet),
        first.serve_udp(|query| reply(query, Rcode::REFUSED)),
        second.serve_udp(|query| reply(query, Rcode::SERVFAIL)),
    );
    assert_eq!(line_of(&got), "REFUSED");
}

#[tokio::test]
async fn a_query_that_nobody_answers_fails_after_two_rounds() {
    let stub = Stub::start();
    let bench = Bench::start(hasty(), vec![stub.address]);
    let got = bench.ask_udp(&query_with_edns("example.com", Rtype::A, 1232, 0)).await;
    assert_eq!(line_of(&got), "SERVFAIL");
    assert!(Message::from_slice(&got).unwrap().opt().is_some());
    assert_eq!(bench.counts().failed, 1);
    // Two rounds, each with a query of its own.
    assert_eq!(bench.server.counters().snapshot().upstream.timeouts, 2);
    let sent = [stub.next_udp().await.0, stub.next_udp().await.0];
    assert_eq!(sent[0][2..], sent[1][2..]);
}

#[tokio::test]
async fn no_query_takes_longer_than_the_deadline() {
    let stub = Stub::start();
    let upstream = UpstreamLimits {
        attempt: PATIENCE,
        deadline: Duration::from_millis(500),
        ..UpstreamLimits::default()
    };
    let bench = Bench::start(Config { upstream, ..Config::default() }, vec![stub.address; 3]);
    let got = bench.ask_udp(&query("example.com", Rtype::A)).await;
    assert_eq!(line_of(&got), "SERVFAIL");
    assert_eq!(bench.server.counters().snapshot().upstream.timeouts, 1);
}

#[tokio::test]
async fn without_a_server_a_foreign_name_fails_until_one_is_known() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![]);
    let packet = query("example.com", Rtype::A);
    assert_eq!(line_of(&bench.ask_udp(&packet).await), "SERVFAIL");
    assert_eq!(bench.server.counters().snapshot().upstream.without_server, 1);

    bench.upstream.send_replace(vec![stub.address]);
    let (got, _) =
        tokio::join!(bench.ask_udp(&packet), stub.serve_udp(|query| reply(query, Rcode::NOERROR)),);
    assert_eq!(line_of(&got), "192.0.2.1");
}

#[tokio::test]
async fn beyond_its_share_an_asker_gets_servfail_at_once() {
    let stub = Stub::start();
    let upstream = UpstreamLimits { per_asker: 2, ..UpstreamLimits::default() };
    let bench = Bench::start(Config { upstream, ..Config::default() }, vec![stub.address]);
    let packet = query("example.com", Rtype::A);

    let beyond = async {
        let held = [stub.next_udp().await, stub.next_udp().await];
        let got = bench.ask_udp(&packet).await;
        assert_eq!(line_of(&got), "SERVFAIL");
        // Our own names need no place.
        assert_eq!(line_of(&bench.ask_udp(&query("web1", Rtype::A)).await), "10.32.0.2");
        for (sent, from) in held {
            stub.reply_udp(&reply(&sent, Rcode::NOERROR), from).await;
        }
    };
    let (first, second, ()) = tokio::join!(bench.ask_udp(&packet), bench.ask_udp(&packet), beyond);
    assert_eq!([line_of(&first), line_of(&second)], ["192.0.2.1", "192.0.2.1"]);
    assert_eq!(bench.server.counters().snapshot().upstream.over_limit, 1);

    let (got, _) =
        tokio::join!(bench.ask_udp(&packet), stub.serve_udp(|query| reply(query, Rcode::NOERROR)),);
    assert_eq!(line_of(&got), "192.0.2.1", "the places are free again");
}

#[tokio::test]
async fn a_tcp_client_is_served_by_tcp_and_without_truncation() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![stub.address]);
    let packet = query("example.com", Rtype::A);
    let (got, sent) = tokio::join!(
        bench.ask_tcp(&packet),
        stub.serve_tcp(|query| reply_with(query, Rcode::NOERROR, 200)),
    );
    assert_eq!(records(&got).len(), 200);
    assert_eq!(sent[2..], packet[2..]);
}

#[tokio::test]
async fn a_reply_too_large_for_a_udp_client_tells_it_to_come_by_tcp() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![stub.address]);
    let packet = query("example.com", Rtype::A);

    // A server that sends more than it may, and one that says so itself.
    let oversized = |query: &[u8]| reply_with(query, Rcode::NOERROR, 100);
    let honest = |query: &[u8]| {
        let mut reply = reply_with(query, Rcode::NOERROR, 3);
        reply[2] |= 0x02;
        reply
    };
    let (got, _) = tokio::join!(bench.ask_udp(&packet), stub.serve_udp(oversized));
    assert!(Message::from_slice(&got).unwrap().header().tc());
    assert!(records(&got).is_empty());
    let (got, _) = tokio::join!(bench.ask_udp(&packet), stub.serve_udp(honest));
    assert!(Message::from_slice(&got).unwrap().header().tc());
    assert_eq!(records(&got).len(), 3);
    assert_eq!(bench.counts().truncated, 2);
}
