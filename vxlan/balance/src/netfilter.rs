//! A socket to the netfilter of one namespace.
//!
//! Rules that change often are written by it instead of by `nft`, which reads all of a table before
//! it adds to it, and which waits at its end until the kernel is rid of what was deleted.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind,
            getsockname, recv, sendto, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};
use weft_vxlan::{Namespace, NamespaceError};

use crate::wire::Writer;

/// One request: the kind of message, its flags and its attributes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Request {
    /// Subsystem and message.
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    /// `NFPROTO_*`, or what a table is of.
    pub(crate) family: u8,
    pub(crate) body: Writer,
}

/// A message of the kernel's.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) family: u8,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    fn of(body: &[u8]) -> Self {
        Self {
            family: body.first().copied().unwrap_or_default(),
            body: body.get(FAMILY_HEADER..).unwrap_or_default().to_vec(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Netfilter {
    socket: OwnedFd,
    sequence: u32,
    room: usize,
    buffer: Vec<u8>,
}

impl Netfilter {
    pub(crate) fn open(namespace: &Namespace) -> Result<Self, NetfilterError> {
        let socket = open(namespace, SockFlag::SOCK_CLOEXEC, 0)?;
        let timeout = TimeVal::milliseconds(TIMEOUT.as_millis() as i64);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).map_err(io::Error::from)?;
        Ok(Self { socket, sequence: 0, room: 0, buffer: vec![0; RECEIVE_SIZE] })
    }

    /// What the kernel calls this socket in notifications of what it has changed.
    pub(crate) fn port(&self) -> Result<u32, NetfilterError> {
        let address: NetlinkAddr = getsockname(self.socket.as_raw_fd()).map_err(io::Error::from)?;
        Ok(address.pid())
    }

    /// Carries out `requests` to nftables as one transaction: all of them, or none.
    pub(crate) fn commit(&mut self, requests: &[Request]) -> Result<(), NetfilterError> {
        let mut bytes = Vec::new();
        self.append(&mut bytes, NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, NFTABLES, &[]);
        let first = self.sequence.wrapping_add(1);
        for Request { kind, flags, family, body } in requests {
            self.append(&mut bytes, *kind, NLM_F_REQUEST | flags, *family, 0, &body.0);
        }
        self.append(&mut bytes, NFNL_MSG_BATCH_END, NLM_F_REQUEST, 0, NFTABLES, &[]);
        self.make_room(bytes.len());
        self.send(&bytes)?;
        // The kernel has done it before it returns, and says nothing but what went wrong.
        let mut refused = None;
        while let Some(length) = self.receive_now()? {
            for (header, body) in messages(&self.buffer[..length]) {
                let error = (header.kind == NLMSG_ERROR).then(|| errno(body)).flatten();
                if let (Some(errno), None) = (error, &refused) {
                    let index = header.sequence.wrapping_sub(first) as usize;
                    let kind = requests.get(index).map_or(NFNL_MSG_BATCH_END, |r| r.kind);
                    refused = Some(NetfilterError::Refused { errno, kind: kind & 0xff });
                }
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Carries out `requests` one by one. The results of those that fail are passed over if
    /// `ignore` says so.
    pub(crate) fn each(
        &mut self,
        requests: &[Request],
        ignore: Errno,
    ) -> Result<u64, NetfilterError> {
        let mut done = 0;
        for chunk in requests.chunks(CHUNK) {
            let mut bytes = Vec::new();
            for Request { kind, flags, family, body } in chunk {
                let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
                self.append(&mut bytes, *kind, flags, *family, 0, &body.0);
            }
            self.send(&bytes)?;
            let (mut pending, mut refused) = (chunk.len(), None);
            while pending > 0 {
                let length = self.receive()?;
                for (header, body) in messages(&self.buffer[..length]) {
                    // What is left of requests that were given up is not counted.
                    let age = self.sequence.wrapping_sub(header.sequence) as usize;
                    if header.kind != NLMSG_ERROR || age >= chunk.len() {
                        continue;
                    }
                    pending -= 1;
                    match errno(body) {
                        None => done += 1,
                        Some(errno) if errno == ignore => {}
                        Some(errno) => refused = refused.or(Some(errno)),
                    }
                }
            }
            if let Some(errno) = refused {
                return Err(NetfilterError::Refused { errno, kind: chunk[0].kind & 0xff });
            }
        }
        Ok(done)
    }

    /// Reads the one object that `request` asks for.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<Answer, NetfilterError> {
        let Request { kind, flags, family, body } = request;
        let mut bytes = Vec::new();
        self.append(&mut bytes, *kind, NLM_F_REQUEST | flags, *family, 0, &body.0);
        self.send(&bytes)?;
        loop {
            let length = self.receive()?;
            for (header, body) in messages(&self.buffer[..length]) {
                if header.sequence != self.sequence {
                    continue;
                }
                let error = (header.kind == NLMSG_ERROR).then(|| errno(body)).flatten();
                return match error {
                    Some(errno) => Err(NetfilterError::Refused { errno, kind: kind & 0xff }),
                    None => Ok(Answer::of(body)),
                };
            }
        }
    }

    /// Reads all objects that `request` asks for.
    pub(crate) fn dump(&mut self, request: &Request) -> Result<Vec<Answer>, NetfilterError> {
        self.attempt(request, |answers: &mut Vec<_>, body| answers.push(Answer::of(body)))
    }

    /// As [`dump`](Self::dump), keeping what `keep` does of each.
    pub(crate) fn gather<T: Default>(
        &mut self,
        request: &Request,
        keep: impl Fn(&mut T, &[u8]),
    ) -> Result<T, NetfilterError> {
        self.attempt(request, |kept: &mut T, body| {
            keep(kept, body.get(FAMILY_HEADER..).unwrap_or_default());
        })
    }

    fn attempt<T: Default>(
        &mut self,
        request: &Request,
        keep: impl Fn(&mut T, &[u8]),
    ) -> Result<T, NetfilterError> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut kept = T::default();
            match self.dump_once(request, |body| keep(&mut kept, body)) {
                Err(NetfilterError::Interrupted) => {}
                other => return other.map(|()| kept),
            }
        }
        Err(NetfilterError::Interrupted)
    }

    fn dump_once(
        &mut self,
        request: &Request,
        mut keep: impl FnMut(&[u8]),
    ) -> Result<(), NetfilterError> {
        let Request { kind, flags, family, body } = request;
        let mut bytes = Vec::new();
        self.append(&mut bytes, *kind, NLM_F_REQUEST | NLM_F_DUMP | flags, *family, 0, &body.0);
        self.send(&bytes)?;
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            for (header, body) in messages(&self.buffer[..length]) {
                if header.sequence != self.sequence {
                    continue;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match header.kind {
                    NLMSG_DONE if interrupted => return Err(NetfilterError::Interrupted),
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match errno(body) {
                            // What is asked for is in something that is not there.
                            None | Some(Errno::ENOENT) => Ok(()),
                            Some(Errno::EINTR) => Err(NetfilterError::Interrupted),
                            Some(errno) => {
                                Err(NetfilterError::Refused { errno, kind: kind & 0xff })
                            }
                        };
                    }
                    _ => keep(body),
                }
            }
        }
    }

    fn append(
        &mut self,
        bytes: &mut Vec<u8>,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        body: &[u8],
    ) {
        self.sequence = self.sequence.wrapping_add(1);
        let length = (HEADER + FAMILY_HEADER + body.len()) as u32;
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }

    /// A transaction is one datagram, however long.
    fn make_room(&mut self, length: usize) {
        if self.room < length {
            self.room = length + SEND_MARGIN;
            let _ = setsockopt(&self.socket, sockopt::SndBufForce, &self.room);
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetfilterError> {
        let kernel = NetlinkAddr::new(0, 0);
        let send = || sendto(self.socket.as_raw_fd(), bytes, &kernel, MsgFlags::empty());
        uninterrupted(send).map_err(io::Error::from)?;
        Ok(())
    }

    fn receive(&mut self) -> Result<usize, NetfilterError> {
        let Self { socket, buffer, .. } = self;
        match uninterrupted(|| recv(socket.as_raw_fd(), buffer, MsgFlags::empty())) {
            Ok(length) => Ok(length),
            Err(Errno::EAGAIN) => Err(NetfilterError::Unanswered),
            Err(Errno::ENOBUFS) => Err(NetfilterError::Interrupted),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }

    fn receive_now(&mut self) -> Result<Option<usize>, NetfilterError> {
        let Self { socket, buffer, .. } = self;
        match uninterrupted(|| recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)) {
            Ok(length) => Ok(Some(length)),
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }
}

/// Calls again what a signal has interrupted.
fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// A socket in `namespace`, with room for a burst of answers.
///
/// It is told of what happens to the notification `groups`, one bit each.
pub(crate) fn open(
    namespace: &Namespace,
    flags: SockFlag,
    groups: u32,
) -> Result<OwnedFd, NetfilterError> {
    namespace.run(|| {
        let protocol = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)
            .map_err(io::Error::from)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups)).map_err(io::Error::from)?;
        if setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            let _ = setsockopt(&socket.as_fd(), sockopt::RcvBuf, &RECEIVE_BUFFER);
        }
        Ok(socket)
    })
}

