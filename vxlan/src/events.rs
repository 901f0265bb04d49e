//! What wakes the reconcilers: changes that the kernel tells of.

use std::io;

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    Socket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use tokio::io::unix::AsyncFd;

use crate::{
    namespace::Namespace,
    netlink::{NetlinkError, enlarge, messages},
};

/// The notifications of one namespace.
#[derive(Debug)]
pub(crate) struct Events {
    route: AsyncFd<Socket>,
    rules: AsyncFd<Socket>,
}

/// What has changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Change {
    Links,
    Rules,
}

impl Events {
    pub(crate) fn open(namespace: &Namespace) -> Result<Self, NetlinkError> {
        let socket = |protocol, groups: &'static [u32]| {
            let socket = namespace.run(|| {
                let mut socket = Socket::new(protocol)?;
                socket.bind_auto()?;
                for &group in groups {
                    socket.add_membership(group)?;
                }
                socket.set_non_blocking(true)?;
                Ok::<_, NetlinkError>(socket)
            })?;
            enlarge(&socket);
            Ok::<_, NetlinkError>(AsyncFd::new(socket)?)
        };
        Ok(Self {
            route: socket(NETLINK_ROUTE, &[RTNLGRP_LINK, RTNLGRP_NEIGH])?,
            rules: socket(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?,
        })
    }

    /// Waits for a change. Cancel-safe: what was read and not reported yet is a change that the
    /// next pass, which a cancelled wait leads to, sees anyway.
    pub(crate) async fn changed(&mut self) -> Change {
        loop {
            let (change, relevant) = tokio::select! {
                relevant = drain(&self.route, is_loss) => (Change::Links, relevant),
                relevant = drain(&self.rules, |_| true) => (Change::Rules, relevant),
            };
            if relevant {
                return change;
            }
        }
    }

    /// Forgets what has been told so far.
    pub(crate) async fn settle(&mut self) {
        loop {
            tokio::select! {
                biased;
                _ = drain(&self.route, |_| true) => {}
                _ = drain(&self.rules, |_| true) => {}
                () = std::future::ready(()) => return,
            }
        }
    }
}

/// Reads all that is there; tells whether any of it is relevant. What was lost counts as relevant.
async fn drain(socket: &AsyncFd<Socket>, relevant: impl Fn(&[u8]) -> bool) -> bool {
    let mut found = false;
    let mut buffer = vec![0u8; DATAGRAM];
    loop {
        let Ok(mut ready) = socket.readable().await else { return true };
        let received = ready.try_io(|socket| {
            let mut buffer = &mut buffer[..];
            match socket.get_ref().recv_from(&mut buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
                other => Ok(other),
            }
        });
        match received {
            Err(_would_block) => return found,
            Ok(Ok(Ok((length, _)))) => found |= relevant(&buffer[..length.min(DATAGRAM)]),
            // ENOBUFS: some were dropped.
            Ok(_) => found = true,
        }
    }
}

/// Whether a link or a neighbour entry has gone, or a link has changed. Additions of neighbours
/// are the reconcilers' own.
fn is_loss(datagram: &[u8]) -> bool {
    messages(datagram).iter().any(|message| {
        matches!(
            message.payload,
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewLink(_)
                    | RouteNetlinkMessage::DelLink(_)
                    | RouteNetlinkMessage::DelNeighbour(_)
            )
        )
    })
}

/// `include/uapi/linux/rtnetlink.h`, `include/uapi/linux/netfilter/nfnetlink.h`.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const NFNLGRP_NFTABLES: u32 = 7;
const DATAGRAM: usize = 64 << 10;
