use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use quinn::{Connection, RecvStream, SendStream, VarInt};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use time::OffsetDateTime;
use tokio::time::Instant;
use weft_model::{ClusterId, Label, NodeId};

use super::{
    acceptor::Context,
    link::Link,
    refusal::{Failure, Refusal},
    router::Event,
};
use crate::identity::{Certificate, ConsumeError, Issuer, PublicKey, TokenId, Validity};

/// What an issuer asks its agent, and gives to those that it admits.
#[derive(Clone)]
pub struct Admission {
    /// Whether a node of this id may have this name; the text says why not.
    pub admit: Admit,
    /// Addresses of live members, for a node that has just joined.
    pub seeds: Arc<dyn Fn() -> Vec<SocketAddr> + Send + Sync>,
    /// How long the certificates that it issues are valid.
    pub validity: Duration,
}

/// Judges a name for a node, without waiting; the text says why the node may not have it. The node
/// that holds a name may have it again.
pub type Admit = Arc<dyn Fn(&Label, NodeId) -> Result<(), String> + Send + Sync>;

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").field("validity", &self.validity).finish_non_exhaustive()
    }
}

/// Issues certificates to joiners and to members whose own runs out.
#[derive(Debug)]
pub(super) struct Enrolment {
    issuer: Issuer,
    admission: Admission,
    /// Names given out moments ago, whose nodes are not seen as members yet.
    promised: Mutex<BTreeMap<Label, (NodeId, Instant)>>,
}

impl Enrolment {
    pub(super) fn new(issuer: Issuer, admission: Admission) -> Self {
        Self { issuer, admission, promised: Mutex::default() }
    }

    /// Admits the holder of `key`, which has proved that it knows the secret of `token`. The use
    /// of the token is on the disk on return.
    fn admit(
        &self,
        request: &Request,
        token: TokenId,
        key: &PublicKey,
        now: OffsetDateTime,
    ) -> Result<Certificate, Refusal> {
        let node = key.node_id();
        let validity = self.validity(request, now)?;
        let taken = |why| Refusal::Name { name: request.name.clone(), why };
        (self.admission.admit)(&request.name, node).map_err(taken)?;
        self.promise(&request.name, node).map_err(taken)?;
        self.issuer.tokens.consume(token, node, now).map_err(|error| {
            self.withdraw_promise(&request.name, node);
            match error {
                ConsumeError::Refused(refusal) => Refusal::Token(refusal),
                ConsumeError::File(error) => Refusal::Internal(format!(
                    "the issuer cannot write its state: {error}; look at its log"
                )),
            }
        })?;
        Ok(self.issuer.authority.issue(key, &request.name, validity))
    }

    /// Issues a newer certificate to the member that asks.
    fn renew(
        &self,
        request: &Request,
        key: &PublicKey,
        now: OffsetDateTime,
    ) -> Result<Certificate, Refusal> {
        let validity = self.validity(request, now)?;
        (self.admission.admit)(&request.name, key.node_id())
            .map_err(|why| Refusal::Name { name: request.name.clone(), why })?;
        Ok(self.issuer.authority.issue(key, &request.name, validity))
    }

    /// The validity of a certificate from `now` on, which the joiner's clock must lie within.
    fn validity(&self, request: &Request, now: OffsetDateTime) -> Result<Validity, Refusal> {
        let validity = Validity::starting(now, self.admission.validity);
        let theirs = OffsetDateTime::from_unix_timestamp(request.clock)
            .map_err(|_| Refusal::Request(format!("{} is no time", request.clock)))?;
        match validity.contains(theirs) {
            true => Ok(validity),
            false => Err(Refusal::JoinerClock { theirs, ours: now, validity }),
        }
    }

    fn promise(&self, name: &Label, node: NodeId) -> Result<(), String> {
        let now = Instant::now();
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        promised.retain(|_, (_, at)| now.duration_since(*at) < PROMISE);
        match promised.get(name) {
            Some((holder, _)) if *holder != node => {
                Err(format!("node {holder} is joining under this name"))
            }
            Some(_) | None => {
                promised.insert(name.clone(), (node, now));
                Ok(())
            }
        }
    }

    fn withdraw_promise(&self, name: &Label, node: NodeId) {
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        if promised.get(name).is_some_and(|(holder, _)| *holder == node) {
            promised.remove(name);
        }
    }

    fn answer(&self, certificate: &Certificate) -> Answer {
        let authority = &self.issuer.authority;
        Answer::Admitted(Box::new(Admitted {
            cluster: authority.cluster(),
            certificate: certificate.to_pem(),
            authority: authority.certificate().to_pem(),
            seeds: (self.admission.seeds)(),
        }))
    }
}

/// What a node asks an issuer.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Request {
    pub(super) name: Label,
    /// Seconds since 1970 on the asker's clock.
    pub(super) clock: i64,
}

/// What an issuer answers.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer {
    Admitted(Box<Admitted>),
    Refused(String),
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Admitted {
    pub(super) cluster: ClusterId,
    pub(super) certificate: String,
    pub(super) authority: String,
    pub(super) seeds: Vec<SocketAddr>,
}

