//! The published ports of the host: held, so that nobody else takes them, and led to the services'
//! networks.

use std::{
    collections::{BTreeMap, BTreeSet},
    io, mem,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use nix::ifaddrs::getifaddrs;
use tokio::{
    sync::watch,
    task,
    time::{self, Instant},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::Protocol;
use weft_vxlan::Namespace;

use self::{
    holder::{Held, Holder, Taken},
    proxy::Proxies,
    table::{Load, Memory, Ports},
};
use crate::{
    Desired, HostPort, HostPublish,
    board::Board,
    conntrack::{self, Connection},
    error::{BalanceError, Chain},
    events::Events,
    netfilter::{Netfilter, NetfilterError},
};

pub(crate) mod holder;
pub(crate) mod owner;
mod proxy;
mod table;

/// Brings the host's table to the desired state.
#[derive(Debug)]
pub(crate) struct HostTask {
    pub(crate) namespace: Namespace,
    pub(crate) desired: watch::Receiver<Option<Arc<Desired>>>,
    pub(crate) board: Board,
    pub(crate) resync: Duration,
    /// Of the proxies' connections.
    pub(crate) tracker: TaskTracker,
}

/// Why a pass is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wake {
    Changed,
    /// Somebody else has changed the table.
    Foreign,
    /// A port that was taken may be free.
    Retry,
    Resync,
}

/// The host's namespace, and what is known of it.
struct HostKernel {
    namespace: Namespace,
    holder: Holder,
    memory: Memory,
    /// What the table has, unless somebody else has changed it.
    known: Option<Ports>,
    /// Where ports led whose connections have not been looked at since.
    gone: Ports,
    /// Whether connections have to be looked at.
    owed: bool,
}

/// What a pass came to.
struct Outcome {
    held: Held,
    open: Ports,
    loaded: bool,
    error: Option<BalanceError>,
}

impl HostTask {
    pub(crate) async fn run(mut self, mut events: Events, stop: CancellationToken) {
        let mut kernel = HostKernel {
            namespace: self.namespace.clone(),
            holder: Holder::default(),
            memory: Memory::default(),
            known: None,
            gone: Ports::new(),
            owed: false,
        };
        let mut proxies =
            Proxies::new(self.namespace.clone(), self.tracker.clone(), stop.child_token());
        let mut wake = Wake::Changed;
        let mut settled = false;
        loop {
            if wake == Wake::Foreign {
                // A change seldom comes alone.
                time::sleep(DEBOUNCE).await;
                events.settle();
            }
            let mut retry = false;
            let desired = self.desired.borrow_and_update().clone();
            if let Some(desired) = desired {
                let publish = Arc::clone(&desired.host);
                let thorough = wake != Wake::Changed && wake != Wake::Retry;
                let pass = task::spawn_blocking(move || {
                    let outcome = kernel.reconcile(&publish, thorough);
                    (kernel, outcome)
                });
                let Ok((returned, mut outcome)) = pass.await else {
                    tracing::error!("a pass over the host's published ports panicked");
                    return;
                };
                kernel = returned;
                if outcome.loaded {
                    // What was told was our own doing; what is told from now on is not, and what
                    // came in between shows.
                    events.settle();
                    retry = !kernel.verify();
                }
                match proxies.follow(&desired.host.proxies).await {
                    Ok(held) => outcome.held.join(held),
                    Err(error) => outcome.error = Some(error.into()),
                }
                retry |= outcome.error.is_some()
                    || outcome.held.pending
                    || kernel.owed
                    || !outcome.held.taken.is_empty();
                let repair = outcome.loaded && settled && wake == Wake::Foreign;
                settled = outcome.error.is_none();
                self.post(&desired.host, outcome, proxies.open(), repair);
            }
            let now = Instant::now();
            // Every arm is cancel-safe and none awaits in its body.
            wake = tokio::select! {
                () = stop.cancelled() => return,
                changed = self.desired.changed() => match changed {
                    Ok(()) => Wake::Changed,
                    Err(_) => return,
                },
                () = events.changed() => Wake::Foreign,
                () = time::sleep_until(now + RETRY), if retry => Wake::Retry,
                () = time::sleep_until(now + self.resync) => Wake::Resync,
            };
        }
    }

    fn post(
        &self,
        desired: &Arc<HostPublish>,
        outcome: Outcome,
        proxied: impl Iterator<Item = HostPort>,
        repair: bool,
    ) {
        let Outcome { held, open, error, .. } = outcome;
        if repair {
            tracing::warn!("put back the rules of published ports that somebody had changed");
        }
        let error = error.map(|error| Chain(&error).to_string());
        if let Some(error) = &error {
            tracing::warn!(%error, "failed to bring the published ports into force");
        }
        let reason = |taken: &Taken| match &taken.owner {
            Some(owner) => owner.to_string(),
            None => "a process that cannot be told".into(),
        };
        let taken: BTreeMap<HostPort, String> =
            held.taken.iter().map(|(port, taken)| (*port, reason(taken))).collect();
        self.board.update_host(|status| {
            for (port, owner) in taken.iter().filter(|(port, _)| !status.taken.contains_key(port)) {
                tracing::warn!(%port, %owner, "a published port is in use on this host");
            }
            status.repairs += u64::from(repair);
            status.failures += u64::from(error.is_some());
            if error.is_none() {
                status.applied = Some(Arc::clone(desired));
                status.open = open.keys().copied().chain(proxied).collect();
            }
            status.taken = taken;
            status.error = error;
        });
    }
}

impl HostKernel {
    fn reconcile(&mut self, desired: &HostPublish, thorough: bool) -> Outcome {
        let mut outcome =
            Outcome { held: Held::default(), open: Ports::new(), loaded: false, error: None };
        match self.holder.follow(&self.namespace, desired.ports.keys()) {
            Ok(held) => outcome.held = held,
            Err(error) => {
                outcome.error = Some(error.into());
                return outcome;
            }
        }
        let taken = &outcome.held.taken;
        let free = desired.ports.iter().filter(|(port, _)| !taken.contains_key(port));
        outcome.open = free.map(|(port, to)| (*port, *to)).collect();
        match self.reconcile_table(&outcome.open, thorough) {
            Ok(loaded) => outcome.loaded = loaded,
            Err(error) => outcome.error = Some(error),
        }
        self.owed |= outcome.loaded;
        if self.owed && outcome.error.is_none() {
            match self.forget_astray(&outcome.open) {
                Ok(()) => (self.owed, self.gone) = (false, Ports::new()),
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot look at the host's connections");
                }
            }
        }
        outcome
    }

    /// Tells whether anything had to be done.
    fn reconcile_table(&mut self, desired: &Ports, thorough: bool) -> Result<bool, BalanceError> {
        if let Some(known) = mem::take(&mut self.known).filter(|_| !thorough) {
            let load = table::plan(desired, Some(&known));
            if table::apply(&self.namespace, &mut self.memory, &load).is_ok() {
                self.gone.extend(known);
                self.known = Some(desired.clone());
                return Ok(load != Load::Nothing);
            }
            tracing::debug!("what is known of the published ports is not so; reading them");
        }
        let actual = table::read(&self.namespace, &mut self.memory)?;
        let load = table::plan(desired, actual.as_ref());
        if actual.is_none() && desired.is_empty() && !table::is_there(&self.namespace)? {
            // A host that publishes nothing, and never did, needs no table.
            return Ok(false);
        }
        table::apply(&self.namespace, &mut self.memory, &load)?;
        self.gone.extend(actual.into_iter().flatten());
        self.known = Some(desired.clone());
        Ok(load != Load::Nothing)
    }

    /// Has the kernel forget the UDP connections that keep their clients from where `ports` lead
    /// now: it translates by what it knows of a connection, as long as its client goes on sending.
    fn forget_astray(&self, ports: &Ports) -> Result<(), NetfilterError> {
        let udp = |port: &HostPort| port.protocol == Protocol::Udp;
        if !ports.keys().chain(self.gone.keys()).any(udp) {
            return Ok(());
        }
        let own = self.namespace.run(own_addresses)?;
        let is_local = |ip: IpAddr| ip.is_loopback() || own.contains(&ip);
        let mut netfilter = Netfilter::open(&self.namespace)?;
        let connections = conntrack::read(&mut netfilter)?;
        let astray = |connection: &&Connection| {
            conntrack::is_astray(connection, ports, &self.gone, is_local)
        };
        let astray: Vec<&Connection> = connections.iter().filter(astray).collect();
        conntrack::forget(&mut netfilter, &astray).map(drop)
    }

    /// Whether the table is what it was made.
    fn verify(&mut self) -> bool {
        let found = table::read(&self.namespace, &mut self.memory);
        let right = found.is_ok_and(|found| found == self.known);
        if !right {
            self.known = None;
        }
        right
    }
}

/// The addresses of the calling thread's namespace.
fn own_addresses() -> Result<BTreeSet<IpAddr>, NetfilterError> {
    let all = getifaddrs().map_err(io::Error::from)?;
    let addresses = all.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    Ok(addresses.collect())
}

const DEBOUNCE: Duration = Duration::from_millis(20);
const RETRY: Duration = Duration::from_secs(1);
