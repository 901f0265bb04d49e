//! Many datagrams by one system call, and many packets by one datagram.

#![expect(unsafe_code, reason = "sendmmsg and recvmmsg have no wrapper that reuses its arrays")]

use std::{
    io,
    mem::{size_of, zeroed},
    net::SocketAddr,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    ptr,
};

use nix::errno::Errno;
use socket2::{SockAddr, SockAddrStorage};

/// Packets that one send may be cut into (`UDP_MAX_SEGMENTS` of the oldest kernels).
pub(crate) const MAX_SEGMENTS: usize = 64;

/// Bytes that one send may have, over IPv4 or IPv6.
pub(crate) const MAX_PAYLOAD: usize = 65_535 - 40 - 8;

/// Receives of one system call at most.
const SLOTS: usize = 64;

/// Sends of one system call.
const SENDS: usize = 64;

/// Consecutive packets in a buffer for one destination: all of `size` bytes, but for the last,
/// which may be shorter.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Run {
    pub(crate) bytes: Range<usize>,
    pub(crate) size: usize,
}

impl Run {
    pub(crate) fn packets(&self) -> usize {
        self.bytes.len().div_ceil(self.size)
    }

    /// The packets as runs of one each.
    pub(crate) fn singles(&self) -> impl Iterator<Item = Self> + '_ {
        self.bytes.clone().step_by(self.size).map(|start| {
            let end = self.bytes.end.min(start + self.size);
            Self { bytes: start..end, size: self.size }
        })
    }
}

/// The arrays of sendmmsg.
pub(crate) struct Sends {
    headers: Box<[libc::mmsghdr; SENDS]>,
    pieces: Box<[libc::iovec; SENDS]>,
    controls: Box<[Control; SENDS]>,
}

impl Sends {
    pub(crate) fn new() -> Self {
        // SAFETY: all three are plain data for which zeros are a value.
        unsafe {
            Self {
                headers: Box::new(zeroed()),
                pieces: Box::new(zeroed()),
                controls: Box::new(zeroed()),
            }
        }
    }

    /// Sends the first of `runs`, as many as one system call takes, from `buffer`; tells how many
    /// the kernel took, which is at least one. A run of several packets goes out as one send that
    /// the kernel cuts (`UDP_SEGMENT`).
    ///
    /// # Errors
    ///
    /// What the kernel said of the first run; it and all others were not sent.
    pub(crate) fn send<'a>(
        &mut self,
        socket: &impl AsFd,
        buffer: &[u8],
        runs: impl Iterator<Item = (&'a Run, &'a SockAddr)>,
    ) -> Result<usize, Errno> {
        let mut count = 0;
        for (run, to) in runs.take(SENDS) {
            let bytes = &buffer[run.bytes.clone()];
            self.pieces[count] =
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            let header = &mut self.headers[count].msg_hdr;
            header.msg_name = to.as_ptr().cast_mut().cast();
            header.msg_namelen = to.len();
            header.msg_iov = &raw mut self.pieces[count];
            header.msg_iovlen = 1;
            if bytes.len() > run.size {
                self.controls[count] = Control::segment(run.size);
                header.msg_control = (&raw mut self.controls[count]).cast();
                header.msg_controllen = size_of::<Control>();
            } else {
                header.msg_control = ptr::null_mut();
                header.msg_controllen = 0;
            }
            count += 1;
        }
        let fd = socket.as_fd().as_raw_fd();
        // SAFETY: the first `count` headers were just filled; what they point to (buffer, addresses
        // and our own arrays) lives through the call, and the kernel writes to none of it but the
        // headers' `msg_len`.
        let sent =
            unsafe { libc::sendmmsg(fd, self.headers.as_mut_ptr(), count as libc::c_uint, 0) };
        Errno::result(sent).map(|sent| sent as usize)
    }
}

/// How much one system call receives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rooms {
    /// At most 64.
    pub(crate) count: usize,
    pub(crate) bytes: usize,
}

impl Rooms {
    /// Few and large: the largest aggregate that the kernel's GRO makes fits one, and all of them a
    /// core's second-level cache.
    pub(crate) const AGGREGATES: Self = Self { count: 8, bytes: 1 << 16 };

