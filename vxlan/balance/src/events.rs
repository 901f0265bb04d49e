//! Notices of somebody else's changes to our tables.

#![expect(unsafe_code, reason = "AsyncFd leaves it to its caller that the descriptor stays open")]

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockFlag, recv},
};
use tokio::io::unix::AsyncFd;
use weft_vxlan::Namespace;

use crate::{
    netfilter::{self, FAMILY_HEADER, NetfilterError, messages},
    wire::{attribute, text},
};

/// The notifications of nftables in one namespace.
#[derive(Debug)]
pub(crate) struct Events {
    socket: AsyncFd<OwnedFd>,
    table: &'static str,
    /// Our own socket's.
    port: u32,
    buffer: Vec<u8>,
}

impl Events {
    /// Must be called inside a tokio runtime. Changes made by the socket with that `port` are not
    /// told, nor changes of other tables than `table`.
    pub(crate) fn open(
        namespace: &Namespace,
        table: &'static str,
        port: u32,
    ) -> Result<Self, NetfilterError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = netfilter::open(namespace, flags, 1 << (NFNLGRP_NFTABLES - 1))?;
        // SAFETY: the descriptor is the `AsyncFd`'s own and stays open as long as it lives.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        Ok(Self { socket, table, port, buffer: vec![0; DATAGRAM] })
    }

    /// Waits until somebody changes one of our tables. Cancel-safe: what was read and not reported
    /// is nothing of interest.
    pub(crate) async fn changed(&mut self) {
        loop {
            let Ok(mut ready) = self.socket.readable().await else { return };
            loop {
                let length = match recv(
                    ready.get_inner().as_raw_fd(),
                    &mut self.buffer,
                    MsgFlags::MSG_DONTWAIT,
                ) {
                    Ok(length) => length,
                    Err(Errno::EAGAIN) => break,
                    Err(Errno::EINTR) => continue,
                    // Some were lost, and may have been of interest.
                    Err(_) => return,
                };
                if is_of_others(&self.buffer[..length], self.table, self.port) {
                    return;
                }
            }
            ready.clear_ready();
        }
    }

    /// Forgets what has been told so far.
    pub(crate) fn settle(&mut self) {
        loop {
            let socket = self.socket.get_ref().as_raw_fd();
            match recv(socket, &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

fn is_of_others(datagram: &[u8], ours: &str, port: u32) -> bool {
    messages(datagram).any(|(header, body)| {
        let body = body.get(FAMILY_HEADER..).unwrap_or_default();
        header.port != port
            && header.kind != NEW_GENERATION
            && attribute(body, 1).is_some_and(|table| text(table) == ours)
    })
}

const NFNLGRP_NFTABLES: u32 = 7;
/// `NFT_MSG_NEWGEN` of `NFNL_SUBSYS_NFTABLES`.
const NEW_GENERATION: u16 = 10 << 8 | 15;
const DATAGRAM: usize = 64 << 10;