/// A message's header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
}

/// The messages of a datagram, each with what follows its header.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    std::iter::from_fn(move || {
        let header: &[u8; HEADER] = bytes.first_chunk()?;
        let word = |at: usize| {
            u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes of sixteen"))
        };
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let parsed = Header { kind: half(4), flags: half(6), sequence: word(8) };
        let length = word(0) as usize;
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((parsed, body))
    })
}

/// What an error message says; nothing if it is an acknowledgement.
fn errno(body: &[u8]) -> Option<Errno> {
    match i32::from_ne_bytes(*body.first_chunk()?) {
        0 => None,
        code => Some(Errno::from_raw(-code)),
    }
}

/// Why netfilter could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetfilterError {
    #[error("the kernel refused a change of its rules (message {kind}): {errno}")]
    Refused { errno: Errno, kind: u16 },
    #[error("the kernel did not answer within {} s", TIMEOUT.as_secs())]
    Unanswered,
    #[error("the rules kept changing while they were read")]
    Interrupted,
    #[error("the netlink socket failed")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

const TIMEOUT: Duration = Duration::from_secs(10);
const DUMP_ATTEMPTS: usize = 5;
const CHUNK: usize = 64;
const RECEIVE_BUFFER: usize = 16 << 20;
const RECEIVE_SIZE: usize = 256 << 10;
const SEND_MARGIN: usize = 1 << 20;
const HEADER: usize = 16;
pub(crate) const FAMILY_HEADER: usize = 4;
/// `include/uapi/linux/netlink.h`, `include/uapi/linux/netfilter/nfnetlink.h`.
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
pub(crate) const NFTABLES: u16 = 10;
