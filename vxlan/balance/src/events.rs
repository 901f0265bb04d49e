//! Notices of somebody else's changes to our tables.

#![expect(
    unsafe_code,
    reason = "AsyncFd leaves it to its caller that the descriptor stays open, and no library that \
              we have attaches a filter"
)]

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
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
        ignore(&socket, port)?;
        // SAFETY: the descriptor is the `AsyncFd`'s own and stays open as long as it lives.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        Ok(Self { socket, table, buffer: vec![0; DATAGRAM] })
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
                if is_of_ours(&self.buffer[..length], self.table) {
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

/// Has the kernel keep to itself what the socket with that `port` has caused: a large change would
/// overrun the queue, and be read for nothing.
///
/// One datagram is of one transaction, so its first message tells whose it is.
fn ignore(socket: &OwnedFd, port: u32) -> io::Result<()> {
    let operation = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        // `nlmsg_pid`, which the filter takes for big-endian.
        operation(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 12),
        operation(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, port.to_be()),
        operation(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        operation(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until the call returns, by the length
    // given.
    let returned = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether something happened to `ours`, in whatever family.
fn is_of_ours(datagram: &[u8], ours: &str) -> bool {
    messages(datagram).any(|(header, body)| {
        let body = body.get(FAMILY_HEADER..).unwrap_or_default();
        header.kind != NEW_GENERATION && attribute(body, 1).is_some_and(|table| text(table) == ours)
    })
}

const NFNLGRP_NFTABLES: u32 = 7;
/// `NFT_MSG_NEWGEN` of `NFNL_SUBSYS_NFTABLES`.
const NEW_GENERATION: u16 = 10 << 8 | 15;
const DATAGRAM: usize = 64 << 10;
