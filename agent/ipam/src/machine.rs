use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use weft_model::{
    AddressGrant, EndpointId, Family, HoldRecord, LoanRecord, Network, NetworkId, NodeId, Unit,
    WantRecord,
};

use crate::{
    Ask, Layout, Lease, Refusal, State, Usage, View, borrower,
    demand::{self, Clock, Requests},
    lender, refusal,
    sight::Sight,
    state::Move,
    usage,
};

/// The addresses of one network on one node: what the node lends, borrows and gives out.
///
/// A value without IO. Its owner calls [`step`](Self::step) whenever the view changes and now and
/// then as time passes, and after every call that may change the state:
///
/// ```text
/// if let Some(unsaved) = ipam.unsaved() {
///     write unsaved.state() to disk and sync it;
///     ipam.saved(unsaved);
///     publish ipam.records();
/// }
/// ```
///
/// [`records`](Self::records) only ever shows what was saved, so the registers cannot leave the
/// node before they are on its disk. A grant is to be used only once it is saved, too.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ipam {
    network: Arc<Network>,
    timing: Timing,
    state: State,
    requests: Requests,
    quiet_since: BTreeMap<Unit, u64>,
    saved: State,
}

impl Ipam {
    /// Begins with nothing lent and nothing held: for a network that this node never carried.
    /// A node that did must [`restore`](Self::restore) what it saved.
    pub fn new(network: Arc<Network>, node: NodeId, timing: Timing) -> Self {
        let state = State::new(network.id, node);
        Self::with_state(network, timing, state)
    }

    /// Goes on from what was saved.
    ///
    /// # Errors
    ///
    /// The state is another node's or network's, or from a newer release.
    pub fn restore(
        network: Arc<Network>,
        node: NodeId,
        timing: Timing,
        state: State,
    ) -> Result<Self, RestoreError> {
        let name = || network.name.to_string();
        if state.version > State::VERSION {
            return Err(RestoreError::Version { network: name(), version: state.version });
        }
        if state.network != network.id {
            let found = state.network;
            return Err(RestoreError::Network { network: name(), expected: network.id, found });
        }
        if state.node != node {
            let found = state.node;
            return Err(RestoreError::Node { network: name(), expected: node, found });
        }
        Ok(Self::with_state(network, timing, state))
    }

    fn with_state(network: Arc<Network>, timing: Timing, state: State) -> Self {
        Self {
            network,
            timing,
            saved: state.clone(),
            state,
            requests: Requests::default(),
            quiet_since: BTreeMap::new(),
        }
    }

    /// Does all that the view calls for: begins and ends holds, cedes, asks, lends. `now` is the
    /// local clock in seconds; it may jump, which costs rest or patience but never an address.
    pub fn step(&mut self, view: &View<'_>, now: u64) -> Step {
        self.settle(view, now);
        Step { changed: self.state != self.saved, fenced: self.fenced().copied().collect() }
    }

    /// Gives `endpoint` an address: the same one again if it has one that fits.
    ///
    /// Of the free addresses it takes the one that was out of use longest, those never used
    /// first, so that what others still remember of an address (ARP caches, DNS answers,
    /// connection tracking) has the most time to die.
    ///
    /// # Errors
    ///
    /// See [`Refusal`]. If [`Refusal::may_pass`], the ask was noted and passed on: try again after
    /// each view change until the caller's own deadline, then [`release`](Self::release) the
    /// endpoint, which withdraws the ask.
    pub fn allocate(
        &mut self,
        endpoint: EndpointId,
        ask: Ask,
        view: &View<'_>,
        now: u64,
    ) -> Result<AddressGrant, Refusal> {
        self.age(now);
        if let Some(lease) = self.state.lease_of(endpoint, ask.family()) {
            return refusal::recheck(&self.network, &self.state, lease, ask);
        }
        let sight = sight(&self.network, view, &self.state);
        refusal::check(&sight, &self.state, ask)?;

        // A step first: it may bring a loan that has just arrived, or one of our own.
        let key = (endpoint, ask.family());
        self.requests.0.insert(key, (ask, now));
        let mut grant = self.choose(ask, view, now);
        if grant.is_none() {
            self.settle(view, now);
            grant = self.choose(ask, view, now);
        }
        let Some(grant) = grant else {
            let clock = clock(&self.timing, &self.quiet_since, now);
            let sight = self::sight(&self.network, view, &self.state);
            return Err(refusal::explain(&sight, &self.state, &clock, ask));
        };
        self.requests.0.remove(&key);
        self.state.leases.insert(grant.ip, Lease { endpoint, grant });
        self.state.last_used.remove(&grant.ip);
        self.settle(view, now);
        Ok(grant)
    }

