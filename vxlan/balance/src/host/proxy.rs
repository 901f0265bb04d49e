//! Ports whose connections this process makes itself, and tells the backend of each who its client
//! is: PROXY protocol, version 2 (HAProxy's `doc/proxy-protocol.txt`, §2.2).
//!
//! A connection goes on to where the kernel's translation would lead it, so the choice of a backend,
//! its health and its drain are what they are for every other.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncWriteExt as _, copy_bidirectional_with_sizes},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, watch},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_vxlan::{Namespace, NamespaceError};

use super::{
    holder::{Held, Taken, address_of, attempt},
    owner::Holding,
};
use crate::HostPort;

/// The ports that are proxied now.
#[derive(Debug)]
pub(super) struct Proxies {
    namespace: Namespace,
    /// Whether the threads of this process are in the namespace anyway.
    at_home: bool,
    tracker: TaskTracker,
    stop: CancellationToken,
    room: Arc<Semaphore>,
    listeners: BTreeMap<HostPort, Listening>,
}

/// One port. Its connections go on when it is dropped; no new ones come.
#[derive(Debug)]
struct Listening {
    to: watch::Sender<SocketAddr>,
}

/// What every connection of a port needs.
#[derive(Clone, Debug)]
struct Errand {
    namespace: Namespace,
    at_home: bool,
    room: Arc<Semaphore>,
}

impl Proxies {
    pub(super) fn new(namespace: Namespace, tracker: TaskTracker, stop: CancellationToken) -> Self {
        let at_home = Namespace::current().is_ok_and(|current| current.is(&namespace));
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        Self { namespace, at_home, tracker, stop, room, listeners: BTreeMap::new() }
    }

    /// Proxies `wanted`, and no other.
    pub(super) async fn follow(
        &mut self,
        wanted: &BTreeMap<HostPort, SocketAddr>,
    ) -> Result<Held, NamespaceError> {
        self.listeners.retain(|port, _| wanted.contains_key(port));
        let mut held = Held::default();
        let mut missing = Vec::new();
        for (&port, &to) in wanted {
            match self.listeners.get(&port) {
                Some(Listening { to: current }) => {
                    current.send_if_modified(|current| std::mem::replace(current, to) != to);
                }
                None => missing.push(port),
            }
        }
        if missing.is_empty() {
            return Ok(held);
        }
        let attempts = self
            .namespace
            .run_async(move || Ok::<_, NamespaceError>(attempt(&missing, listen)))
            .await?;
        for (port, opened) in attempts {
            let to = wanted[&port];
            let listener = opened
                .and_then(|socket| TcpListener::from_std(socket).map_err(|error| (None, error)));
            match listener {
                Ok(listener) => self.start(port, to, listener),
                Err((Some(Holding::Serving(owner)), _)) => {
                    held.taken.insert(port, Taken { port, owner });
                }
                Err((_, error)) => {
                    tracing::debug!(%port, %error, "a published port cannot be listened at yet");
                    held.pending = true;
                }
            }
        }
        Ok(held)
    }

    /// The ports that are listened at.
    pub(super) fn open(&self) -> impl Iterator<Item = HostPort> {
        self.listeners.keys().copied()
    }

    fn start(&mut self, port: HostPort, to: SocketAddr, listener: TcpListener) {
        let (to, followed) = watch::channel(to);
        let Self { namespace, at_home, room, tracker, stop, .. } = self;
        let errand =
            Errand { namespace: namespace.clone(), at_home: *at_home, room: Arc::clone(room) };
        let accepting = accept(listener, followed, errand, tracker.clone(), stop.clone());
        tracker.spawn(accepting);
        self.listeners.insert(port, Listening { to });
    }
}

