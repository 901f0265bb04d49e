use std::time::Duration;

use tokio::net::UdpSocket;
use weft_gossip::{identity::PublicKey, quic::FailureReason};

use crate::{cluster::Cluster, stranger::Stranger};

fn key() -> rcgen::KeyPair {
    rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap()
}

fn public(key: &rcgen::KeyPair) -> PublicKey {
    PublicKey::from(<[u8; 32]>::try_from(key.public_key_raw()).unwrap())
}

#[tokio::test]
async fn whoever_has_no_certificate_of_the_cluster_gets_no_connection() {
    let cluster = Cluster::start();
    let own = cluster.issuer.identity.cluster();
    let key = key();
    let node = public(&key).node_id();
    let cases = [
        (format!("spiffe://{own}/node/{node}"), "weft/1", FailureReason::WrongAuthority),
        (format!("spiffe://{own}/node/{}", "0".repeat(32)), "weft/1", FailureReason::Certificate),
        (format!("spiffe://{}/node/{node}", "0".repeat(32)), "weft/1", FailureReason::WrongCluster),
        ("https://example.org/".to_owned(), "weft/1", FailureReason::Certificate),
        (
            format!("weft-join://{}/{}", "0".repeat(16), "0".repeat(64)),
            "weft-join/1",
            FailureReason::TokenUnknown,
        ),
    ];
    for (uri, alpn, reason) in cases {
        let stranger = Stranger::named(&uri, &key, alpn.as_bytes());
        let text = stranger.refusal(cluster.issuer.address()).await;
        assert!(text.contains(reason.code()), "{uri}: {text}");
        let noted = cluster.issuer.failure_with(stranger.address()).await;
        assert_eq!(noted.reason, reason, "{uri}: {noted}");
    }
    assert!(cluster.issuer.carrier.peers().is_empty());
}

