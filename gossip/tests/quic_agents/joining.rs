use std::{net::SocketAddr, sync::atomic::Ordering, time::Duration};

use time::OffsetDateTime;
use tokio::time::Instant;
use weft_gossip::{
    identity::{Grant, Identity, IdentityError},
    quic::{Attempt, FailureReason, JoinError},
};

use crate::cluster::{Agent, Cluster};

/// The failure with each seed.
fn attempts(error: JoinError) -> Vec<Attempt> {
    match error {
        JoinError::Refused { attempts, .. } => attempts.0,
        JoinError::Identity(error) => panic!("{error}"),
    }
}

/// What both sides say of a join that must fail for `reason`, and that it left nothing behind.
async fn refused(
    cluster: &Cluster,
    name: &str,
    error: JoinError,
    reason: FailureReason,
) -> (String, String) {
    let joiner = attempts(error).pop().unwrap().failure;
    assert_eq!(joiner.reason, reason, "{joiner}");
    let server = cluster
        .issuer
        .until("noted on the server", |carrier| {
            let last = carrier.last_failures();
            last.into_values().map(|l| l.failure).find(|f| f.reason == reason)
        })
        .await;
    let loaded = Identity::load(&cluster.state_dir(name));
    assert!(matches!(loaded, Err(IdentityError::NotInitialised { .. })), "{loaded:?}");
    (joiner.text, server.text)
}

