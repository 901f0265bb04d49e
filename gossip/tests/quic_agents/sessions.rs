use std::{collections::BTreeSet, sync::atomic::Ordering, time::Duration};

use time::OffsetDateTime;
use tokio::time::Instant;
use weft_gossip::{
    Carrier,
    identity::Validity,
    quic::{FailureReason, Session, SessionId, Timing},
};

use crate::cluster::{Agent, Cluster, LIMIT, throughout};

#[tokio::test]
async fn an_old_connection_is_replaced_before_it_is_closed_and_nothing_is_lost() {
    let cluster = Cluster::start();
    let beta = Agent::start_with(cluster.admit("beta").await, |config| config.timing = brisk());
    let gamma = Agent::start_with(cluster.admit("gamma").await, |config| config.timing = brisk());
    beta.send(&gamma, "hello");
    gamma.recv().await;

    let (mut seen, mut overlapped) = (BTreeSet::new(), 0);
    let begin = Instant::now();
    for sent in 0_u32.. {
        if seen.len() >= 5 && overlapped > 10 {
            break;
        }
        assert!(begin.elapsed() < 2 * LIMIT, "{overlapped} in {seen:?}");
        beta.send(&gamma, sent.to_be_bytes().to_vec());
        assert_eq!(gamma.recv().await.message[..], sent.to_be_bytes());
        let (here, there) = (sessions(&beta, &gamma), sessions(&gamma, &beta));
        assert!(!here.is_empty() && !there.is_empty(), "{}", beta.state());
        assert!(here.iter().all(Session::dialled) && !there.iter().any(Session::dialled));
        overlapped += usize::from(here.len() == 2 && ids(&here) == ids(&there));
        seen.extend(ids(&here));
    }
    // None before three quarters of its age.
    let most = begin.elapsed().as_secs_f64() / (0.75 * brisk().session_age.as_secs_f64());
    assert!(seen.len() as f64 <= most + 1.0, "{seen:?} in {:?}", begin.elapsed());
    let (here, there) = (&sessions(&beta, &gamma)[0], &sessions(&gamma, &beta)[0]);
    let root = |s: &Session| s.export::<32>("weft data root", b"").unwrap();
    assert_eq!(root(here), root(there));
    assert!(here.established() <= OffsetDateTime::now_utc());
}

#[tokio::test]
async fn an_idle_pair_replaces_its_connection_too() {
    let cluster = Cluster::start();
    let beta = Agent::start_with(cluster.admit("beta").await, |config| config.timing = brisk());
    beta.send(&cluster.issuer, "hello");
    cluster.issuer.recv().await;
    let first = sessions(&beta, &cluster.issuer)[0].id().unwrap();
    let renewed = |_: &_| {
        let ids = ids(&sessions(&beta, &cluster.issuer));
        (!ids.is_empty() && !ids.contains(&first)).then_some(())
    };
    beta.until("on another connection alone", renewed).await;
}

#[tokio::test]
async fn a_connection_is_closed_when_a_certificate_expires_and_both_ends_say_whose() {
    for by_clock_of_issuer in [true, false] {
        let cluster = Cluster::start();
        let beta = cluster.member("beta").await;
        beta.send(&cluster.issuer, "hello");
        cluster.issuer.recv().await;
        let expires = sessions(&beta, &cluster.issuer)[0].expires();
        let both = [&beta, &cluster.issuer].map(|a| a.identity.certificate().validity().until);
        assert_eq!(Some(expires), both.into_iter().min());

        let (judge, other) = match by_clock_of_issuer {
            true => (&cluster.issuer, &beta),
            false => (&beta, &cluster.issuer),
        };
        judge.clock_error.store(31 * 86_400, Ordering::Relaxed);
        assert!(sessions(judge, other).is_empty(), "no key of it may be used any more");
        judge.until("disconnected", |c| c.peers().is_empty().then_some(())).await;
        other.until("disconnected", |c| c.peers().is_empty().then_some(())).await;
        for (at, from) in [(judge, other), (other, judge)] {
            let failure = at.failure_with(from.address()).await;
            assert_eq!(failure.reason, FailureReason::Clock, "{failure}");
            assert!(failure.text.contains("certificate of node"), "{failure}");
        }
    }
}

