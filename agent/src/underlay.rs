//! Watches what of this host the others must know: routes, resolvers, the underlay's MTU.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use tokio::{sync::watch, time};
use tokio_util::sync::CancellationToken;
use weft_dns::resolv_conf;
use weft_model::{Label, Node, NodeState, Sealing, VtepAddr};
use weft_vxlan::{Namespace, Underlay, UnderlayError};

use crate::chain::Chain;

/// How often the host is looked at again.
const INTERVAL: Duration = Duration::from_secs(5);
const RESOLV_CONF: &str = "/etc/resolv.conf";
const DNS_PORT: u16 = 53;

/// Keeps this host's record and its list of resolvers up to date.
pub struct Watcher {
    host: Namespace,
    name: Label,
    address: SocketAddr,
    /// Resolvers that the configuration names; the host's own when empty.
    configured: Vec<IpAddr>,
    /// How this host takes part in encrypted networks.
    sealing: Option<Sealing>,
    /// Where others find this agent's metrics.
    metrics: Option<SocketAddr>,
}

/// What the watcher tells.
#[derive(Clone, Debug)]
pub struct Host {
    pub node: Node,
    pub resolvers: Vec<SocketAddr>,
}

impl Watcher {
    pub fn new(host: Namespace, name: Label, address: SocketAddr, configured: Vec<IpAddr>) -> Self {
        Self { host, name, address, configured, sealing: None, metrics: None }
    }

    /// Tells from now on how this host takes part in encrypted networks.
    pub fn offering(self, sealing: Option<Sealing>) -> Self {
        Self { sealing, ..self }
    }

    /// Tells from now on where this agent's metrics are, which it serves at `listen`: at loopback
    /// nobody else could find them.
    pub fn measured(self, listen: Option<SocketAddr>) -> Self {
        let reachable = listen.filter(|listen| !listen.ip().is_loopback());
        let metrics = reachable.map(|listen| match listen.ip().is_unspecified() {
            true => SocketAddr::new(self.address.ip(), listen.port()),
            false => listen,
        });
        Self { metrics, ..self }
    }

    /// Looks at the host.
    ///
    /// # Errors
    ///
    /// No interface has the advertised address.
    pub fn look(&self) -> Result<Host, UnderlayError> {
        let vtep = VtepAddr::from(self.address.ip());
        let found = Underlay::of(vtep, &self.host)?;
        let resolvers = self.resolvers();
        Ok(Host {
            node: Node {
                name: self.name.clone(),
                vtep,
                address: self.address,
                version: env!("CARGO_PKG_VERSION").into(),
                state: NodeState::Up,
                underlay_mtu: u16::try_from(found.mtu).unwrap_or(u16::MAX),
                routes: found.routes,
                resolvers: resolvers
                    .iter()
                    .map(SocketAddr::ip)
                    .filter(|ip| !ip.is_loopback())
                    .collect(),
                sealing: self.sealing.clone(),
                metrics: self.metrics,
            },
            resolvers,
        })
    }

    /// Publishes what changes until `stop`.
    pub async fn run(
        self,
        node: watch::Sender<Node>,
        resolvers: watch::Sender<Vec<SocketAddr>>,
        stop: CancellationToken,
    ) {
        let mut interval = time::interval(INTERVAL);
        interval.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(interval.tick()).await.is_some() {
            match self.look() {
                Ok(host) => {
                    replace(&node, host.node);
                    replace(&resolvers, host.resolvers);
                }
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot look at the underlay");
                }
            }
        }
    }

    fn resolvers(&self) -> Vec<SocketAddr> {
        if !self.configured.is_empty() {
            return self.configured.iter().map(|ip| SocketAddr::new(*ip, DNS_PORT)).collect();
        }
        let text = fs::read_to_string(Path::new(RESOLV_CONF)).unwrap_or_default();
        resolv_conf::parse(&text, &BTreeSet::new()).servers
    }
}

fn replace<T: PartialEq>(sender: &watch::Sender<T>, value: T) {
    sender.send_if_modified(|current| {
        let changed = *current != value;
        if changed {
            *current = value;
        }
        changed
    });
}