    /// Many, each for one packet of any usual link.
    pub(crate) const PACKETS: Self = Self { count: SLOTS, bytes: 9216 };
}

/// The arrays of recvmmsg, and the one buffer that it receives into.
pub(crate) struct Receives {
    rooms: Rooms,
    arena: Box<[u8]>,
    headers: Box<[libc::mmsghdr; SLOTS]>,
    pieces: Box<[libc::iovec; SLOTS]>,
    names: Box<[libc::sockaddr_storage; SLOTS]>,
    controls: Box<[Control; SLOTS]>,
}

/// What one receive gave.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Received {
    /// Where the packets lie in the arena.
    pub(crate) run: Run,
    /// It was larger than its room: the rest is lost.
    pub(crate) truncated: bool,
}

impl Receives {
    pub(crate) fn new(rooms: Rooms) -> Self {
        let rooms = Rooms { count: rooms.count.clamp(1, SLOTS), ..rooms };
        // SAFETY: all of these are plain data for which zeros are a value.
        unsafe {
            Self {
                rooms,
                arena: vec![0; rooms.count * rooms.bytes].into(),
                headers: Box::new(zeroed()),
                pieces: Box::new(zeroed()),
                names: Box::new(zeroed()),
                controls: Box::new(zeroed()),
            }
        }
    }

    /// How many datagrams the arena holds.
    pub(crate) fn slots(&self) -> usize {
        self.rooms.count
    }

    pub(crate) fn arena(&self) -> &[u8] {
        &self.arena
    }

    pub(crate) fn arena_mut(&mut self) -> &mut [u8] {
        &mut self.arena
    }

    /// Receives what is there, at most [`slots`](Self::slots) datagrams or aggregates of them.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if nothing is there.
    pub(crate) fn receive(&mut self, socket: &impl AsFd) -> Result<usize, Errno> {
        let Rooms { count, bytes } = self.rooms;
        for slot in 0..count {
            let room = &mut self.arena[slot * bytes..][..bytes];
            self.pieces[slot] =
                libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
            let header = &mut self.headers[slot].msg_hdr;
            header.msg_name = (&raw mut self.names[slot]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.pieces[slot];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[slot]).cast();
            header.msg_controllen = size_of::<Control>();
            header.msg_flags = 0;
        }
        let fd = socket.as_fd().as_raw_fd();
        // SAFETY: every header was just filled with rooms of its own, of the lengths that it says,
        // which live through the call and which nothing else refers to.
        let received = unsafe {
            libc::recvmmsg(
                fd,
                self.headers.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        Errno::result(received).map(|received| received as usize)
    }

    /// What the receive into `slot` gave. To be asked for slots below the last count only.
    pub(crate) fn received(&self, slot: usize) -> Received {
        let header = &self.headers[slot];
        let start = slot * self.rooms.bytes;
        let len = (header.msg_len as usize).min(self.rooms.bytes);
        let size = match header.msg_hdr.msg_controllen {
            0 => None,
            _ => self.controls[slot].gro_size(),
        };
        Received {
            run: Run { bytes: start..start + len, size: size.unwrap_or(len).max(1) },
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        }
    }

    /// Who sent what was received into `slot`; nobody is known of what was placed there.
    pub(crate) fn from(&self, slot: usize) -> Option<SocketAddr> {
        let len = self.headers[slot].msg_hdr.msg_namelen;
        if len == 0 {
            return None;
        }
        let mut storage = SockAddrStorage::zeroed();
        // SAFETY: both are a `sockaddr_storage`, which zeros are a value of.
        unsafe { *storage.view_as() = self.names[slot] };
        // SAFETY: the kernel wrote an address of `len` bytes.
        let name = unsafe { SockAddr::new(storage, len) };
        name.as_socket()
    }

    /// Puts a datagram that came another way where one that was received would lie; what it does
    /// not fit is lost.
    pub(crate) fn place(&mut self, slot: usize, datagram: &[u8]) {
        let start = slot * self.rooms.bytes;
        let len = datagram.len().min(self.rooms.bytes);
        self.arena[start..start + len].copy_from_slice(&datagram[..len]);
        let header = &mut self.headers[slot];
        header.msg_len = len as u32;
        header.msg_hdr.msg_namelen = 0;
        header.msg_hdr.msg_controllen = 0;
        header.msg_hdr.msg_flags = if len < datagram.len() { libc::MSG_TRUNC } else { 0 };
    }
}

/// Room for one control message: `UDP_SEGMENT` (u16) out, `UDP_GRO` (int) in.
#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    value: [u8; 8],
}

impl Control {
    fn segment(size: usize) -> Self {
        let mut value = [0; 8];
        value[..2].copy_from_slice(&(size as u16).to_ne_bytes());
        let header = libc::cmsghdr {
            cmsg_len: size_of::<libc::cmsghdr>() + size_of::<u16>(),
            cmsg_level: libc::SOL_UDP,
            cmsg_type: libc::UDP_SEGMENT,
        };
        Self { header, value }
    }