/// Accepts connections until nobody wants them any more.
async fn accept(
    listener: TcpListener,
    mut to: watch::Receiver<SocketAddr>,
    errand: Errand,
    tracker: TaskTracker,
    stop: CancellationToken,
) {
    loop {
        // Whoever comes while there are too many waits in the listener's queue.
        let Ok(room) = Arc::clone(&errand.room).acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
            () = gone(&mut to) => return,
        };
        let (client, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Its client has gone, or files have run out: in either case others may fare better.
                tracing::debug!(%error, "a connection to a proxied port was not accepted");
                time::sleep(PAUSE).await;
                continue;
            }
        };
        let (to, errand, stop) = (*to.borrow(), errand.clone(), stop.clone());
        tracker.spawn(async move {
            let carried = carry(client, peer, to, &errand);
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = carried => outcome,
            };
            if let Err(error) = outcome {
                tracing::debug!(%error, "a proxied connection ended early");
            }
            drop(room);
        });
    }
}

/// Waits until the port is not wanted any more.
async fn gone(to: &mut watch::Receiver<SocketAddr>) {
    while to.changed().await.is_ok() {}
}

/// Connects a client with its backend until both have said all.
async fn carry(
    mut client: TcpStream,
    peer: SocketAddr,
    to: SocketAddr,
    errand: &Errand,
) -> io::Result<()> {
    let header = header(peer, client.local_addr()?);
    let connected = async {
        let mut backend = errand.socket(to).await?.connect(to).await?;
        backend.write_all(&header).await?;
        Ok::<_, io::Error>(backend)
    };
    let connected = match time::timeout(PATIENCE, connected).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    let mut backend = match connected {
        Ok(backend) => backend,
        Err(error) => {
            // As if the client had been refused, which is what has happened.
            client.set_zero_linger()?;
            return Err(error);
        }
    };
    for stream in [&client, &backend] {
        stream.set_nodelay(true)?;
    }
    copy_bidirectional_with_sizes(&mut client, &mut backend, BUFFER, BUFFER).await.map(drop)
}

impl Errand {
    /// A socket in the host's namespace.
    async fn socket(&self, to: SocketAddr) -> io::Result<TcpSocket> {
        let new = move || if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        match self.at_home {
            true => new(),
            false => {
                let made = self.namespace.run_async(move || Ok::<_, NamespaceError>(new())).await;
                made.map_err(io::Error::other)?
            }
        }
    }
}

fn listen(port: &HostPort) -> io::Result<std::net::TcpListener> {
    let address = address_of(port);
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    // Connections of a predecessor that have ended a moment ago are no obstacle.
    socket.set_reuse_address(true)?;
    match domain {
        Domain::IPV6 => {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
        }
        _ => socket.set_freebind_v4(true)?,
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// What is said in front of what the client says: that it is `client`, and has come to `at`.
fn header(client: SocketAddr, at: SocketAddr) -> Vec<u8> {
    let mut header = Vec::from(SIGNATURE);
    header.push(VERSION_2_PROXY);
    match (client.ip(), at.ip()) {
        (IpAddr::V4(client), IpAddr::V4(at)) => {
            header.extend([TCP_OVER_IPV4, 0, 12]);
            header.extend([client.octets(), at.octets()].concat());
        }
        (client, at) => {
            let v6 = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            header.extend([TCP_OVER_IPV6, 0, 36]);
            header.extend([v6(client), v6(at)].concat());
        }
    }
    header.extend(client.port().to_be_bytes());
    header.extend(at.port().to_be_bytes());
    header
}

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const VERSION_2_PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// Of all ports together; each takes two files and two buffers.
const MOST_CONNECTIONS: usize = 8192;
const BACKLOG: i32 = 1024;
const BUFFER: usize = 32 << 10;
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_as_the_protocol_has_it() {
        let header =
            |client: &str, at: &str| hex(&header(client.parse().unwrap(), at.parse().unwrap()));
        assert_eq!(
            header("192.0.2.9:50000", "192.0.2.1:80"),
            "0d0a0d0a000d0a515549540a2111000cc0000209c0000201c3500050"
        );
        assert_eq!(
            header("[2001:db8::9]:50000", "[2001:db8::1]:443"),
            "0d0a0d0a000d0a515549540a21210024\
             20010db800000000000000000000000920010db8000000000000000000000001c35001bb"
        );
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