    /// Takes back every address of `endpoint`, and what it still asks for; they rest before they
    /// are given out again. Returns the addresses; none if the endpoint is unknown.
    pub fn release(&mut self, endpoint: EndpointId, now: u64) -> Vec<IpAddr> {
        self.requests.0.retain(|(of, _), _| *of != endpoint);
        let of_endpoint = self.state.leases.values().filter(|lease| lease.endpoint == endpoint);
        let leases: Vec<Lease> = of_endpoint.copied().collect();
        for lease in &leases {
            self.state.leases.remove(&lease.grant.ip);
            if self.state.is_backed(lease) {
                self.state.last_used.insert(lease.grant.ip, now);
            }
        }
        self.age(now);
        leases.into_iter().map(|lease| lease.grant.ip).collect()
    }

    /// Every address in use here, also of endpoints that the caller no longer knows.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.state.leases.values()
    }

    /// Leases whose space was lent elsewhere, because this node counts as removed. They stay
    /// until their endpoint is released.
    pub fn fenced(&self) -> impl Iterator<Item = &Lease> {
        self.state.leases.values().filter(|lease| !self.state.is_backed(lease))
    }

    /// What is not on disk yet, if anything.
    pub fn unsaved(&self) -> Option<Unsaved> {
        (self.state != self.saved).then(|| Unsaved { state: self.state.clone() })
    }

    /// Says that `unsaved` is on disk, synced.
    pub fn saved(&mut self, unsaved: Unsaved) {
        self.saved = unsaved.state;
    }

    /// The state as last saved: what a restart would go on from.
    pub fn saved_state(&self) -> &State {
        &self.saved
    }

    /// This node's registers as last saved: what may be published.
    pub fn records(&self) -> Records<'_> {
        let State { loans, holds, wants, .. } = &self.saved;
        Records { loans, holds, wants }
    }

    pub fn usage(&self, family: Family, now: u64) -> Usage {
        let clock = clock(&self.timing, &self.quiet_since, now);
        usage::of(&self.network, &self.state, &clock, family)
    }

    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    fn settle(&mut self, view: &View<'_>, now: u64) {
        self.age(now);
        self.apply(view, now, |sight, own, _, _| borrower::fences(sight, own));
        self.apply(view, now, |sight, own, _, _| borrower::starts(sight, own));
        self.apply(view, now, |sight, own, requests, _| borrower::cessions(sight, own, requests));
        self.apply(view, now, borrower::returns);
        self.ask(view, now);
        while self.lend(view, now) {}
        // What this node lends to itself is there at once.
        self.apply(view, now, |sight, own, _, _| borrower::starts(sight, own));
        self.age(now);
        self.ask(view, now);
    }

    fn apply(&mut self, view: &View<'_>, now: u64, rule: Rule) {
        let clock = clock(&self.timing, &self.quiet_since, now);
        let sight = sight(&self.network, view, &self.state);
        let moves = rule(&sight, &self.state, &self.requests, &clock);
        for step in moves {
            self.state.apply(&self.network, step, now);
        }
    }

    fn ask(&mut self, view: &View<'_>, now: u64) {
        self.apply(view, now, |sight, own, requests, clock| {
            vec![Move::Want(demand::wants(sight, own, requests, clock))]
        });
    }

    fn lend(&mut self, view: &View<'_>, now: u64) -> bool {
        let sight = sight(&self.network, view, &self.state);
        let Some(loan) = lender::next_loan(&sight, &self.state) else { return false };
        self.state.apply(&self.network, loan, now);
        true
    }

    /// The address to give for `ask`, out of what is held.
    fn choose(&self, ask: Ask, view: &View<'_>, now: u64) -> Option<AddressGrant> {
        let clock = clock(&self.timing, &self.quiet_since, now);
        let sight = sight(&self.network, view, &self.state);
        match ask {
            Ask::Any(family) => {
                let last_used = |ip: &IpAddr| self.state.last_used.get(ip).copied().unwrap_or(0);
                demand::free(&sight, &self.state, &clock, family)
                    .min_by_key(|(ip, ..)| (last_used(ip), *ip))
                    .map(|(ip, unit, seq)| AddressGrant { ip, unit, seq })
            }
            Ask::Fixed(ip) => {
                let (unit, seq) = self.state.holder_of(&self.network, ip)?;
                Some(AddressGrant { ip, unit, seq })
            }
        }
    }

    /// Brings the marks of the local clock up to date. A mark from the future, left by a clock
    /// that was set back, becomes one of now.
    fn age(&mut self, now: u64) {
        for since in self.state.last_used.values_mut() {
            *since = now.min(*since);
        }
        let patience = self.timing.patience.as_secs();
        self.requests.0.retain(|_, (_, tried)| {
            *tried = now.min(*tried);
            now - *tried <= patience
        });

        let layout = Layout::of(&self.network);
        let busy: Vec<Unit> =
            self.state.leases.keys().filter_map(|&ip| layout.block_of(ip)).collect();
        let held = &self.state.holds.held;
        let quiet = |unit: &Unit| held.contains_key(unit) && !busy.contains(unit);
        self.quiet_since.retain(|unit, _| quiet(unit));
        for unit in held.keys().filter(|unit| quiet(unit)) {
            let since = self.quiet_since.entry(*unit).or_insert(now);
            *since = now.min(*since);
        }
    }
}

