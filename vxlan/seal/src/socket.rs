//! The tunnel's UDP sockets: one a lane.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, Type};

use crate::{Offload, OffloadState, mmsg, offload::Offloads};

/// What bursts of sealed packets need: the kernel's default holds a few milliseconds of them.
pub(crate) const BUFFER_BYTES: usize = 8 << 20;

/// One lane's socket: bound, not connected, never fragments.
#[derive(Debug)]
pub(crate) struct LaneSocket {
    udp: UdpSocket,
    local: SocketAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("failed to bind the sealed data port {address}/udp: free it, or choose another port")]
    Bind {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("failed to {op} on the sealed data port {address}/udp")]
    Option {
        address: SocketAddr,
        op: &'static str,
        #[source]
        source: io::Error,
    },
}

impl LaneSocket {
    /// Binds a socket and asks for its offloads, which `offloads` then tells.
    ///
    /// The second value says what the kernel did not grant, for the operator.
    pub(crate) fn bind(
        address: SocketAddr,
        offloads: &Offloads,
    ) -> Result<(Self, Option<String>), SocketError> {
        let bound = |source| SocketError::Bind { address, source };
        let failed = |op| move |source| SocketError::Option { address, op, source };

        let socket =
            socket2::Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
                .map_err(bound)?;
        socket.set_nonblocking(true).map_err(failed("set O_NONBLOCK"))?;
        if address.is_ipv6() {
            socket.set_only_v6(true).map_err(failed("set IPV6_V6ONLY"))?;
        }
        let fd = socket.as_raw_fd();
        options::never_fragment(fd, address.ip())
            .map_err(|errno| failed("forbid fragments")(errno.into()))?;
        let warning = raise_buffers(&socket, address);
        socket.bind(&address.into()).map_err(bound)?;

        probe(offloads, Offload::UdpSegment, || options::set_segment(fd, 0));
        probe(offloads, Offload::UdpGro, || options::set_gro(fd, true));
        let udp = UdpSocket::from(socket);
        let local = udp.local_addr().map_err(failed("read the address"))?;
        Ok((Self { udp, local }, warning))
    }

    pub(crate) fn local(&self) -> SocketAddr {
        self.local
    }

    /// Sends one datagram that the underlay may fragment: for what no sender makes smaller.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub(crate) fn send_fragmentable(&self, datagram: &[u8], to: &SockAddr) -> io::Result<()> {
        // Others may send meanwhile: they then lack DF for a moment, which harms nobody.
        options::may_fragment(self.udp.as_raw_fd(), self.local.ip())?;
        let sent = mmsg::send_one(self, datagram, to);
        options::never_fragment(self.udp.as_raw_fd(), self.local.ip())?;
        sent
    }
}

impl AsFd for LaneSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.udp.as_fd()
    }
}

fn probe(offloads: &Offloads, offload: Offload, ask: impl Fn() -> Result<(), Errno>) {
    if offloads.state(offload) == OffloadState::Off {
        return;
    }
    let state = match ask() {
        Ok(()) => OffloadState::On,
        Err(errno) => OffloadState::Unsupported(format!("{offload}: {errno}")),
    };
    offloads.probed(offload, state);
}

/// Has datagrams sent without a checksum, of which the kernel then cuts no runs.
#[cfg(test)]
pub(crate) fn forbid_checksums(socket: &LaneSocket) -> Result<(), Errno> {
    options::forbid_checksums(socket.udp.as_raw_fd())
}

#[cfg(test)]
pub(crate) fn enable_gro(socket: &impl AsRawFd) -> Result<(), Errno> {
    options::set_gro(socket.as_raw_fd(), true)
}

/// Asks for [`BUFFER_BYTES`] each way, with `CAP_NET_ADMIN` beyond the system's limit, and says
/// what was not to be had.
fn raise_buffers(socket: &socket2::Socket, address: SocketAddr) -> Option<String> {
    let fd = socket.as_raw_fd();
    if options::force_buffers(fd, BUFFER_BYTES).is_err() {
        // Without the capability the kernel cuts these to its limit and reports success.
        let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
        let _ = socket.set_send_buffer_size(BUFFER_BYTES);
    }
    // The kernel doubles what it is asked for, for its own bookkeeping.
    let granted = |size: io::Result<usize>| size.unwrap_or_default() / 2;
    let receive = granted(socket.recv_buffer_size());
    let send = granted(socket.send_buffer_size());
    (receive.min(send) < BUFFER_BYTES).then(|| {
        format!(
            "the socket {address}/udp has buffers of {} KiB (receive) and {} KiB (send) instead of {} KiB: bursts will be lost; give the agent CAP_NET_ADMIN or raise net.core.rmem_max and net.core.wmem_max",
            receive >> 10,
            send >> 10,
            BUFFER_BYTES >> 10,
        )
    })
}

#[expect(unsafe_code, reason = "these socket options have no safe wrapper")]
mod options {
    use super::{Errno, IpAddr, RawFd};

    pub(super) fn never_fragment(fd: RawFd, own: IpAddr) -> Result<(), Errno> {
        // PROBE sets DF and leaves it to us to know the path's MTU: no error is latched on the
        // socket for what one peer's path said (ip(7)).
        match own {
            IpAddr::V4(_) => {
                set(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
            }
            IpAddr::V6(_) => {
                set(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
            }
        }
    }

    pub(super) fn may_fragment(fd: RawFd, own: IpAddr) -> Result<(), Errno> {
        match own {
            IpAddr::V4(_) => {
                set(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
            }
            IpAddr::V6(_) => {
                set(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
            }
        }
    }

    pub(super) fn force_buffers(fd: RawFd, bytes: usize) -> Result<(), Errno> {
        let bytes = libc::c_int::try_from(bytes).map_err(|_| Errno::EINVAL)?;
        set(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes)?;
        set(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes)
    }

    /// Segment size of all sends that do not say one; 0 for none. Also tells whether the kernel
    /// knows the option.
    pub(super) fn set_segment(fd: RawFd, bytes: libc::c_int) -> Result<(), Errno> {
        set(fd, libc::SOL_UDP, libc::UDP_SEGMENT, bytes)
    }

    pub(super) fn set_gro(fd: RawFd, on: bool) -> Result<(), Errno> {
        set(fd, libc::SOL_UDP, libc::UDP_GRO, on.into())
    }

    #[cfg(test)]
    pub(super) fn forbid_checksums(fd: RawFd) -> Result<(), Errno> {
        set(fd, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)
    }

    fn set(fd: RawFd, level: i32, name: i32, value: libc::c_int) -> Result<(), Errno> {
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: `value` is an int of `size` bytes that lives through the call.
        let result = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), size) };
        Errno::result(result).map(drop)
    }
}
