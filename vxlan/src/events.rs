//! What wakes the reconcilers: changes that the kernel tells of.

use std::io;

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, TokioSocket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use tokio::runtime::Handle;

use crate::{
    namespace::Namespace,
    netlink::{NetlinkError, enlarge, messages},
};

/// The notifications of one namespace.
pub(crate) struct Events {
    route: TokioSocket,
    rules: TokioSocket,
}

/// What has changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Change {
    Links,
    Rules,
}

impl Events {
    /// Must be called inside a tokio runtime.
    pub(crate) fn open(namespace: &Namespace) -> Result<Self, NetlinkError> {
        Ok(Self {
            route: open(namespace, NETLINK_ROUTE, &[RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_NSID])?,
            rules: open(namespace, NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?,
        })
    }

    /// Waits for a change. Cancel-safe: what was read and not reported yet is a change that the
    /// next pass, which a cancelled wait leads to, sees anyway.
    pub(crate) async fn changed(&mut self) -> Change {
        loop {
            let (mut route, mut rules) =
                (Vec::with_capacity(DATAGRAM), Vec::with_capacity(DATAGRAM));
            // An error is ENOBUFS: some were dropped, and they may have been of interest.
            tokio::select! {
                read = self.route.recv_from(&mut route) => {
                    if read.is_err() || is_loss(&route) || drain(&mut self.route, is_loss) {
                        return Change::Links;
                    }
                }
                _ = self.rules.recv_from(&mut rules) => return Change::Rules,
            }
        }
    }

    /// Forgets what has been told so far.
    pub(crate) fn settle(&mut self) {
        drain(&mut self.route, is_loss);
        // Not routing messages: what they say is not looked at.
        drain(&mut self.rules, |_| true);
    }
}

fn open(
    namespace: &Namespace,
    protocol: isize,
    groups: &[u32],
) -> Result<TokioSocket, NetlinkError> {
    let runtime = Handle::current();
    namespace.run(|| {
        let _context = runtime.enter();
        let mut socket = TokioSocket::new(protocol)?;
        socket.socket_mut().bind_auto()?;
        for &group in groups {
            socket.socket_mut().add_membership(group)?;
        }
        enlarge(socket.socket_ref());
        Ok(socket)
    })
}

/// Reads all that is there; tells whether any of it is of interest.
fn drain(socket: &mut TokioSocket, interesting: impl Fn(&[u8]) -> bool) -> bool {
    let mut found = false;
    let mut buffer = Vec::with_capacity(DATAGRAM);
    loop {
        buffer.clear();
        match socket.socket_ref().recv_from(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => found |= interesting(&buffer),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return found,
            Err(_) => return true,
        }
    }
}

/// Whether a link, a neighbour entry or a sandbox has gone, or a link has changed. Additions of neighbours
/// are the reconcilers' own.
fn is_loss(datagram: &[u8]) -> bool {
    messages(datagram).iter().any(|message| {
        matches!(
            message.payload,
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewLink(_)
                    | RouteNetlinkMessage::DelLink(_)
                    | RouteNetlinkMessage::DelNeighbour(_)
                    | RouteNetlinkMessage::DelNsId(_)
            )
        )
    })
}

/// `include/uapi/linux/rtnetlink.h`, `include/uapi/linux/netfilter/nfnetlink.h`.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_NSID: u32 = 28;
const NFNLGRP_NFTABLES: u32 = 7;
const DATAGRAM: usize = 64 << 10;