#[tokio::test]
async fn a_wrong_cluster_is_named_by_the_server_to_a_client_that_does_not_look() {
    let (ours, theirs) = (Cluster::start(), Cluster::start());
    let foreign = theirs.issuer.identity.cluster();
    let key = key();
    let uri = format!("spiffe://{foreign}/node/{}", public(&key).node_id());
    let text = Stranger::named(&uri, &key, b"weft/1").refusal(ours.issuer.address()).await;
    for cluster in [foreign, ours.issuer.identity.cluster()] {
        assert!(text.contains(&cluster.to_string()), "{text}");
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_or_protocol_is_turned_away() {
    let cluster = Cluster::start();
    let bare = Stranger::new(None, b"weft/1");
    bare.refusal(cluster.issuer.address()).await;
    let noted = cluster.issuer.failure_with(bare.address()).await;
    assert_eq!(noted.reason, FailureReason::NoCertificate, "{noted}");

    let foreign = Stranger::new(None, b"h3");
    foreign.refusal(cluster.issuer.address()).await;
    let noted = cluster.issuer.failure_with(foreign.address()).await;
    assert_eq!(noted.reason, FailureReason::Protocol, "{noted}");
}

#[tokio::test]
async fn a_joiners_proof_is_refused_with_another_key() {
    let cluster = Cluster::start();
    let token = cluster.token();
    let (joiner, thief) = (key(), key());
    let proof = hex::encode(token.secret.key().prove(&public(&joiner)));
    let uri = format!("weft-join://{}/{proof}", token.id);

    let stolen = Stranger::named(&uri, &thief, b"weft-join/1");
    let text = stolen.refusal(cluster.issuer.address()).await;
    assert!(text.contains(FailureReason::TokenUnknown.code()), "{text}");
    let honest = Stranger::named(&uri, &joiner, b"weft-join/1");
    honest.connect(cluster.issuer.address()).await.unwrap();
}

#[tokio::test]
async fn a_revoked_key_does_not_come_back_with_a_new_token() {
    let cluster = Cluster::start();
    let token = cluster.token();
    let removed = key();
    let node = public(&removed).node_id();
    cluster.issuer.revoked.send_replace([node].into());
    let proof = hex::encode(token.secret.key().prove(&public(&removed)));
    let uri = format!("weft-join://{}/{proof}", token.id);
    let text =
        Stranger::named(&uri, &removed, b"weft-join/1").refusal(cluster.issuer.address()).await;
    assert!(text.contains(FailureReason::Revoked.code()), "{text}");
}

#[tokio::test]
async fn a_joiner_may_neither_speak_as_a_member_nor_send_messages() {
    let cluster = Cluster::start();
    let token = cluster.token();
    let joiner = key();
    let proof = hex::encode(token.secret.key().prove(&public(&joiner)));
    let uri = format!("weft-join://{}/{proof}", token.id);

    let text = Stranger::named(&uri, &joiner, b"weft/1").refusal(cluster.issuer.address()).await;
    assert!(text.contains(FailureReason::Certificate.code()), "{text}");

    let stranger = Stranger::named(&uri, &joiner, b"weft-join/1");
    let connection = stranger.connect(cluster.issuer.address()).await.unwrap();
    connection.send_datagram("gossip".into()).unwrap();
    if let Ok(mut stream) = connection.open_uni().await {
        // The server may have closed or stopped it already: that is a refusal too.
        let _ = stream.write_all(&[1; 100]).await;
        let _ = stream.finish();
    }
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    // Longer than a request may be, so that the server does not read to the end.
    let _ = send.write_all(&[b' '; 10_000]).await;
    let _ = send.finish();
    let answer = receive.read_to_end(4096).await.unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("refused"), "{answer:?}");
    assert!(cluster.issuer.carrier.peers().is_empty());
    assert_eq!(cluster.issuer.carrier.traffic().received_messages(), 0);
    assert_eq!(cluster.issuing().tokens.list(time::OffsetDateTime::now_utc()).len(), 1);
}

#[tokio::test]
async fn a_member_that_sends_too_much_is_cut_short_and_heard_again() {
    let cluster = Cluster::start();
    let identity = cluster.admit("beta").await;
    let key = rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(
        &identity.key().to_pem(),
        &rcgen::PKCS_ED25519,
    )
    .unwrap();
    let chain = vec![identity.certificate().der().clone()];
    let turned = Stranger::new(Some((chain, &key)), b"weft/1");
    let connection = turned.connect(cluster.issuer.address()).await.unwrap();

    let mut stream = connection.open_uni().await.unwrap();
    let endless = vec![1; 8 << 20];
    let error = stream.write_all(&endless).await.unwrap_err();
    assert!(matches!(error, quinn::WriteError::Stopped(_)), "{error}");
    let counted =
        |c: &weft_gossip::quic::QuicCarrier| (c.traffic().dropped_oversized == 1).then_some(());
    cluster.issuer.until("counted", counted).await;

    let mut unknown = connection.open_uni().await.unwrap();
    unknown.write_all(b"\xffof a newer kind").await.unwrap();
    unknown.finish().unwrap();
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(b"\x01short").await.unwrap();
    stream.finish().unwrap();
    let received = cluster.issuer.recv().await;
    assert_eq!((received.from, &received.message[..]), (identity.node(), &b"short"[..]));
}

#[tokio::test]
async fn garbage_is_neither_answered_at_length_nor_does_it_disturb() {
    let cluster = Cluster::start();
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(cluster.issuer.address()).await.unwrap();
    let mut sent = 0;
    for seed in 0..400_u64 {
        let packet = garbage(seed);
        sent += packet.len();
        socket.send(&packet).await.unwrap();
    }

    let beta = cluster.member("beta").await;
    beta.send(&cluster.issuer, "hello");
    cluster.issuer.recv().await;

    let mut received = 0;
    let mut buffer = [0; 65_536];
    while let Ok(Ok(length)) =
        tokio::time::timeout(Duration::from_millis(100), socket.recv(&mut buffer)).await
    {
        received += length;
    }
    assert!(received <= sent, "{received} bytes came back for {sent}");
    assert_eq!(cluster.issuer.carrier.peers().len(), 1);
}

#[tokio::test]
async fn a_spoofed_first_packet_is_answered_with_less_than_its_size() {
    let cluster = Cluster::start();
    // The first packet of an honest handshake, from an address that never says more.
    let catcher = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let stranger = Stranger::new(None, b"weft/1");
    let target = catcher.local_addr().unwrap();
    let mut first = [0; 2048];
    let length = tokio::select! {
        _ = stranger.connect(target) => panic!("nobody answers there"),
        caught = catcher.recv(&mut first) => caught.unwrap(),
    };
    let spoofed = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    spoofed.send_to(&first[..length], cluster.issuer.address()).await.unwrap();

    let mut received = 0;
    let mut buffer = [0; 65_536];
    while let Ok(Ok(more)) =
        tokio::time::timeout(Duration::from_secs(1), spoofed.recv(&mut buffer)).await
    {
        received += more;
    }
    assert!((1..length).contains(&received), "{received} bytes came back for {length}");
}

/// Bytes that look like nothing, like a long header, or like a short header, by turns.
fn garbage(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    let length = [1, 20, 40, 600, 1200, 1400][seed as usize % 6];
    let mut packet: Vec<u8> = (0..length).map(|_| next()).collect();
    match seed % 4 {
        0 => {}
        1 => packet[0] = 0xc3,
        2 => packet[0] = 0x43,
        _ => {
            let head = [0xc3, 0, 0, 0, 1, 8];
            let take = packet.len().min(head.len());
            packet[..take].copy_from_slice(&head[..take]);
        }
    }
    packet
}
