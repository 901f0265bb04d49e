use std::{collections::BTreeSet, sync::Arc, time::Duration};

use domain::base::{Message, Rtype, iana::Rcode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use weft_dns::{Config, Fallback, ListenError, TcpLimits, UpstreamLimits};

use crate::{lab::*, service::*};

#[tokio::test]
async fn a_name_is_answered_by_udp_and_by_tcp_and_counted() {
    let bench = Bench::start(Config::default(), vec![]);
    for (name, expected) in [
        ("web1", "10.32.0.2"),
        ("nope.app", "NXDOMAIN app"),
        ("weft.internal", "NODATA weft.internal"),
    ] {
        let packet = query(name, Rtype::A);
        assert_eq!(line_of(&bench.ask_udp(&packet).await), expected);
        assert_eq!(line_of(&bench.ask_tcp(&packet).await), expected);
    }
    let refused = bench.ask_udp(&query("weft.internal", Rtype::AXFR)).await;
    assert_eq!(line_of(&refused), "REFUSED");

    let counts = bench.counts();
    let seen = (counts.answered, counts.nxdomain, counts.nodata, counts.refused);
    assert_eq!(seen, (2, 2, 2, 1), "{counts:?}");
}

#[tokio::test]
async fn a_changed_directory_holds_for_the_next_query() {
    let bench = Bench::start(Config::default(), vec![]);
    let packet = query("later.app", Rtype::A);
    assert_eq!(line_of(&bench.ask_udp(&packet).await), "NXDOMAIN app");

    bench.directory.send_modify(|directory| {
        let later = weft_dns::Entry::member(&endpoint(0x61, "later", &["10.32.0.61"]));
        let app = names("app", false, &["10.32.0.0/24"], vec![later]);
        Arc::make_mut(directory).networks.insert(network(APP), app);
    });
    assert_eq!(line_of(&bench.ask_udp(&packet).await), "10.32.0.61");
}

#[tokio::test]
async fn a_client_that_was_told_to_come_by_tcp_gets_everything_there() {
    let bench = Bench::start(Config::default(), vec![]);
    bench.directory.send_modify(|directory| {
        let backend = |last| weft_dns::Entry {
            names: vec!["web".parse().unwrap()],
            addresses: vec![ip(&format!("10.32.0.{last}"))],
        };
        let app = names("app", false, &["10.32.0.0/24"], (2..102).map(backend).collect());
        Arc::make_mut(directory).networks.insert(network(APP), app);
    });
    let packet = query("web", Rtype::A);
    let by_udp = bench.ask_udp(&packet).await;
    assert!(Message::from_slice(&by_udp).unwrap().header().tc());

    let by_tcp = records(&bench.ask_tcp(&packet).await);
    assert_eq!(by_tcp.into_iter().collect::<BTreeSet<_>>().len(), 100);
    assert_eq!(bench.counts().truncated, 1);
}

#[tokio::test]
async fn many_queries_on_one_connection_are_answered_even_in_pieces() {
    let bench = Bench::start(Config::default(), vec![]);
    let mut stream = bench.connect().await;
    let packet = query("web1", Rtype::A);
    let frame = [(packet.len() as u16).to_be_bytes().as_slice(), &packet].concat();
    let stream_of_bytes = frame.repeat(50);
    // Pieces that end in the length, in the header and across messages.
    for piece in stream_of_bytes.chunks(frame.len() + 1) {
        stream.write_all(piece).await.unwrap();
        stream.flush().await.unwrap();
    }
    stream.shutdown().await.unwrap();
    for _ in 0..50 {
        assert_eq!(line_of(&read_frame(&mut stream).await.unwrap()), "10.32.0.2");
    }
    assert_eq!(read_frame(&mut stream).await, None, "closed when all is answered");
}

#[tokio::test]
async fn a_slow_upstream_does_not_hold_up_the_other_queries_of_a_connection() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![stub.address]);
    let mut stream = bench.connect().await;
    write_frame(&mut stream, &query("example.com", Rtype::A)).await;
    write_frame(&mut stream, &query("web1", Rtype::A)).await;
    assert_eq!(line_of(&read_frame(&mut stream).await.unwrap()), "10.32.0.2");

    stream.shutdown().await.unwrap();
    stub.serve_tcp(|query| reply(query, Rcode::NOERROR)).await;
    assert_eq!(line_of(&read_frame(&mut stream).await.unwrap()), "192.0.2.1");
}