    fn gro_size(&self) -> Option<usize> {
        let ours = self.header.cmsg_level == libc::SOL_UDP
            && self.header.cmsg_type == libc::UDP_GRO
            && self.header.cmsg_len >= size_of::<libc::cmsghdr>() + size_of::<libc::c_int>();
        let [a, b, c, d, ..] = self.value;
        ours.then(|| usize::try_from(i32::from_ne_bytes([a, b, c, d])).ok())?
    }
}

/// Sends one datagram.
///
/// # Errors
///
/// What the kernel said.
pub(crate) fn send_one(socket: &impl AsFd, datagram: &[u8], to: &SockAddr) -> io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    socket.send_to(datagram, to).map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_run_crosses_as_one_and_arrives_packet_by_packet() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_nonblocking(true).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = SockAddr::from(receiver.local_addr().unwrap());
        let buffer: Vec<u8> = (0..250).collect();
        let runs = [Run { bytes: 0..250, size: 100 }, Run { bytes: 10..20, size: 10 }];

        let sent = Sends::new().send(&sender, &buffer, runs.iter().map(|run| (run, &to)));
        assert_eq!(sent, Ok(2));

        // Loopback delivers before sendmmsg returns. Without UDP_GRO each packet is on its own.
        let mut receives = Receives::new(Rooms::AGGREGATES);
        assert_eq!(receives.receive(&receiver), Ok(4));
        let lens: Vec<_> = (0..4).map(|slot| receives.received(slot).run.bytes.len()).collect();
        assert_eq!(lens, [100, 100, 50, 10]);
        assert_eq!(receives.arena()[receives.received(2).run.bytes.clone()], buffer[200..]);
        assert_eq!(receives.from(3), sender.local_addr().ok());
        assert_eq!(receives.receive(&receiver), Err(Errno::EAGAIN));
    }

    #[test]
    fn what_is_placed_is_found_as_if_it_were_received() {
        let mut receives = Receives::new(Rooms { count: 2, bytes: 100 });
        receives.place(0, &[1; 40]);
        receives.place(1, &[2; 101]);
        let received = [0, 1].map(|slot| receives.received(slot));
        assert_eq!(received[0], Received { run: Run { bytes: 0..40, size: 40 }, truncated: false });
        assert_eq!(receives.arena()[received[0].run.bytes.clone()], [1; 40]);
        assert!(received[1].truncated);
        assert_eq!(receives.from(0), None);
    }

    #[test]
    fn an_aggregate_tells_the_size_of_its_packets() {
        let receiver = socket2::Socket::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        crate::socket::enable_gro(&receiver).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = SockAddr::from(receiver.local_addr().unwrap().as_socket().unwrap());
        let buffer = [7; 64 * 1000 - 1];
        let run = Run { bytes: 0..buffer.len(), size: 1000 };
        assert_eq!(Sends::new().send(&sender, &buffer, [(&run, &to)].into_iter()), Ok(1));

        let mut receives = Receives::new(Rooms::AGGREGATES);
        assert_eq!(receives.receive(&receiver), Ok(1));
        let Received { run, truncated } = receives.received(0);
        assert_eq!((run.size, run.packets(), run.bytes.len()), (1000, 64, buffer.len()));
        assert_eq!(run.singles().last().map(|single| single.bytes.len()), Some(999));
        assert!(!truncated);
    }
}