#[tokio::test]
async fn a_renewed_certificate_is_on_new_connections_before_the_old_one_expires() {
    for dialled_by_beta in [true, false] {
        let cluster = Cluster::start();
        let identity = cluster.admit("beta").await;
        let (key, authority) = (identity.key().public_key(), &cluster.issuing().authority);
        let now = OffsetDateTime::now_utc();
        let short = authority.issue(&key, identity.name(), Validity::starting(now, SHORT));
        let beta = Agent::start(identity.renewed(short.clone()).unwrap());
        let issuer = &cluster.issuer;
        match dialled_by_beta {
            true => {
                beta.send(issuer, "hello");
                issuer.recv().await;
            }
            false => {
                issuer.send(&beta, "hello");
                beta.recv().await;
            }
        }
        assert_eq!(sessions(issuer, &beta)[0].expires(), short.validity().until);

        let newer = beta.carrier.renew(issuer.node()).await.unwrap();
        beta.carrier.present(newer.clone()).unwrap();
        throughout(SHORT + Duration::from_secs(2), || {
            assert!(!sessions(&beta, issuer).is_empty(), "{}", beta.state());
            assert!(!sessions(issuer, &beta).is_empty(), "{}", issuer.state());
        })
        .await;
        let peers = issuer.carrier.peers();
        assert_eq!(peers[0].certificate_expires, newer.validity().until, "{peers:?}");
        let of_issuer = issuer.identity.certificate().validity().until;
        let expires = sessions(&beta, issuer)[0].expires();
        assert_eq!(expires, of_issuer.min(newer.validity().until));
    }
}

#[tokio::test]
async fn sessions_of_a_revoked_node_are_not_listed_from_that_moment() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    beta.send(&cluster.issuer, "hello");
    cluster.issuer.recv().await;
    let session = sessions(&cluster.issuer, &beta).remove(0);
    assert!(session.is_live());

    cluster.issuer.revoked.send_replace(BTreeSet::from([beta.node()]));
    assert!(sessions(&cluster.issuer, &beta).is_empty());
    cluster.issuer.until("closed", |_| (!session.is_live()).then_some(())).await;
    beta.until("told", |_| sessions(&beta, &cluster.issuer).is_empty().then_some(())).await;
    let told = beta.failure_with(cluster.issuer.address()).await;
    assert_eq!(told.reason, FailureReason::Revoked, "{told}");
}

#[tokio::test]
async fn a_kept_peer_is_connected_without_a_word_and_again_when_it_is_lost() {
    let cluster = Cluster::start();
    let short = Timing { idle: Duration::from_millis(300), ..Timing::default() };
    let beta = Agent::start_with(cluster.admit("beta").await, |config| config.timing = short);
    beta.carrier.keep([cluster.issuer.node()].into());
    beta.carrier.introduce(cluster.issuer.node(), cluster.issuer.address());
    let connected = |_: &_| sessions(&beta, &cluster.issuer).first().cloned();
    let session = beta.until("connected", connected).await;

    throughout(5 * short.idle, || assert!(session.is_live(), "{}", beta.state())).await;
    beta.carrier.keep(BTreeSet::new());
    beta.until("closed for idleness", |c| c.peers().is_empty().then_some(())).await;
    beta.carrier.keep([cluster.issuer.node()].into());
    beta.until("connected again", connected).await;
}

fn sessions(here: &Agent, there: &Agent) -> Vec<Session> {
    here.carrier.sessions(there.node())
}

fn ids(sessions: &[Session]) -> Vec<SessionId> {
    sessions.iter().map(|session| session.id().unwrap()).collect()
}

fn brisk() -> Timing {
    let quick = Duration::from_millis(400);
    Timing { session_age: 2 * quick, linger: quick, overlap: quick, ..Timing::default() }
}

const SHORT: Duration = Duration::from_secs(5);