#[tokio::test]
async fn a_connection_without_a_whole_query_is_closed_however_many_bytes_drip() {
    let idle = Duration::from_millis(100);
    let tcp = TcpLimits { idle, ..TcpLimits::default() };
    let bench = Bench::start(Config { tcp, ..Config::default() }, vec![]);

    let mut silent = bench.connect().await;
    assert_eq!(read_frame(&mut silent).await, None);

    let (mut read, mut write) = bench.connect().await.into_split();
    let mut closed = [0; 1];
    let mut drip = tokio::time::interval(idle / 10);
    let ended = within(async {
        loop {
            tokio::select! {
                end = read.read(&mut closed) => return end,
                // A length of 64 KiB, and then as slowly as can be.
                _ = drip.tick() => drop(write.write_all(&[0xff]).await),
            }
        }
    });
    assert!(matches!(ended.await, Ok(0) | Err(_)));
}

#[tokio::test]
async fn a_connection_stays_while_an_answer_is_awaited_from_upstream() {
    let (silent, good) = (Stub::start(), Stub::start());
    let config = Config {
        tcp: TcpLimits { idle: Duration::from_millis(50), ..TcpLimits::default() },
        upstream: UpstreamLimits { attempt: Duration::from_secs(2), ..UpstreamLimits::default() },
        ..Config::default()
    };
    let bench = Bench::start(config, vec![silent.address, good.address]);
    let packet = query("example.com", Rtype::A);
    let (got, _) =
        tokio::join!(bench.ask_tcp(&packet), good.serve_tcp(|query| reply(query, Rcode::NOERROR)),);
    assert_eq!(line_of(&got), "192.0.2.1");
    assert_eq!(bench.server.counters().snapshot().upstream.timeouts, 1);
}

