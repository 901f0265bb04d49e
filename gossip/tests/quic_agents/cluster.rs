use std::{
    collections::BTreeSet,
    fmt::Debug,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use time::OffsetDateTime;
use tokio::{sync::watch, time::Instant};
use weft_gossip::{
    Carrier, Received,
    identity::{Grant, Identity, Issuer, NODE_VALIDITY, Token},
    quic::{Admission, Clock, Join, JoinError, QuicCarrier, QuicConfig, Timing},
};
use weft_model::NodeId;

pub(crate) const LOOPBACK: &str = "127.0.0.1:0";

/// A cluster whose first node admits others.
pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) issuer: Agent,
    /// Names that the issuer's agent says are taken.
    pub(crate) taken: Arc<Mutex<BTreeSet<String>>>,
}

/// One running agent, as far as this crate goes.
pub(crate) struct Agent {
    pub(crate) identity: Identity,
    pub(crate) carrier: Arc<QuicCarrier>,
    pub(crate) revoked: watch::Sender<BTreeSet<NodeId>>,
    /// Seconds by which the agent's clock is off.
    pub(crate) clock_error: Arc<AtomicI64>,
}

impl Cluster {
    pub(crate) fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// A cluster whose first node is set up by `edit`.
    pub(crate) fn start_with(edit: impl FnOnce(&mut QuicConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = "alpha".parse().unwrap();
        let now = OffsetDateTime::now_utc();
        let identity = Identity::init(&dir.path().join("alpha"), name, NODE_VALIDITY, now).unwrap();
        let taken = Arc::new(Mutex::new(BTreeSet::from(["alpha".to_owned()])));
        let names = taken.clone();
        let admission = Admission {
            admit: Arc::new(move |name, _node| {
                match names.lock().unwrap().contains(name.as_str()) {
                    true => Err("a live member has this name".to_owned()),
                    false => Ok(()),
                }
            }),
            seeds: Arc::new(|| vec!["192.0.2.7:6790".parse().unwrap()]),
            validity: NODE_VALIDITY,
        };
        let issuer = Agent::start_with(identity, |config| {
            config.admission = Some(admission);
            edit(config);
        });
        Self { dir, issuer, taken }
    }

    pub(crate) fn issuing(&self) -> &Issuer {
        self.issuer.identity.issuer().unwrap()
    }

    pub(crate) fn token(&self) -> Token {
        self.token_of(Grant::default())
    }

    pub(crate) fn token_of(&self, grant: Grant) -> Token {
        let Issuer { authority, tokens } = self.issuing();
        let seeds = [self.issuer.carrier.address()];
        tokens.create(authority, &seeds, grant, OffsetDateTime::now_utc()).unwrap()
    }

    pub(crate) fn state_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn join(&self, name: &str, token: Token) -> Join {
        Join {
            token,
            state_dir: self.state_dir(name),
            name: name.parse().unwrap(),
            bind: LOOPBACK.parse().unwrap(),
            now: OffsetDateTime::now_utc(),
            limit: Duration::from_secs(10),
        }
    }

    pub(crate) async fn admit(&self, name: &str) -> Identity {
        self.try_admit(name, self.token()).await.unwrap()
    }

    pub(crate) async fn try_admit(&self, name: &str, token: Token) -> Result<Identity, JoinError> {
        Box::pin(self.join(name, token).run()).await
    }

    /// A member that has joined and runs.
    pub(crate) async fn member(&self, name: &str) -> Agent {
        Agent::start(self.admit(name).await)
    }
}

impl Agent {
    pub(crate) fn start(identity: Identity) -> Self {
        Self::start_with(identity, |_| {})
    }

    pub(crate) fn start_with(identity: Identity, edit: impl FnOnce(&mut QuicConfig)) -> Self {
        let (revoked, watching) = watch::channel(BTreeSet::new());
        let clock_error = Arc::new(AtomicI64::new(0));
        let error = clock_error.clone();
        let mut config = QuicConfig {
            identity: identity.clone(),
            bind: LOOPBACK.parse().unwrap(),
            advertise: None,
            clock: Clock::new(move || {
                OffsetDateTime::now_utc() + time::Duration::seconds(error.load(Ordering::Relaxed))
            }),
            revoked: watching,
            admission: None,
            detour: None,
            timing: Timing::default(),
        };
        edit(&mut config);
        let carrier = Arc::new(QuicCarrier::bind(config).unwrap());
        Self { identity, carrier, revoked, clock_error }
    }

    pub(crate) fn node(&self) -> NodeId {
        self.identity.node()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.carrier.address()
    }

    pub(crate) fn send(&self, to: &Self, message: impl Into<Bytes>) {
        self.carrier.send(to.address(), message.into());
    }

    /// The next message; panics with what the carrier knows if none comes.
    pub(crate) async fn recv(&self) -> Received {
        let received = tokio::time::timeout(LIMIT, self.carrier.recv()).await;
        received.unwrap_or_else(|_| panic!("no message within {LIMIT:?}: {}", self.state()))
    }

    /// Waits until `read` gives something.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        mut read: impl FnMut(&QuicCarrier) -> Option<T>,
    ) -> T {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(value) = read(&self.carrier) {
                return value;
            }
            assert!(Instant::now() < end, "not {what} within {LIMIT:?}: {}", self.state());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The text of the failure that this agent notes with `address`.
    pub(crate) async fn failure_with(&self, address: SocketAddr) -> weft_gossip::quic::Failure {
        self.until("failed", |carrier| {
            carrier.last_failures().get(&address).map(|last| last.failure.clone())
        })
        .await
    }

    pub(crate) fn state(&self) -> String {
        format!(
            "peers {:#?}\nfailures {:#?}\ntraffic {:#?}",
            self.carrier.peers(),
            self.carrier.last_failures(),
            self.carrier.traffic()
        )
    }
}

/// Checks again and again that something holds, for as long as `span`.
pub(crate) async fn throughout(span: Duration, mut check: impl FnMut()) {
    let end = Instant::now() + span;
    while Instant::now() < end {
        check();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until `read` has given the same for as long as `span`. What it gives first may change: an
/// attempt of either side may still be under way.
pub(crate) async fn settled<T: PartialEq + Debug>(
    span: Duration,
    mut read: impl FnMut() -> Option<T>,
) -> T {
    let end = Instant::now() + LIMIT;
    let (mut value, mut since) = (read(), Instant::now());
    loop {
        let now = read();
        if now != value {
            (value, since) = (now, Instant::now());
        }
        if since.elapsed() >= span
            && let Some(value) = value
        {
            return value;
        }
        assert!(Instant::now() < end, "never the same for {span:?} within {LIMIT:?}: {value:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// How long anything may take before a test fails.
pub(crate) const LIMIT: Duration = Duration::from_secs(15);