#[tokio::test]
async fn a_token_admits_one_node_which_is_then_a_member() {
    let cluster = Cluster::start();
    let token = cluster.token();
    let identity = cluster.try_admit("beta", token.clone()).await.unwrap();

    assert_eq!(identity.cluster(), cluster.issuer.identity.cluster());
    assert_eq!(identity.name().as_str(), "beta");
    assert!(identity.issuer().is_none());
    let seeds: Vec<SocketAddr> = vec!["192.0.2.7:6790".parse().unwrap(), cluster.issuer.address()];
    assert_eq!(identity.seeds(), seeds);
    assert_eq!(Identity::load(&cluster.state_dir("beta")).unwrap().node(), identity.node());
    let leftover: Vec<_> = std::fs::read_dir(cluster.state_dir("beta")).unwrap().collect();
    assert_eq!(leftover.len(), 1, "{leftover:?}");

    let error = cluster.try_admit("gamma", token.clone()).await.unwrap_err();
    let (joiner, server) = refused(&cluster, "gamma", error, FailureReason::TokenUsedUp).await;
    for text in [joiner, server] {
        assert!(
            text.contains(&token.id.to_string()) && text.contains("weft token create"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_node_that_has_joined_does_not_join_again() {
    let cluster = Cluster::start();
    let token = cluster.token_of(Grant { uses: 2, ..Grant::default() });
    cluster.try_admit("beta", token.clone()).await.unwrap();
    let error = cluster.try_admit("beta", token).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, JoinError::Identity(IdentityError::Exists { .. })), "{text}");
    assert!(text.contains("already holds node beta") && text.contains("remove"), "{text}");
}

#[tokio::test]
async fn an_expired_token_is_called_expired_with_its_time() {
    let cluster = Cluster::start();
    let token = cluster.token();
    cluster.issuer.clock_error.store(2 * 3600, Ordering::Relaxed);
    let error = cluster.try_admit("beta", token).await.unwrap_err();
    let (joiner, server) = refused(&cluster, "beta", error, FailureReason::TokenExpired).await;
    assert!(joiner.contains("expired at") && server.contains("expired at"), "{joiner} / {server}");
}

#[tokio::test]
async fn a_removed_token_is_unknown() {
    let cluster = Cluster::start();
    let token = cluster.token();
    assert!(cluster.issuing().tokens.remove(token.id, OffsetDateTime::now_utc()).unwrap());
    let error = cluster.try_admit("beta", token).await.unwrap_err();
    refused(&cluster, "beta", error, FailureReason::TokenUnknown).await;
}

#[tokio::test]
async fn a_token_for_another_cluster_names_both() {
    let (ours, theirs) = (Cluster::start(), Cluster::start());
    let mut token = theirs.token();
    token.seeds = vec![ours.issuer.address()];
    let error = ours.try_admit("beta", token).await.unwrap_err();
    let (joiner, server) = refused(&ours, "beta", error, FailureReason::WrongCluster).await;
    for text in [joiner, server] {
        for cluster in [&ours, &theirs] {
            let id = cluster.issuer.identity.cluster().to_string();
            assert!(text.contains(&id), "{text}");
        }
    }
}

#[tokio::test]
async fn an_authority_that_is_not_the_tokens_is_not_believed() {
    let cluster = Cluster::start();
    let mut token = cluster.token();
    token.authority[0] ^= 1;
    let expected = hex::encode(token.authority);
    let error = cluster.try_admit("beta", token).await.unwrap_err();
    let (joiner, server) = refused(&cluster, "beta", error, FailureReason::WrongAuthority).await;
    assert!(joiner.contains(&expected) && server.contains(&expected), "{joiner} / {server}");
}

#[tokio::test]
async fn a_clock_that_is_far_off_is_named_with_both_times() {
    let day = time::Duration::days(1);
    for (offset, name) in [(-day, "behind"), (60 * day, "ahead")] {
        let cluster = Cluster::start();
        let token = cluster.token();
        let mut join = cluster.join(name, token.clone());
        join.now += offset;
        let says = join.now.date().to_string();
        let error = Box::pin(join.run()).await.unwrap_err();
        let (joiner, server) = refused(&cluster, name, error, FailureReason::Clock).await;
        for text in [joiner, server] {
            assert!(text.contains(&says) && text.contains("valid from"), "{text}");
        }
        let left = cluster.issuing().tokens.list(OffsetDateTime::now_utc());
        assert_eq!(left[&token.id].uses_left, 1, "a refusal does not cost the token");
    }
}

#[tokio::test]
async fn an_issuer_checks_the_joiners_clock_against_the_certificate_it_would_issue() {
    let cluster = Cluster::start();
    // The issuer's own certificate still covers a clock that lags an hour behind it, but one
    // that it issues two hours from now does not cover the present.
    cluster.issuer.clock_error.store(2 * 3600, Ordering::Relaxed);
    let token = cluster.token_of(Grant { ttl: Duration::from_secs(86_400), uses: 1 });
    let error = cluster.try_admit("beta", token.clone()).await.unwrap_err();
    let (joiner, server) = refused(&cluster, "beta", error, FailureReason::Clock).await;
    assert!(joiner.contains("the joiner's clock says"), "{joiner}");
    assert!(server.contains("the joiner's clock says"), "{server}");
    assert_eq!(cluster.issuing().tokens.list(OffsetDateTime::now_utc())[&token.id].uses_left, 1);
}

#[tokio::test]
async fn an_unreachable_seed_is_named_and_the_next_one_is_asked() {
    let cluster = Cluster::start();
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut token = cluster.token();
    token.seeds = vec![silent.local_addr().unwrap()];
    let mut join = cluster.join("beta", token.clone());
    let join_limit = Duration::from_secs(1);
    join.limit = join_limit;
    let begin = Instant::now();
    let text = Box::pin(join.run()).await.unwrap_err().to_string();
    assert!(begin.elapsed() < 5 * join_limit, "{:?}", begin.elapsed());
    let named = format!("{}: no answer within 1.0 s", token.seeds[0]);
    assert!(text.contains(&named), "{text}");

    token.seeds.push(cluster.issuer.address());
    let mut join = cluster.join("beta", token);
    join.limit = Duration::from_secs(4);
    Box::pin(join.run()).await.unwrap();
}

#[tokio::test]
async fn a_seed_that_cannot_issue_says_so() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    let mut token = cluster.token();
    token.seeds = vec![beta.address()];
    let error = cluster.try_admit("gamma", token).await.unwrap_err();
    let failure = attempts(error).pop().unwrap().failure;
    assert_eq!(failure.reason, FailureReason::NotIssuer, "{failure}");
}

#[tokio::test]
async fn a_name_belongs_to_one_node() {
    let cluster = Cluster::start();
    cluster.taken.lock().unwrap().insert("beta".to_owned());
    let token = cluster.token();
    let error = cluster.try_admit("beta", token.clone()).await.unwrap_err();
    let (joiner, server) = refused(&cluster, "beta", error, FailureReason::NameTaken).await;
    assert!(joiner.contains("as beta") && server.contains("a live member"), "{joiner} / {server}");
    cluster.try_admit("gamma", token).await.unwrap();
}

#[tokio::test]
async fn two_that_join_at_once_do_not_get_the_same_name() {
    let cluster = Cluster::start();
    let token = cluster.token_of(Grant { uses: 2, ..Grant::default() });
    let (mut one, mut other) = (cluster.join("beta", token.clone()), cluster.join("beta", token));
    one.state_dir = cluster.state_dir("one");
    other.state_dir = cluster.state_dir("other");
    let outcomes = tokio::join!(Box::pin(one.run()), Box::pin(other.run()));
    let error = match outcomes {
        (Ok(_), Err(error)) | (Err(error), Ok(_)) => error,
        both => panic!("exactly one gets the name: {both:?}"),
    };
    assert_eq!(attempts(error).pop().unwrap().failure.reason, FailureReason::NameTaken);
}

#[tokio::test]
async fn a_join_that_is_killed_at_any_moment_leaves_nothing_half_done() {
    let cluster = Cluster::start();
    let token = cluster.token();
    let (mut killed, mut joined) = (0, None);
    for step in 0..200_u64 {
        let limit = Duration::from_micros(150 * step);
        match tokio::time::timeout(limit, cluster.try_admit("beta", token.clone())).await {
            Err(_) => {
                killed += 1;
                match Identity::load(&cluster.state_dir("beta")) {
                    Err(IdentityError::NotInitialised { .. }) => {}
                    other => panic!("half joined after {limit:?}: {other:?}"),
                }
            }
            Ok(outcome) => {
                joined = Some(outcome.unwrap());
                break;
            }
        }
    }
    // The token has one use, and the joiner lost the answer to it perhaps many times.
    let identity = match joined {
        Some(identity) => identity,
        None => cluster.try_admit("beta", token).await.unwrap(),
    };
    assert!(killed > 3, "{killed}");
    let beta = Agent::start(identity);
    beta.send(&cluster.issuer, "hello");
    assert_eq!(cluster.issuer.recv().await.from, beta.node());
}
