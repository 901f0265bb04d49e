//! The services of one network: everything of them in its namespace, brought to the desired state.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use weft_model::{MacAddr, Protocol};
use weft_vxlan::Namespace;

use crate::{
    Counters, Frontend, NetworkBalance, Traffic,
    conntrack::{self, Connection, Identity},
    error::BalanceError,
    events::Events,
    holdings::{Holdings, stations},
    kernel::{Change, Kernel, Tally},
    set::{Element, Kind, Set, Table},
    skeleton::Skeleton,
};

/// The namespace of one network, with what is known to be in it.
#[derive(Debug)]
pub(crate) struct NetworkKernel {
    kernel: Kernel,
    pub(crate) events: Events,
    seed: u32,
    holdings: Holdings,
    /// What is in the kernel, unless somebody else has changed it.
    known: Option<Arc<NetworkBalance>>,
    /// How many transactions others have made in the namespace since some time, when it was read.
    others: Option<u32>,
    /// Frontends that have gone, whose connections have not been looked at since.
    gone: BTreeSet<Frontend>,
    /// TCP connections that nobody had answered when they were looked at, and since when. One whose
    /// answer is on its way must not be forgotten: its client would be led to another backend.
    unanswered: BTreeMap<Identity, Instant>,
}

/// What a pass came to.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Outcome {
    /// Transactions.
    pub(crate) applied: u64,
    /// Connections that the kernel was told to forget.
    pub(crate) forgotten: u64,
    /// Whether connections have to be looked at again, before long.
    pub(crate) unsure: bool,
}

impl NetworkKernel {
    /// Must be called inside a tokio runtime.
    pub(crate) fn open(namespace: Namespace, seed: u32) -> Result<Self, BalanceError> {
        let kernel = Kernel::open(namespace, seed)?;
        let events = Events::open(&kernel.namespace, Table::NAME, kernel.netfilter.port()?)?;
        Ok(Self {
            kernel,
            events,
            seed,
            holdings: Holdings::new(seed),
            known: None,
            others: None,
            gone: BTreeSet::new(),
            unanswered: BTreeMap::new(),
        })
    }

    pub(crate) fn is_in(&self, namespace: &Namespace) -> bool {
        self.kernel.namespace.is(namespace)
    }

    /// Whether `balance` is what the kernel has, as far as is known without asking it.
    pub(crate) fn has(&self, balance: &Arc<NetworkBalance>) -> bool {
        self.known.as_ref().is_some_and(|known| Arc::ptr_eq(known, balance) || known == balance)
    }

    /// Whether nobody else has changed anything in the namespace since it was last read.
    pub(crate) fn is_untouched(&mut self) -> bool {
        self.others.is_some() && self.transactions_of_others().ok() == self.others
    }

    fn transactions_of_others(&mut self) -> Result<u32, BalanceError> {
        Ok(self.kernel.generation()?.wrapping_sub(self.kernel.commits))
    }

    /// Brings the kernel from what is known to be in it to `desired`; `thorough`: from whatever is
    /// in it. `macs` are this host's stations.
    pub(crate) fn reconcile(
        &mut self,
        desired: &Arc<NetworkBalance>,
        macs: &BTreeSet<MacAddr>,
        thorough: bool,
    ) -> Result<Outcome, BalanceError> {
        let base = |balance: &NetworkBalance| (balance.gateway_mac, balance.gateways.clone());
        let known = self.known.take();
        let changes = self.holdings.follow(desired);
        self.gone.extend(&changes.gone_frontends);
        self.gone.retain(|frontend| !desired.frontends.contains_key(frontend));
        if known.as_ref().is_some_and(|known| base(known) == base(desired)) && !thorough {
            let applied = u64::from(!changes.is_empty());
            if changes.is_empty() || self.kernel.apply(&changes).is_ok() {
                self.known = Some(Arc::clone(desired));
                return Ok(Outcome { applied, ..Outcome::default() });
            }
            tracing::debug!("what is known of the tables of services is not so; reading them");
        }
        let outcome = self.compare(desired, macs)?;
        self.known = Some(Arc::clone(desired));
        Ok(outcome)
    }

    fn compare(
        &mut self,
        desired: &NetworkBalance,
        macs: &BTreeSet<MacAddr>,
    ) -> Result<Outcome, BalanceError> {
        let skeleton = Skeleton::new(desired.gateway_mac, &desired.gateways, self.seed);
        let mut outcome = Outcome::default();
        for attempt in 0.. {
            self.others = Some(self.transactions_of_others()?);
            let actual = self.kernel.read()?;
            let Some(change) = self.holdings.compare(&actual, &skeleton) else {
                match attempt {
                    0 => self.kernel.lay(&skeleton)?,
                    _ => self.kernel.lay_anew(&skeleton)?,
                }
                outcome.applied += 1;
                // That was us; whatever comes from now on is not.
                self.events.settle();
                continue;
            };
            let seeds = stations(macs, &actual);
            let new_elements = change.new_elements.into_iter().chain(seeds).collect();
            let change = Change { new_elements, ..change };
            if change.is_empty() {
                return Ok(outcome);
            }
            match self.kernel.apply(&change) {
                Ok(()) => {
                    outcome.applied += 1;
                    return Ok(outcome);
                }
                Err(error) if attempt >= ATTEMPTS => return Err(error),
                // Somebody may have changed the tables in between.
                Err(error) => {
                    tracing::debug!(%error, "failed to mend the tables of services");
                    if attempt > 0 {
                        self.kernel.lay_anew(&skeleton)?;
                        self.events.settle();
                    }
                }
            }
        }
        unreachable!("attempts are counted until they fail")
    }