#[tokio::test]
async fn an_asker_has_so_many_connections_and_no_more() {
    let tcp = TcpLimits { per_asker: 2, ..TcpLimits::default() };
    let bench = Bench::start(Config { tcp, ..Config::default() }, vec![]);
    let packet = query("web1", Rtype::A);

    let mut held = [bench.connect().await, bench.connect().await];
    for stream in &mut held {
        write_frame(stream, &packet).await;
        assert!(read_frame(stream).await.is_some());
    }
    let mut beyond = bench.connect().await;
    assert_eq!(read_frame(&mut beyond).await, None);
    assert_eq!(bench.counts().connections_refused, 1);
    // Other queries are served all the same.
    assert_eq!(line_of(&bench.ask_udp(&packet).await), "10.32.0.2");

    drop(held);
    within(async {
        loop {
            let mut stream = bench.connect().await;
            let len = u16::try_from(packet.len()).unwrap().to_be_bytes();
            let sent = stream.write_all(&[len.as_slice(), &packet].concat()).await;
            if sent.is_ok() && read_frame(&mut stream).await.is_some() {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_no_query_gets_no_answer_and_is_counted() {
    let bench = Bench::start(Config::default(), vec![]);
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&[1, 2, 3], bench.address).await.unwrap();
    let mut response = query("web1", Rtype::A);
    response[2] |= 0x80;
    socket.send_to(&response, bench.address).await.unwrap();
    bench.counted(|counts| counts.dropped == 2).await;

    let mut stream = bench.connect().await;
    write_frame(&mut stream, &[0; 3]).await;
    assert_eq!(read_frame(&mut stream).await, None);
}

#[tokio::test]
async fn a_network_that_is_no_longer_served_has_no_socket_left() {
    let mut bench = Bench::start(Config::default(), vec![]);
    let (udp, tcp) = socket_pair();
    let other = bench.server.listen(network(BACK), udp, tcp).unwrap();
    assert_eq!(bench.server.listening().count(), 2);
    let mut stream = bench.connect().await;

    within(bench.server.unlisten(network(APP))).await;
    assert_eq!(read_frame(&mut stream).await, None);
    let udp = std::net::UdpSocket::bind(bench.address).unwrap();
    assert!(!bench.server.counters().snapshot().networks.contains_key(&network(APP)));

    let still = within(ask_udp(other, &query("cache", Rtype::A))).await;
    assert_eq!(line_of(&still), "10.33.0.5");

    // The same address serves again.
    let tcp = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    tcp.set_reuse_address(true).unwrap();
    tcp.bind(&bench.address.into()).unwrap();
    tcp.listen(16).unwrap();
    bench.server.listen(network(APP), udp, tcp.into()).unwrap();
    assert_eq!(line_of(&bench.ask_udp(&query("web1", Rtype::A)).await), "10.32.0.2");
}

#[tokio::test]
async fn in_a_sandbox_the_source_address_does_not_matter() {
    let mut bench = Bench::start(Config::default(), vec![]);
    let packet = query("db", Rtype::A);
    assert_eq!(line_of(&bench.ask_udp(&packet).await), "10.32.0.9");

    let [both, one] = ["10.32.0.2", "10.32.0.3"].map(|address| {
        let (udp, tcp) = socket_pair();
        bench.server.listen_in_sandbox(network(APP), ip(address), None, udp, tcp).unwrap()
    });
    assert_eq!(line_of(&within(ask_udp(both, &packet)).await), "10.32.0.9 10.33.0.9");
    assert_eq!(line_of(&within(ask_udp(one, &packet)).await), "10.32.0.9");

    within(bench.server.unlisten_in_sandbox(network(APP), ip("10.32.0.2"))).await;
    drop(std::net::UdpSocket::bind(both).unwrap());
    assert_eq!(line_of(&within(ask_udp(one, &packet)).await), "10.32.0.9");
    assert_eq!(line_of(&bench.ask_udp(&packet).await), "10.32.0.9");
}

#[tokio::test]
async fn a_sandbox_with_a_resolver_of_its_own_asks_that_one_even_in_an_internal_network() {
    let (host, own) = (Stub::start(), Stub::start());
    let mut bench = Bench::start(Config::default(), vec![host.address]);
    let to = own.address;
    let fallback = Fallback {
        udp: Arc::new(move || {
            Box::pin(async move {
                let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
                socket.connect(to)?;
                Ok(socket)
            })
        }),
        tcp: Arc::new(move || Box::pin(async move { std::net::TcpStream::connect(to) })),
    };
    let (udp, tcp) = socket_pair();
    let server = &mut bench.server;
    let sandbox = server
        .listen_in_sandbox(network(VAULT), ip("10.34.0.2"), Some(fallback), udp, tcp)
        .unwrap();

    assert_eq!(line_of(&within(ask_udp(sandbox, &query("safe", Rtype::A))).await), "10.34.0.2");
    let packet = query("example.com", Rtype::A);
    let answer = |query: &[u8]| reply(query, Rcode::NOERROR);
    let (got, _) = tokio::join!(within(ask_udp(sandbox, &packet)), own.serve_udp(answer));
    assert_eq!(line_of(&got), "192.0.2.1");
    let by_tcp = async {
        let mut stream = within(TcpStream::connect(sandbox)).await.unwrap();
        write_frame(&mut stream, &packet).await;
        read_frame(&mut stream).await.expect("an answer")
    };
    let (got, _) = tokio::join!(by_tcp, own.serve_tcp(answer));
    assert_eq!(line_of(&got), "192.0.2.1");
}

#[tokio::test]
async fn an_address_is_served_once() {
    let mut bench = Bench::start(Config::default(), vec![]);
    let (udp, tcp) = socket_pair();
    let twin = (udp.try_clone().unwrap(), tcp.try_clone().unwrap());
    bench.server.listen(network(APP), udp, tcp).unwrap();
    let again = bench.server.listen(network(APP), twin.0, twin.1);
    assert!(matches!(again, Err(ListenError::Served { .. })), "{again:?}");
}

#[tokio::test]
async fn all_tasks_end_with_the_server() {
    let stub = Stub::start();
    let bench = Bench::start(Config::default(), vec![stub.address]);
    let mut stream = bench.connect().await;
    write_frame(&mut stream, &query("example.com", Rtype::A)).await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&query("example.org", Rtype::A), bench.address).await.unwrap();
    stub.next_udp().await;

    bench.cancel.cancel();
    bench.tracker.close();
    within(bench.tracker.wait()).await;
    assert_eq!(read_frame(&mut stream).await, None);
}
