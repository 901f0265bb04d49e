//! Requests that wait: for their network, for a lender, for a look at the host's ports.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;
use weft_balance::{HostPort, Taken};
use weft_ipam::Ask;
use weft_model::{EndpointId, NetworkId};

use super::{
    GRANT_DEADLINE, Reply, Reservation, ServiceKey, ServiceOrder,
    admission::Claim,
    keeper::Keeper,
    ports::{KernelWork, Release},
    survey::Survey,
};
use crate::{
    api::types::{PortRequest, PublishedPort},
    refusal::{Refusal, RefusalKind},
};

/// A request that is not met yet.
pub(super) struct Waiting {
    id: EndpointId,
    errand: Errand,
    survey: Survey,
    since: Instant,
}

/// What is asked for.
pub(super) enum Errand {
    Attach {
        claim: Box<Claim>,
        reply: Reply<EndpointId>,
    },
    /// An address for an endpoint to come.
    Reserve {
        network: NetworkId,
        ask: Ask,
        reply: Reply<Reservation>,
    },
    Service {
        order: Box<ServiceOrder>,
        reply: Reply<ServiceKey>,
    },
    /// Ports for an endpoint that is attached.
    Ports {
        endpoint: EndpointId,
        requests: Vec<PortRequest>,
        reply: Reply<Vec<PublishedPort>>,
    },
}

impl Errand {
    /// Whether nobody waits any more.
    fn is_closed(&self) -> bool {
        match self {
            Self::Attach { reply, .. } => reply.is_closed(),
            Self::Reserve { reply, .. } => reply.is_closed(),
            Self::Service { reply, .. } => reply.is_closed(),
            Self::Ports { reply, .. } => reply.is_closed(),
        }
    }

    fn refuse(self, refusal: Refusal) {
        match self {
            Self::Attach { reply, .. } => drop(reply.send(Err(refusal))),
            Self::Reserve { reply, .. } => drop(reply.send(Err(refusal))),
            Self::Service { reply, .. } => drop(reply.send(Err(refusal))),
            Self::Ports { reply, .. } => drop(reply.send(Err(refusal))),
        }
    }
}

/// An answer to give once disk and others have what it says.
pub(super) enum Answer {
    Attach(Reply<EndpointId>, Result<EndpointId, Refusal>),
    Reserve(Reply<Reservation>, Reservation),
    Service(Reply<ServiceKey>, ServiceKey),
    /// Who asks next how far an endpoint is must find it draining.
    Drain(Reply<BTreeSet<EndpointId>>, BTreeSet<EndpointId>),
}

impl Answer {
    /// Returns the reservation that nobody waits for any more.
    pub(super) fn send(self) -> Option<EndpointId> {
        match self {
            Self::Attach(reply, answer) => {
                let _ = reply.send(answer);
                None
            }
            Self::Service(reply, key) => {
                let _ = reply.send(Ok(key));
                None
            }
            Self::Drain(reply, endpoints) => {
                let _ = reply.send(Ok(endpoints));
                None
            }
            Self::Reserve(reply, reservation) => {
                reply.send(Ok(reservation)).err().map(|_| reservation.id)
            }
        }
    }
}

/// Why a request is not met now.
pub(super) enum Obstacle {
    Refused(Refusal),
    /// These ports of the host have not been looked at yet.
    Unseen(BTreeSet<HostPort>),
    /// It may be met within `patience` of its arrival.
    Waits {
        reason: Refusal,
        patience: Duration,
    },
}

impl From<Refusal> for Obstacle {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Keeper {
    pub(super) fn admit_reservation(
        &mut self,
        network: NetworkId,
        ask: Ask,
        reply: Reply<Reservation>,
    ) {
        self.wait_for(Errand::Reserve { network, ask, reply });
    }

    pub(super) fn admit_order(&mut self, order: ServiceOrder, reply: Reply<ServiceKey>) {
        self.wait_for(Errand::Service { order: Box::new(order), reply });
    }

    pub(super) fn wait_for(&mut self, errand: Errand) {
        self.waiting.push(Waiting {
            id: EndpointId::from(rand::random::<[u8; 16]>()),
            errand,
            survey: Survey::default(),
            since: Instant::now(),
        });
    }

    /// Tries again all that waits.
    pub(super) fn grant_waiting(&mut self) {
        for mut waiting in std::mem::take(&mut self.waiting) {
            if waiting.errand.is_closed() {
                self.release_everywhere(waiting.id);
                continue;
            }
            let id = waiting.id;
            let Err((errand, obstacle)) = self.meet(id, waiting.errand, &waiting.survey) else {
                continue;
            };
            waiting.errand = errand;
            match obstacle {
                Obstacle::Refused(refusal) => {
                    self.release_everywhere(id);
                    waiting.errand.refuse(refusal);
                }
                Obstacle::Waits { reason, patience } => {
                    self.keep_waiting(waiting, reason, patience)
                }
                Obstacle::Unseen(ports) => {
                    if waiting.survey.begin() {
                        self.start_survey(id, ports);
                    }
                    let reason = Refusal::new(
                        RefusalKind::Unavailable,
                        "this host has not been looked through for who has its ports: try again",
                    );
                    self.keep_waiting(waiting, reason, GRANT_DEADLINE);
                }
            }
        }
    }

    fn keep_waiting(&mut self, waiting: Waiting, reason: Refusal, patience: Duration) {
        if waiting.since + patience <= Instant::now() {
            self.release_everywhere(waiting.id);
            waiting.errand.refuse(reason);
        } else {
            self.waiting.push(waiting);
        }
    }

    /// Takes note of what a survey has found.
    pub(super) fn finish_survey(
        &mut self,
        id: EndpointId,
        ports: BTreeSet<HostPort>,
        taken: &BTreeMap<HostPort, Taken>,
    ) {
        if let Some(waiting) = self.waiting.iter_mut().find(|waiting| waiting.id == id) {
            waiting.survey.note(ports, taken);
        }
    }

    /// Meets a request, or hands it back with what stands in the way.
    fn meet(
        &mut self,
        id: EndpointId,
        errand: Errand,
        survey: &Survey,
    ) -> Result<(), (Errand, Obstacle)> {
        match errand {
            Errand::Attach { claim, reply } => match self.grant_endpoint(id, &claim, survey) {
                Ok(()) => {
                    self.replies.entry(id).or_default().push(Release::Attach(reply));
                    self.starts.push(KernelWork::Attach(id));
                    Ok(())
                }
                Err(obstacle) => Err((Errand::Attach { claim, reply }, obstacle)),
            },
            Errand::Reserve { network, ask, reply } => match self.grant_address(id, network, ask) {
                Ok(ip) => {
                    self.answers.push(Answer::Reserve(reply, Reservation { id, ip }));
                    Ok(())
                }
                Err(obstacle) => Err((Errand::Reserve { network, ask, reply }, obstacle)),
            },
            Errand::Service { order, reply } => match self.grant_service(id, &order, survey) {
                Ok(key) => {
                    self.answers.push(Answer::Service(reply, key));
                    Ok(())
                }
                Err(obstacle) => Err((Errand::Service { order, reply }, obstacle)),
            },
            Errand::Ports { endpoint, requests, reply } => {
                match self.grant_ports(endpoint, &requests, survey) {
                    Ok(network) => {
                        self.await_ports(endpoint, network, reply);
                        Ok(())
                    }
                    Err(obstacle) => Err((Errand::Ports { endpoint, requests, reply }, obstacle)),
                }
            }
        }
    }
}