    /// Has the kernel forget connections that keep their clients from a backend, and what only
    /// connections that have ended had needed.
    pub(crate) fn sweep(&mut self) -> Result<Outcome, BalanceError> {
        let Some(balance) = self.known.clone() else { return Ok(Outcome::default()) };
        let connections = conntrack::read(&mut self.kernel.netfilter)?;
        let stale: Vec<&Connection> = connections
            .iter()
            .filter(|connection| {
                conntrack::is_stale(connection, &balance)
                    || conntrack::is_left_over(connection, &balance.frontends, &self.gone)
            })
            .collect();
        let (known, now) = (std::mem::take(&mut self.unanswered), Instant::now());
        let mut certain = Vec::new();
        for connection in stale {
            let since = known.get(&connection.identity).copied().unwrap_or(now);
            if connection.protocol == Protocol::Udp || now - since >= SILENCE {
                certain.push(connection);
            } else {
                self.unanswered.insert(connection.identity.clone(), since);
            }
        }
        let unsure = !self.unanswered.is_empty();
        let mut outcome = Outcome { unsure, ..Outcome::default() };
        if !certain.is_empty() {
            outcome.forgotten = conntrack::forget(&mut self.kernel.netfilter, &certain)?;
        }
        self.gone.clear();
        if !self.holdings.lingering.is_empty() {
            let gone = self.holdings.let_go(&conntrack::used(&connections));
            if !gone.is_empty() && self.kernel.apply(&gone).is_err() {
                self.known = None;
            }
        }
        Ok(outcome)
    }

    /// What the frontends' traffic has come to since they are there.
    pub(crate) fn counters(&mut self) -> Result<BTreeMap<Frontend, Counters>, BalanceError> {
        let Some(balance) = self.known.clone() else { return Ok(BTreeMap::new()) };
        let mut tallies: BTreeMap<(Set, Vec<u8>), Tally> = BTreeMap::new();
        for set in Set::all().filter(|set| set.is_counted()) {
            let found = self.kernel.tallies(set)?;
            tallies.extend(found.into_iter().map(|(key, tally)| ((set, key), tally)));
        }
        let tally = |Element { set, key, .. }: Element| {
            let tally = tallies.get(&(set, key)).copied().unwrap_or_default();
            Traffic { packets: tally.packets, bytes: tally.bytes }
        };
        let counters = |frontend: &Frontend| {
            let Frontend { ip, protocol, port } = *frontend;
            let of = |with, without| {
                let kind = if port.is_some() { with } else { without };
                tally(Element::new(kind, ip, protocol, port.unwrap_or_default()))
            };
            let mut counters = Counters {
                connections: of(Kind::PortConnections, Kind::AddressConnections).packets,
                requests: of(Kind::PortRequests, Kind::AddressRequests),
                answers: of(Kind::PortAnswers, Kind::AddressAnswers),
            };
            if let Some(mark) = self.holdings.mark(frontend) {
                // What passes the gateway by.
                counters.requests += of(Kind::PortMarks, Kind::AddressMarks);
                counters.answers += tally(Element::of_mark(Kind::Vips, mark, Vec::new()));
            }
            counters
        };
        Ok(balance.frontends.keys().map(|frontend| (*frontend, counters(frontend))).collect())
    }

    /// The established connections, by frontend and backend.
    pub(crate) fn connections(
        &mut self,
    ) -> Result<BTreeMap<Frontend, BTreeMap<SocketAddr, u64>>, BalanceError> {
        let Some(balance) = self.known.clone() else { return Ok(BTreeMap::new()) };
        let connections = conntrack::read(&mut self.kernel.netfilter)?;
        Ok(conntrack::counts(&connections, &balance))
    }

    /// Removes all that is ours.
    pub(crate) fn clear(&mut self) -> Result<(), BalanceError> {
        if let Some(known) = self.known.take() {
            self.gone.extend(known.frontends.keys());
        }
        self.holdings = Holdings::new(self.seed);
        if self.kernel.has_tables()? {
            self.kernel.clear()?;
        }
        self.forget_gone()
    }

    /// Has the kernel forget the connections of UDP to frontends that have gone, where there are no
    /// others.
    fn forget_gone(&mut self) -> Result<(), BalanceError> {
        if self.gone.iter().any(|frontend| frontend.protocol == Protocol::Udp) {
            let connections = conntrack::read(&mut self.kernel.netfilter)?;
            let of_gone = |connection: &&Connection| {
                conntrack::is_left_over(connection, &BTreeMap::new(), &self.gone)
            };
            let left_over: Vec<&Connection> = connections.iter().filter(of_gone).collect();
            conntrack::forget(&mut self.kernel.netfilter, &left_over)?;
        }
        self.gone.clear();
        Ok(())
    }
}

const ATTEMPTS: u32 = 3;
/// How long an answer may take before it counts as none; less than the second after which a client
/// sends again (RFC 6298 §2.1).
pub(crate) const SILENCE: Duration = Duration::from_millis(400);
