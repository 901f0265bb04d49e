//! Answers names in every network of this host: makes the sockets in the network's namespace and
//! hands them to the DNS server.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    sync::{Arc, PoisonError},
};

use tokio::sync::Mutex;
use tokio_util::task::TaskTracker;
use weft_dns::Server;
use weft_model::NetworkId;
use weft_vxlan::DataPlane;

const DNS_PORT: u16 = 53;

/// The DNS listeners of all networks. Clones share them.
#[derive(Clone)]
pub struct Listeners {
    plane: DataPlane,
    server: Arc<Mutex<Server>>,
    /// The networks that are served, for a look without waiting.
    served: Arc<std::sync::Mutex<BTreeMap<NetworkId, Vec<IpAddr>>>>,
    tracker: TaskTracker,
}

impl Listeners {
    pub fn new(plane: DataPlane, server: Server, tracker: TaskTracker) -> Self {
        let server = Arc::new(Mutex::new(server));
        Self { plane, server, served: Arc::default(), tracker }
    }

    /// Serves `network` on its gateway addresses; nothing is done where it is served already.
    ///
    /// # Errors
    ///
    /// A socket cannot be made or used; those made before stay.
    pub async fn listen(&self, network: NetworkId, gateways: &[IpAddr]) -> Result<(), ListenError> {
        for gateway in gateways {
            // Held over the whole: two endpoints of one network come at once.
            let mut server = self.server.lock().await;
            if self.serves(network, *gateway) {
                continue;
            }
            let address = SocketAddr::from((*gateway, DNS_PORT));
            let failed = move |source| ListenError::Socket { network, address, source };
            let bind = move || -> io::Result<_> {
                Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?))
            };
            let sockets = self.plane.socket_in(network, move || bind().map_err(failed));
            let (udp, tcp) = sockets.await?;
            server
                .listen(network, udp, tcp)
                .map_err(|source| ListenError::Serve { network, source })?;
            self.served_mut().entry(network).or_default().push(*gateway);
        }
        Ok(())
    }

    /// Stops serving networks that are not in `active`.
    pub fn retain(&self, active: &BTreeSet<NetworkId>) {
        let mut served = self.served_mut();
        let ended: Vec<NetworkId> =
            served.keys().filter(|network| !active.contains(network)).copied().collect();
        for network in ended {
            served.remove(&network);
            let server = Arc::clone(&self.server);
            self.tracker.spawn(async move { server.lock().await.unlisten(network).await });
        }
    }

    pub async fn counters(&self) -> weft_dns::Snapshot {
        self.server.lock().await.counters().snapshot()
    }

    fn serves(&self, network: NetworkId, gateway: IpAddr) -> bool {
        self.served_mut().get(&network).is_some_and(|gateways| gateways.contains(&gateway))
    }

    fn served_mut(&self) -> std::sync::MutexGuard<'_, BTreeMap<NetworkId, Vec<IpAddr>>> {
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
