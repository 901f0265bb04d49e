//! Answers names in containers without any option of Docker's: at 127.0.0.11, before Docker's own
//! resolver there, which is asked for all that is not the cluster's.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use weft_dns::Fallback;
use weft_model::NetworkId;
use weft_vxlan::{DnsRedirect, KernelError, Namespace, NamespaceError, redirect_dns};

use super::driver::Driver;
use crate::{
    chain::Chain,
    listeners::{ListenError, Listeners},
};

/// Where Docker's resolver is in every sandbox.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// How often a sandbox is looked at while it is being made: it is there before its first process.
const EAGER: Duration = Duration::from_millis(10);
/// How long a sandbox is looked at that often.
const EAGER_FOR: Duration = Duration::from_secs(15);
/// How often all is looked at again.
const RESYNC: Duration = Duration::from_secs(5);

/// A sandbox, as the one who asks there: its address in one of its networks. The directory knows the
/// others.
type Asker = (NetworkId, IpAddr);

/// Serves every sandbox that is joined to one of weft's networks, until `stop`; then Docker's own
/// resolver has them again.
pub(super) async fn serve(driver: Arc<Driver>, listeners: Listeners, stop: CancellationToken) {
    let mut changed = driver.changed.subscribe();
    let mut resolvers = Resolvers { listeners, served: BTreeMap::new(), awaited: BTreeMap::new() };
    let mut resync = time::interval(RESYNC);
    resync.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        resolvers.serve_all(askers(&driver).await).await;
        let is_eager = resolvers.is_eager();
        tokio::select! {
            () = stop.cancelled() => break,
            Ok(()) = changed.changed() => {}
            () = time::sleep(EAGER), if is_eager => {}
            _ = resync.tick() => resolvers.forget_silent().await,
        }
    }
}

/// Who asks in each sandbox.
async fn askers(driver: &Driver) -> BTreeMap<PathBuf, Vec<Asker>> {
    driver
        .registry
        .read(|known| {
            let mut askers: BTreeMap<PathBuf, Vec<Asker>> = BTreeMap::new();
            for endpoint in known.endpoints.values() {
                let network = known.network_of(endpoint);
                let (Some(joined), Some(network)) = (&endpoint.joined, network) else { continue };
                if let Some(ip) = endpoint.addresses.first() {
                    askers.entry(joined.sandbox.clone()).or_default().push((network, *ip));
                }
            }
            askers
        })
        .await
}

struct Resolvers {
    listeners: Listeners,
    served: BTreeMap<PathBuf, Served>,
    /// Sandboxes that cannot be served yet.
    awaited: BTreeMap<PathBuf, Awaited>,
}

struct Awaited {
    since: Instant,
    reported: bool,
}

struct Served {
    asker: Asker,
    socket: SocketAddr,
    /// Without it, Docker's own resolver has the sandbox.
    _redirect: DnsRedirect,
}

impl Resolvers {
    async fn serve_all(&mut self, wanted: BTreeMap<PathBuf, Vec<Asker>>) {
        let ended: Vec<PathBuf> =
            self.served.keys().filter(|path| !wanted.contains_key(*path)).cloned().collect();
        for path in ended {
            self.give_back(&path).await;
        }
        self.awaited.retain(|path, _| wanted.contains_key(path));
        for (path, askers) in wanted {
            if self.served.get(&path).is_some_and(|served| askers.contains(&served.asker)) {
                continue;
            }
            self.give_back(&path).await;
            match self.serve(&path, askers[0]).await {
                Ok(served) => {
                    self.awaited.remove(&path);
                    self.served.insert(path, served);
                }
                Err(error) => self.note_failure(path, &error),
            }
        }
    }

    /// Lets go of sandboxes whose sockets were closed: a network's go all at once when its namespace
    /// is made anew.
    async fn forget_silent(&mut self) {
        let mut silent = Vec::new();
        for (path, served) in &self.served {
            if !self.listeners.is_answering(served.asker.0, served.socket).await {
                silent.push(path.clone());
            }
        }
        self.served.retain(|path, _| !silent.contains(path));
    }

    /// Takes the queries of one sandbox.
    async fn serve(&self, path: &Path, asker: Asker) -> Result<Served, ServeError> {
        let namespace = Namespace::open(path)?;
        let inside = namespace.clone();
        let (sockets, docker) = namespace
            .run_async(move || -> Result<_, ServeError> {
                let docker = Ports::of_docker()?.ok_or(ServeError::NoResolver)?;
                let socket = SocketAddrV4::new(RESOLVER, 0);
                Ok(((UdpSocket::bind(socket)?, TcpListener::bind(socket)?), docker))
            })
            .await?;
        let socket = sockets.0.local_addr()?;
        let (udp, tcp) = (socket.port(), sockets.1.local_addr()?.port());
        let (network, ip) = asker;
        let fallback = docker.fallback(&inside);
        self.listeners.listen_in_sandbox(network, ip, Some(fallback), sockets).await?;
        let redirected =
            tokio::task::spawn_blocking(move || redirect_dns(&inside, RESOLVER, udp, tcp));
        match redirected.await.unwrap_or_else(|p| std::panic::resume_unwind(p.into_panic())) {
            Ok(redirect) => {
                tracing::debug!(sandbox = %path.display(), address = %ip, "answers names in the sandbox");
                Ok(Served { asker, socket, _redirect: redirect })
            }
            Err(error) => {
                self.listeners.unlisten_in_sandbox(network, ip).await;
                Err(error.into())
            }
        }
    }

