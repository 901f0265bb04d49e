#![expect(unsafe_code, reason = "no library wraps SO_NETNS_COOKIE")]

use std::{io, mem::size_of, os::fd::AsRawFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The cookie of the calling thread's network namespace.
pub(crate) fn of_current() -> io::Result<u64> {
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `length` live across the call, and `length` is the size of `cookie`.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match outcome {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `include/uapi/asm-generic/socket.h`; the same on all architectures that Rust has but SPARC and
/// PA-RISC.
const SO_NETNS_COOKIE: libc::c_int = 71;
