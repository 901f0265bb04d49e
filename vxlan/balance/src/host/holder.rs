//! Holds published ports, so that no other process takes them, and says who has those that are
//! taken.

use std::{
    collections::{BTreeMap, BTreeSet},
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

    /// Those of `ports` that could not be published now, as far as other processes go: two services
    /// that want the same port are no matter of the kernel's.
    ///
    /// Blocks: for some 10 us a port, and once, if one is taken, for as long as it takes to look
    /// through all processes, milliseconds to seconds.
    ///
    /// # Errors
    ///
    /// The host's namespace cannot be entered.
    pub fn survey(
        &self,
        ports: &BTreeSet<HostPort>,
    ) -> Result<BTreeMap<HostPort, Taken>, NamespaceError> {
        let place = |port: &HostPort| (port.family, port.protocol, port.port);
        let ours: BTreeSet<_> =
            self.board.subscribe().borrow().host.open.iter().map(place).collect();
        let others: Vec<HostPort> =
            ports.iter().filter(|port| !ours.contains(&place(port))).copied().collect();
        let attempts = self.namespace.run(|| Ok::<_, NamespaceError>(attempt(&others, bind)))?;
        let taken = attempts.into_iter().filter_map(|(port, attempt)| match attempt.err()? {
            (Some(Holding::Serving(owner)), _) => Some((port, Taken { port, owner })),
            (Some(Holding::Silent), _) => Some((port, Taken { port, owner: None })),
            (Some(Holding::Connections), _) => None,
            // An address that is not this host's, for one.
            (None, error) => {
                tracing::debug!(%port, %error, "cannot look at a port");
                None
            }
        });
        Ok(taken.collect())
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
        let wanted: BTreeSet<_> = wanted.copied().collect();
        self.held.retain(|port, _| wanted.contains(port));
        let missing: Vec<_> =
            wanted.into_iter().filter(|port| !self.held.contains_key(port)).collect();
        let mut held = Held::default();
        if missing.is_empty() {
            return Ok(held);
        }
        let attempts = namespace.run(|| Ok::<_, NamespaceError>(attempt(&missing, bind)))?;
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

/// A port, and the socket that it was given; else why not, and who has it where it is in use.
pub(super) type Attempt<S> = (HostPort, Result<S, (Option<Holding>, io::Error)>);

/// Tries to `open` a socket at each port, in the calling thread's namespace, and looks once for who
/// has those that are in use.
pub(super) fn attempt<S>(
    ports: &[HostPort],
    open: impl Fn(&HostPort) -> io::Result<S>,
) -> Vec<Attempt<S>> {
    let opened: Vec<_> = ports.iter().map(|port| (*port, open(port))).collect();
    let in_use = |(port, opened): &(HostPort, io::Result<S>)| {
        let error = opened.as_ref().err()?;
        (error.kind() == io::ErrorKind::AddrInUse).then_some(*port)
    };
    let mut holdings = owner::find(&opened.iter().filter_map(in_use).collect());
    let attempts = opened.into_iter();
    attempts
        .map(|(port, opened)| (port, opened.map_err(|error| (holdings.remove(&port), error))))
        .collect()
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