    /// Leaves a sandbox to Docker's own resolver, if it is served.
    async fn give_back(&mut self, path: &Path) {
        let Some(Served { asker: (network, ip), _redirect: redirect, .. }) =
            self.served.remove(path)
        else {
            return;
        };
        // Before the sockets: in between, nobody would answer. The kernel takes its time over it.
        let ended = tokio::task::spawn_blocking(move || drop(redirect));
        if let Err(panic) = ended.await {
            std::panic::resume_unwind(panic.into_panic());
        }
        self.listeners.unlisten_in_sandbox(network, ip).await;
    }

    fn note_failure(&mut self, path: PathBuf, error: &ServeError) {
        let sandbox = path.display().to_string();
        let new = || Awaited { since: Instant::now(), reported: false };
        let awaited = self.awaited.entry(path).or_insert_with(new);
        // A sandbox that Docker is still making is no fault.
        if awaited.since.elapsed() > EAGER_FOR && !std::mem::replace(&mut awaited.reported, true) {
            let error = Chain(error);
            tracing::warn!(%sandbox, %error, "names of other hosts are not answered in the sandbox");
        }
    }

    /// Whether Docker is making a sandbox.
    fn is_eager(&self) -> bool {
        self.awaited.values().any(|awaited| awaited.since.elapsed() < EAGER_FOR)
    }
}

/// The ports of Docker's resolver in one sandbox; they differ from sandbox to sandbox.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Ports {
    udp: u16,
    tcp: u16,
}

impl Ports {
    /// Looks for Docker's resolver in the namespace of the calling thread; nothing if it is not
    /// there (yet).
    fn of_docker() -> io::Result<Option<Self>> {
        let udp = fs::read_to_string("/proc/thread-self/net/udp")?;
        let tcp = fs::read_to_string("/proc/thread-self/net/tcp")?;
        Ok(port_of(&udp, UNCONNECTED)
            .zip(port_of(&tcp, LISTEN))
            .map(|(udp, tcp)| Self { udp, tcp }))
    }

    fn fallback(self, sandbox: &Namespace) -> Fallback {
        let (for_udp, for_tcp) = (sandbox.clone(), sandbox.clone());
        Fallback {
            udp: Arc::new(move || {
                let namespace = for_udp.clone();
                Box::pin(async move {
                    let open = move || -> Result<_, ServeError> {
                        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                        socket.connect((RESOLVER, self.udp))?;
                        Ok(socket)
                    };
                    namespace.run_async(open).await.map_err(io::Error::other)
                })
            }),
            tcp: Arc::new(move || {
                let namespace = for_tcp.clone();
                Box::pin(async move {
                    let open = move || -> Result<_, ServeError> {
                        Ok(TcpStream::connect((RESOLVER, self.tcp))?)
                    };
                    namespace.run_async(open).await.map_err(io::Error::other)
                })
            }),
        }
    }
}

/// States of sockets in `/proc/net`, include/net/tcp_states.h.
const UNCONNECTED: &str = "07";
const LISTEN: &str = "0A";

/// The local port of the socket at Docker's resolver address in a table of `/proc/net`.
fn port_of(table: &str, state: &str) -> Option<u16> {
    // Addresses are printed as the number that they are in memory.
    let resolver = format!("{:08X}:", u32::from_ne_bytes(RESOLVER.octets()));
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, _remote, found) = (fields.next()?, fields.next()?, fields.next()?);
        let port = local.strip_prefix(&resolver).filter(|_| found == state)?;
        u16::from_str_radix(port, 16).ok()
    })
}

/// Why a sandbox is not served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("Docker has no resolver in it")]
    NoResolver,
    #[error("cannot open a socket in it")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("cannot redirect its queries")]
    Redirect(#[from] KernelError),
}

#[cfg(test)]
mod tests {
    use super::*;

    const UDP: &str = "\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
  340: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0
  412: 0B00007F:9C41 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 2 2 0 0
";

    #[test]
    fn dockers_resolver_is_found_by_its_address() {
        assert_eq!(port_of(UDP, UNCONNECTED), Some(0x9C41));
        assert_eq!(port_of(UDP, LISTEN), None);
        assert_eq!(port_of("", UNCONNECTED), None);
    }
}
