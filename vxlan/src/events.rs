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
    /// Of the host's namespace, for a network whose ports are parts of links there.
    parents: Option<TokioSocket>,
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
            route: open(namespace, NETLINK_ROUTE, &ROUTE_GROUPS)?,
            rules: open(namespace, NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?,
            parents: None,
        })
    }

    /// Listens from now on for links that are removed from the host's namespace, too.
    pub(crate) fn follow_parents(&mut self, host: &Namespace) -> Result<(), NetlinkError> {
        if self.parents.is_none() {
            self.parents = Some(open(host, NETLINK_ROUTE, &[RTNLGRP_LINK])?);
        }
        Ok(())
    }

    /// Waits for a change. Cancel-safe: what was read and not reported yet is a change that the
    /// next pass, which a cancelled wait leads to, sees anyway.
    pub(crate) async fn changed(&mut self) -> Change {
        loop {
            let (mut route, mut rules) =
                (Vec::with_capacity(DATAGRAM), Vec::with_capacity(DATAGRAM));
            let mut parents = Vec::new();
            // An error is ENOBUFS: some were dropped, and they may have been of interest.
            tokio::select! {
                read = self.route.recv_from(&mut route) => {
                    if read.is_err() || is_loss(&route) || drain(&mut self.route, is_loss) {
                        return Change::Links;
                    }
                }
                read = receive(&mut self.parents, &mut parents) => {
                    if read.is_err() || is_removal(&parents) {
                        return Change::Links;
                    }
                }
                read = self.rules.recv_from(&mut rules) => {
                    if read.is_err() || concerns_us(&rules) {
                        return Change::Rules;
                    }
                }
            }
        }
    }

    /// Forgets what has been told so far.
    pub(crate) fn settle(&mut self) {
        drain(&mut self.route, is_loss);
        if let Some(parents) = &mut self.parents {
            drain(parents, is_removal);
        }
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

/// Waits for a datagram; for ever where nobody listens.
async fn receive(socket: &mut Option<TokioSocket>, buffer: &mut Vec<u8>) -> io::Result<()> {
    match socket {
        Some(socket) => {
            buffer.reserve(DATAGRAM);
            socket.recv_from(buffer).await.map(drop)
        }
        None => std::future::pending().await,
    }
}

/// Whether a link has gone.
fn is_removal(datagram: &[u8]) -> bool {
    messages(datagram).iter().any(|message| {
        let removal = |inner: &_| matches!(inner, RouteNetlinkMessage::DelLink(_));
        matches!(&message.payload, NetlinkPayload::InnerMessage(inner) if removal(inner))
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

/// Whether a link, a neighbour entry or a sandbox has gone, or a link has changed. Additions of
/// neighbours are the reconcilers' own.
fn is_loss(datagram: &[u8]) -> bool {
    messages(datagram).iter().any(|message| {
        matches!(
            message.payload,
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewLink(_)
                    | RouteNetlinkMessage::DelLink(_)
                    | RouteNetlinkMessage::DelNeighbour(_)
                    | RouteNetlinkMessage::DelRule(_)
                    | RouteNetlinkMessage::DelNsId(_)
            )
        )
    })
}

/// Whether a notification of nftables is of a table that these reconcilers look at: not of one of
/// the tables `weft-…` that have a reconciler of their own, and no mere count of transactions.
fn concerns_us(mut datagram: &[u8]) -> bool {
    while let Some(length) = datagram.first_chunk().map(|prefix| u32::from_ne_bytes(*prefix)) {
        let Some(message) = datagram.get(..length as usize) else { return true };
        let kind = message.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
        let table = message.get(TABLE_NAME..).unwrap_or_default();
        let theirs = table.starts_with(b"weft-") && !table.starts_with(b"weft-transit\0");
        if kind.is_none() || (kind != Some(NEW_GENERATION) && !theirs) {
            return true;
        }
        datagram = datagram.get((length as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// The name of the table is the first attribute of all that nftables tells of: behind a netlink
/// header, the family's and the attribute's.
const TABLE_NAME: usize = 16 + 4 + 4;
/// `NFT_MSG_NEWGEN` of `NFNL_SUBSYS_NFTABLES`.
const NEW_GENERATION: u16 = 10 << 8 | 15;
/// `include/uapi/linux/rtnetlink.h`, `include/uapi/linux/netfilter/nfnetlink.h`.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_NSID: u32 = 28;
const RTNLGRP_IPV4_RULE: u32 = 8;
const RTNLGRP_IPV6_RULE: u32 = 19;
const ROUTE_GROUPS: [u32; 5] =
    [RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_NSID, RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_RULE];
const NFNLGRP_NFTABLES: u32 = 7;
const DATAGRAM: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn notification(kind: u16, attribute: &[u8]) -> Vec<u8> {
        let length = (TABLE_NAME + attribute.len()) as u32;
        let mut bytes = Vec::from(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(TABLE_NAME, 0);
        bytes.extend(attribute);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn tables_that_others_look_after_wake_nobody() {
        let (new_rule, counted) = (10 << 8 | 6, notification(NEW_GENERATION, &[0, 0, 0, 7]));
        let services = notification(new_rule, b"weft-services\0");
        let ours = notification(new_rule, b"weft\0");
        let docker = notification(new_rule, b"filter\0");
        assert!(!concerns_us(&services) && !concerns_us(&counted));
        assert!(!concerns_us(&[services.clone(), counted.clone()].concat()));
        let transit = notification(new_rule, b"weft-transit\0");
        for of_interest in [&ours, &transit, &docker] {
            assert!(concerns_us(of_interest));
            assert!(concerns_us(&[&services, of_interest.as_slice(), &counted].concat()));
        }
        assert!(concerns_us(&services[..20]));
    }
}