/// Serves a connection that may do nothing but ask to join, once.
pub(super) async fn serve(
    context: &Context,
    connection: &Connection,
    token: TokenId,
    key: PublicKey,
    address: SocketAddr,
) {
    connection.set_max_concurrent_uni_streams(VarInt::from_u32(0));
    let outcome = tokio::time::timeout(REQUEST_LIMIT, async {
        let (mut send, mut receive) = connection.accept_bi().await?;
        let outcome = decide_join(context, &mut receive, token, key).await;
        reply(&mut send, context, &outcome).await?;
        Ok::<_, Failure>(outcome)
    });
    let failure = match outcome.await {
        Ok(Ok(Ok((name, _)))) => {
            tracing::info!(node = %key.node_id(), %name, %address, %token, "a node has joined");
            None
        }
        Ok(Ok(Err(refusal))) => Some(Failure::from(&refusal)),
        Ok(Err(failure)) => Some(failure),
        Err(_) => Some(Failure::timeout(REQUEST_LIMIT)),
    };
    // The joiner closes when it has the answer; without this wait the close could overtake it.
    let _ = tokio::time::timeout(ANSWER_LIMIT, connection.closed()).await;
    connection.close(VarInt::from_u32(0), b"closed: answered");
    if let Some(failure) = failure {
        // The router ends only when the carrier does.
        let _ = context.events.send(Event::Failed { address, failure, connected: false }).await;
    }
}

async fn decide_join(
    context: &Context,
    receive: &mut RecvStream,
    token: TokenId,
    key: PublicKey,
) -> Result<(Label, Certificate), Refusal> {
    let request: Request = read_json(receive, REQUEST_BYTES).await.map_err(Refusal::Request)?;
    let enrolment = context.enrolment.clone().ok_or(Refusal::NotIssuer)?;
    let now = context.clock.now();
    let name = request.name.clone();
    let certificate =
        tokio::task::spawn_blocking(move || enrolment.admit(&request, token, &key, now))
            .await
            .map_err(|_| Refusal::Busy)??;
    Ok((name, certificate))
}

/// Answers a member that wants a newer certificate.
pub(super) async fn renew(
    context: &Context,
    link: &Link,
    mut send: SendStream,
    mut receive: RecvStream,
) {
    let outcome = tokio::time::timeout(REQUEST_LIMIT, async {
        let request: Request =
            read_json(&mut receive, REQUEST_BYTES).await.map_err(Refusal::Request)?;
        let enrolment = context.enrolment.as_ref().ok_or(Refusal::NotIssuer)?;
        let certificate = enrolment.renew(&request, &link.peer.public_key, context.clock.now())?;
        Ok((request.name, certificate))
    });
    let outcome = outcome
        .await
        .unwrap_or_else(|_| Err(Refusal::Request("the request does not end".to_owned())));
    if let Err(refusal) = &outcome {
        tracing::warn!(node = %link.peer.node, reason = %refusal, "refused to renew a certificate");
    }
    // If the answer is lost, the member asks again.
    let _ = reply(&mut send, context, &outcome).await;
}

async fn reply(
    send: &mut SendStream,
    context: &Context,
    outcome: &Result<(Label, Certificate), Refusal>,
) -> Result<(), Failure> {
    let answer = match (outcome, &context.enrolment) {
        (Ok((_, certificate)), Some(enrolment)) => enrolment.answer(certificate),
        (Ok(_), None) => Answer::Refused(Refusal::NotIssuer.to_string()),
        (Err(refusal), _) => Answer::Refused(refusal.to_string()),
    };
    write_json(send, &answer).await
}

/// Asks `connection`'s other end for a certificate.
pub(super) async fn ask(connection: &Connection, request: &Request) -> Result<Admitted, Failure> {
    let (mut send, mut receive) = connection.open_bi().await?;
    write_json(&mut send, request).await?;
    match read_json(&mut receive, ANSWER_BYTES).await {
        Ok(Answer::Admitted(admitted)) => Ok(*admitted),
        Ok(Answer::Refused(text)) => Err(Failure::by_peer(&text)),
        // A server that refuses the certificate closes after the client's side is done.
        Err(what) => Err(match connection.close_reason() {
            Some(error) => error.into(),
            None => Failure::from(&Refusal::Request(what)),
        }),
    }
}

async fn write_json(send: &mut SendStream, value: &impl Serialize) -> Result<(), Failure> {
    let json = serde_json::to_vec(value).expect("plain fields become JSON");
    let lost = |what: String| Failure::from(&Refusal::Request(what));
    if let Err(error) = send.write_all(&json).await {
        return Err(match error {
            quinn::WriteError::ConnectionLost(error) => error.into(),
            other => lost(other.to_string()),
        });
    }
    send.finish().map_err(|error| lost(error.to_string()))
}

async fn read_json<T: DeserializeOwned>(
    receive: &mut RecvStream,
    limit: usize,
) -> Result<T, String> {
    let bytes = receive.read_to_end(limit).await.map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| format!("not understood: {error}"))
}

const REQUEST_BYTES: usize = 4096;
const ANSWER_BYTES: usize = 64 << 10;
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
const PROMISE: Duration = Duration::from_secs(15);
