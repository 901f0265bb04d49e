//! Holds published ports, so that no other process takes them, and says who has those that are
//! taken.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use socket2::{Domain, Socket, Type};
use weft_model::{Family, Protocol};
use weft_vxlan::{Namespace, NamespaceError};

use super::owner::{self, Holding, Owner};
use crate::{HostPort, board::Board};

/// A port of the host that somebody else has.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("port {port} of this host is in use by {}: stop it, or publish another port", name(owner.as_ref()))]
pub struct Taken {
    pub port: HostPort,
    /// Absent if nothing in `/proc` tells.
    pub owner: Option<Owner>,
}

/// Why a port could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    #[error(transparent)]
    Taken(#[from] Taken),
    #[error("failed to look at port {port} of this host")]
    Bind { port: HostPort, source: io::Error },
    #[error("failed to look at the ports of this host")]
    Namespace(#[from] NamespaceError),
}

/// The ports of the host, for whoever wants to publish one.
#[derive(Clone, Debug)]
pub struct HostPorts {
    namespace: Namespace,
    board: Board,
}

impl HostPorts {
    pub(crate) fn new(namespace: Namespace, board: Board) -> Self {
        Self { namespace, board }
    }

    /// Whether `port` could be published now, as far as other processes go: two services that want
    /// the same port are no matter of the kernel's. Blocks for about 0.2 ms, and for as long as it
    /// takes to look through all processes if the port is taken.
    ///
    /// # Errors
    ///
    /// Somebody has it, or that cannot be found out.
    pub fn check(&self, port: &HostPort) -> Result<(), PortError> {
        let ours = |own: &HostPort| {
            let HostPort { family, protocol, port: number, .. } = *own;
            (family, protocol, number) == (port.family, port.protocol, port.port)
        };
        if self.board.subscribe().borrow().host.open.iter().any(ours) {
            return Ok(());
        }
        self.namespace.run(|| match bind(port) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => match owner::find(port) {
                Holding::Connections => Ok(()),
                Holding::Serving(owner) => Err(Taken { port: *port, owner }.into()),
                Holding::Silent => Err(Taken { port: *port, owner: None }.into()),
            },
            Err(source) => Err(PortError::Bind { port: *port, source }),
        })
    }
}

/// The sockets that keep ports from others.
#[derive(Debug, Default)]
pub(crate) struct Holder {
    held: BTreeMap<HostPort, Socket>,
}

/// What became of ports that were to be held.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Those of somebody else.
    pub(crate) taken: BTreeMap<HostPort, Taken>,
    /// Whether there are some that are free, but cannot be held yet, or that cannot be held at all.
    pub(crate) pending: bool,
}

impl Held {
    /// Adds what became of other ports.
    pub(crate) fn join(&mut self, other: Self) {
        self.taken.extend(other.taken);
        self.pending |= other.pending;
    }
}

impl Holder {
    /// Holds `wanted`, and no other.
    pub(crate) fn follow<'a>(
        &mut self,
        namespace: &Namespace,
        wanted: impl Iterator<Item = &'a HostPort> + Clone,
    ) -> Result<Held, NamespaceError> {
        let mut missing: Vec<_> = wanted.copied().collect();
        self.held.retain(|port, _| missing.contains(port));
        missing.retain(|port| !self.held.contains_key(port));
        let mut held = Held::default();
        if missing.is_empty() {
            return Ok(held);
        }
        let attempts: Vec<_> = namespace.run(|| {
            let attempt = |port: &HostPort| {
                let in_use = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
                bind(port).map_err(|error| (in_use(&error).then(|| owner::find(port)), error))
            };
            let attempts = missing.iter().map(|port| (*port, attempt(port)));
            Ok::<_, NamespaceError>(attempts.collect())
        })?;
        for (port, attempt) in attempts {
            match attempt {
                Ok(socket) => drop(self.held.insert(port, socket)),
                Err((Some(Holding::Serving(owner)), _)) => {
                    held.taken.insert(port, Taken { port, owner });
                }
                Err((Some(Holding::Silent), _)) => {
                    held.taken.insert(port, Taken { port, owner: None });
                }
                // Nobody serves there: the port leads where it shall, held or not.
                Err((Some(Holding::Connections), _)) => held.pending = true,
                Err((None, error)) => {
                    tracing::debug!(%port, %error, "a published port is not held");
                    held.pending = true;
                }
            }
        }
        Ok(held)
    }
}

/// Binds a socket to the port, and does no more: nobody else gets it, and nobody who asks there is
/// answered by it.
fn bind(port: &HostPort) -> io::Result<Socket> {
    let address = address_of(port);
    let kind = match port.protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    // Without SO_REUSEADDR: two sockets that have it, and of which none listens, share a port.
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if port.family == Family::V6 {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        // The host may get the address later.
        socket.set_freebind_v4(true)?;
    }
    if port.protocol == Protocol::Udp {
        // Nobody reads it.
        socket.set_recv_buffer_size(0)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// What a socket is bound to that shall have the port.
pub(super) fn address_of(port: &HostPort) -> SocketAddr {
    let any = match port.family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    SocketAddr::new(port.ip.unwrap_or(any), port.port)
}

fn name(owner: Option<&Owner>) -> String {
    owner.map_or_else(|| "a process that cannot be told".into(), ToString::to_string)
}
