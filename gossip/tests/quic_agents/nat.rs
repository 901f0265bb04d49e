use std::time::Duration;

use weft_gossip::{
    Carrier,
    quic::{QuicCarrier, SessionId, Timing},
};

use crate::{
    cluster::{Agent, Cluster, throughout},
    gateway::{Gateway, Sink},
    member::{Member, all_alive},
};

/// One member that everybody reaches, and one behind a NAT: what it says of its address is of no
/// use to others, and the other sees it at a port of the NAT's.
struct Site {
    nat: Gateway,
    nowhere: Sink,
    outside: Member,
    inside: Member,
    _dir: tempfile::TempDir,
}

impl Site {
    async fn start(timing: Timing) -> Self {
        let nat = Gateway::start().await;
        let cluster = Cluster::start_with(|config| {
            nat.shelter(config);
            config.timing = timing;
        });
        let nowhere = Sink::open();
        // By the NAT, too: the token names the address that the gateway has.
        let identity = cluster.admit("inside").await;
        let inside = Agent::start_with(identity, |config| {
            config.advertise = Some(nowhere.address());
            config.timing = timing;
        });
        let seeds = [cluster.issuer.address()];
        let inside = Member::start(inside, 1, &seeds);
        let outside = Member::start(cluster.issuer, 1, &[]);
        all_alive(&[&inside, &outside]).await;
        Self { nat, nowhere, outside, inside, _dir: cluster.dir }
    }

    fn session_id(&self) -> Option<SessionId> {
        let session = self.outside.agent.carrier.session(self.inside.node())?;
        session.id().ok()
    }

    fn assert_alive(&self) {
        assert!(self.outside.sees_alive(&self.inside), "{}", self.outside.agent.state());
        assert!(self.inside.sees_alive(&self.outside), "{}", self.inside.agent.state());
    }

    async fn watch(&self, span: Duration) {
        throughout(span, || self.assert_alive()).await;
    }
}

#[tokio::test]
async fn a_node_behind_a_nat_takes_part_over_the_connection_that_it_has_made() {
    let site = Site::start(Timing::default()).await;
    let first = site.session_id();
    site.watch(Duration::from_secs(4)).await;
    site.inside.push(&site.outside).await;
    site.outside.push(&site.inside).await;

    let renewed = site.inside.agent.carrier.renew(site.outside.node()).await.unwrap();
    site.inside.agent.carrier.present(renewed).unwrap();
    let peers = site.outside.agent.carrier.peers();
    assert_eq!(peers.len(), 1, "{peers:?}");
    assert!(!peers[0].dialled && peers[0].address != site.inside.agent.address(), "{peers:?}");
    assert_eq!(site.session_id(), first);
    assert_eq!(site.nowhere.packets(), 0, "nobody dials where nobody is");
    assert!(site.outside.agent.carrier.failures().is_empty(), "{}", site.outside.agent.state());
}

#[tokio::test]
async fn a_connection_outlives_a_nat_that_forgets_its_ports() {
    let site = Site::start(Timing::default()).await;
    for _ in 0..3 {
        let (session, peers) = (site.session_id(), site.outside.agent.carrier.peers());
        site.nat.forget_mappings();
        let moved = |carrier: &QuicCarrier| {
            let now = carrier.peers();
            (now.first()?.address != peers.first()?.address).then_some(())
        };
        site.outside.agent.until("reached at the new port", moved).await;
        assert_eq!(site.session_id(), session, "{}", site.outside.agent.state());
        let took = site.outside.tell(&site.inside).await;
        assert!(took < Timing::default().silence, "{took:?}");
        site.assert_alive();
    }
    assert_eq!(site.nowhere.packets(), 0);
}

#[tokio::test]
async fn a_connection_through_a_nat_is_replaced_when_old() {
    let quick = Duration::from_millis(500);
    let timing =
        Timing { session_age: 2 * quick, linger: quick, overlap: quick, ..Timing::default() };
    let site = Site::start(timing).await;
    let first = site.session_id();
    site.outside
        .agent
        .until("on another connection", |_| (site.session_id() != first).then_some(()))
        .await;
    site.nat.forget_mappings();
    site.watch(Duration::from_secs(3)).await;
    let took = site.outside.tell(&site.inside).await;
    assert!(took < Timing::default().silence, "{took:?}");
    assert_eq!(site.nowhere.packets(), 0);
}

#[tokio::test]
async fn a_lost_node_behind_a_nat_is_not_dialled_in_a_tight_loop_and_returns_by_itself() {
    let site = Site::start(Timing::default()).await;
    site.nat.block_all();
    let suspect = |_: &_| (!site.outside.sees_alive(&site.inside)).then_some(());
    site.outside.agent.until("suspect", suspect).await;
    site.nowhere.packets();
    let span = Duration::from_secs(6);
    tokio::time::sleep(span).await;
    // An attempt takes a second and some packets of the same length; between two is a pause.
    let packets = site.nowhere.packets();
    assert!((1..60).contains(&packets), "{packets}");

    site.nat.unblock_all();
    all_alive(&[&site.inside, &site.outside]).await;
    // An attempt that was under way may last so long.
    site.watch(Timing::default().dial).await;
    site.nowhere.packets();
    site.watch(Duration::from_secs(2)).await;
    assert_eq!(site.nowhere.packets(), 0);
}

#[tokio::test]
async fn whoever_turns_out_to_be_connected_is_not_sought_where_it_says_it_is() {
    let cluster = Cluster::start();
    let beta = cluster.member("beta").await;
    let issuer = &cluster.issuer;
    beta.send(issuer, "hello");
    issuer.recv().await;

    let nowhere = Sink::open();
    issuer.carrier.send(nowhere.address(), "to whom?".into());
    issuer.until("seeking", |_| (nowhere.packets() > 0).then_some(())).await;
    issuer.carrier.introduce(beta.node(), nowhere.address());
    assert_eq!(&beta.recv().await.message[..], b"to whom?");
    nowhere.packets();
    throughout(Duration::from_secs(2), || assert_eq!(nowhere.packets(), 0)).await;
}
