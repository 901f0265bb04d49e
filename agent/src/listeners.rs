//! Answers names in every network of this host: makes the sockets in the network's namespace and
//! hands them to the DNS server.

pub mod sandboxes;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    sync::{Arc, PoisonError},
};

use tokio::sync::Mutex;
use tokio_util::task::TaskTracker;
use weft_dns::{Fallback, Server};
use weft_model::NetworkId;
use weft_vxlan::{DataPlane, Namespace};

const DNS_PORT: u16 = 53;

/// The DNS listeners of all networks. Clones share them.
#[derive(Clone)]
pub struct Listeners {
    plane: DataPlane,
    server: Arc<Mutex<Server>>,
    /// The networks that are served, for a look without waiting.
    served: Arc<std::sync::Mutex<BTreeMap<NetworkId, Served>>>,
    tracker: TaskTracker,
}

/// What a network is served on.
struct Served {
    namespace: Namespace,
    gateways: Vec<IpAddr>,
}

impl Listeners {
    pub fn new(plane: DataPlane, server: Server, tracker: TaskTracker) -> Self {
        let server = Arc::new(Mutex::new(server));
        Self { plane, server, served: Arc::default(), tracker }
    }

    /// Serves `network` on its gateway addresses; nothing is done where it is served already.
    /// Sockets in a namespace that is no longer the network's are given up first.
    ///
    /// # Errors
    ///
    /// A socket cannot be made or used; those made before stay.
    pub async fn listen(&self, network: NetworkId, gateways: &[IpAddr]) -> Result<(), ListenError> {
        // Held over the whole: two endpoints of one network come at once.
        let mut server = self.server.lock().await;
        if self.is_serving(network, gateways) {
            return Ok(());
        }
        let namespace = self.plane.namespace(network)?;
        let current = self.served_mut().get(&network).is_some_and(|s| s.namespace.is(&namespace));
        if !current {
            self.served_mut().remove(&network);
            server.unlisten(network).await;
        }
        for &gateway in gateways {
            let made =
                self.served_mut().get(&network).is_some_and(|s| s.gateways.contains(&gateway));
            if made {
                continue;
            }
            let address = SocketAddr::from((gateway, DNS_PORT));
            let failed = move |source| ListenError::Socket { network, address, source };
            let bind = move || -> io::Result<_> {
                Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?))
            };
            let (udp, tcp) = namespace.run_async(move || bind().map_err(failed)).await?;
            server
                .listen(network, udp, tcp)
                .map_err(|source| ListenError::Serve { network, source })?;
            let mut served = self.served_mut();
            let entry = served
                .entry(network)
                .or_insert_with(|| Served { namespace: namespace.clone(), gateways: Vec::new() });
            entry.gateways.push(gateway);
        }
        Ok(())
    }

    /// Serves one sandbox on sockets inside its own namespace; what is not the cluster's goes to
    /// `fallback`, or to the host's resolvers.
    ///
    /// # Errors
    ///
    /// The sockets cannot be used.
    pub async fn listen_in_sandbox(
        &self,
        network: NetworkId,
        address: IpAddr,
        fallback: Option<Fallback>,
        (udp, tcp): (UdpSocket, TcpListener),
    ) -> Result<(), ListenError> {
        let mut server = self.server.lock().await;
        server
            .listen_in_sandbox(network, address, fallback, udp, tcp)
            .map_err(|source| ListenError::Serve { network, source })?;
        Ok(())
    }

    /// Whether somebody answers at `socket` in a sandbox of `network`.
    pub async fn is_answering(&self, network: NetworkId, socket: SocketAddr) -> bool {
        self.server.lock().await.listening().any(|listening| listening == (network, socket))
    }

    /// Stops serving the sandbox with `address` in `network`.
    pub async fn unlisten_in_sandbox(&self, network: NetworkId, address: IpAddr) {
        self.server.lock().await.unlisten_in_sandbox(network, address).await;
    }

    /// Whether `network` is served on all of `gateways`, in the namespace that it has now.
    pub fn is_serving(&self, network: NetworkId, gateways: &[IpAddr]) -> bool {
        let Ok(now) = self.plane.namespace(network) else { return false };
        self.served_mut().get(&network).is_some_and(|served| {
            served.namespace.is(&now) && gateways.iter().all(|ip| served.gateways.contains(ip))
        })
    }

    /// Stops serving networks that are not in `active`.
    pub fn retain(&self, active: &BTreeSet<NetworkId>) {
        let mut served = self.served_mut();
        let ended: Vec<NetworkId> =
            served.keys().filter(|network| !active.contains(network)).copied().collect();
        for network in ended {
            served.remove(&network);
            let listeners = self.clone();
            self.tracker.spawn(async move {
                let mut server = listeners.server.lock().await;
                // It may have come back since; then its sockets are new ones.
                if !listeners.served_mut().contains_key(&network) {
                    server.unlisten(network).await;
                }
            });
        }
    }

    pub async fn counters(&self) -> weft_dns::Snapshot {
        self.server.lock().await.counters().snapshot()
    }

    fn served_mut(&self) -> std::sync::MutexGuard<'_, BTreeMap<NetworkId, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot answer names of network {} on {address}", network.short())]
    Socket { network: NetworkId, address: SocketAddr, source: io::Error },
    #[error("cannot answer names")]
    Namespace(#[from] weft_vxlan::NamespaceError),
    #[error("cannot answer names of network {}", network.short())]
    Serve { network: NetworkId, source: weft_dns::ListenError },
}