/// Two values that differ only in their network's definition hash alike: a checker of models
/// compares values of one network.
impl Hash for Ipam {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.state.hash(hasher);
        self.requests.hash(hasher);
        self.quiet_since.hash(hasher);
        self.saved.hash(hasher);
    }
}

/// How long things wait on this node. Others are not told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Timing {
    /// How long a released address is kept from those that ask for any.
    pub rest: Duration,
    /// How long a block beyond the reserve stays empty before it is given back.
    pub idle: Duration,
    /// How long an unmet ask is kept up without being repeated.
    pub patience: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            rest: Duration::from_secs(60),
            idle: Duration::from_secs(600),
            patience: Duration::from_secs(600),
        }
    }
}

/// The outcome of a step.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[must_use = "a changed state must be saved, and fenced endpoints detached"]
pub struct Step {
    /// There is something to save, then to publish.
    pub changed: bool,
    /// Leases that are no longer this node's: detach their endpoints, then release them. Listed
    /// in every step until then.
    pub fenced: Vec<Lease>,
}

/// A state on its way to the disk.
#[derive(Debug)]
#[must_use = "hand it back to `Ipam::saved` once its state is synced"]
pub struct Unsaved {
    state: State,
}

impl Unsaved {
    pub fn state(&self) -> &State {
        &self.state
    }
}

/// A node's own registers for one network.
#[derive(Clone, Copy, Debug)]
pub struct Records<'a> {
    pub loans: &'a LoanRecord,
    pub holds: &'a HoldRecord,
    pub wants: &'a WantRecord,
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(
        "the saved addresses of network {network} have format {version}, newer than this release \
         can read: start the release that wrote them"
    )]
    Version { network: String, version: u32 },
    #[error(
        "the saved addresses of network {network} ({expected}) are those of network {found}: put \
         the right file back"
    )]
    Network { network: String, expected: NetworkId, found: NetworkId },
    #[error(
        "the saved addresses of network {network} belong to node {found}, not to this node \
         {expected}: restore this node's own state directory or give the node a new identity"
    )]
    Node { network: String, expected: NodeId, found: NodeId },
}

type Rule = fn(&Sight<'_>, &State, &Requests, &Clock<'_>) -> Vec<Move>;

fn sight<'a>(network: &'a Network, view: &'a View<'a>, own: &'a State) -> Sight<'a> {
    Sight { layout: Layout::of(network), view, own: Some(own) }
}

fn clock<'a>(timing: &Timing, quiet_since: &'a BTreeMap<Unit, u64>, now: u64) -> Clock<'a> {
    Clock { now, rest: timing.rest.as_secs(), idle: timing.idle.as_secs(), quiet_since }
}
