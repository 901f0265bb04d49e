//! A netlink client for requests and dumps.
//!
//! It blocks, and loses nothing by it: the kernel carries a request out within `send`, so the
//! answer is in the receive buffer when `send` returns. Events have their own socket.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::{
    errno::Errno,
    sys::{
        socket::{setsockopt, sockopt},
        time::TimeVal,
    },
};

use crate::namespace::{Namespace, NamespaceError};

/// A request that the kernel answers with an acknowledgement.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) message: RouteNetlinkMessage,
    /// `NLM_F_CREATE` and its kin; `NLM_F_REQUEST` and `NLM_F_ACK` are added.
    pub(crate) flags: u16,
}

/// A `NETLINK_ROUTE` socket of one network namespace.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    pub(crate) fn open(namespace: &Namespace) -> Result<Self, NetlinkError> {
        let socket = namespace.run(|| {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.set_cap_ack(true)?;
            socket.set_ext_ack(true)?;
            Ok::<_, NetlinkError>(socket)
        })?;
        enlarge(&socket);
        let timeout = TimeVal::new(TIMEOUT.as_secs().cast_signed(), 0);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &timeout).map_err(io::Error::from)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_SIZE] })
    }

    /// Carries out one request.
    pub(crate) fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        self.batch(&[Request { message, flags }]).pop().expect("one result a request")
    }

    /// Carries out `requests` in order, each whether or not the others fail: one result each.
    pub(crate) fn batch(&mut self, requests: &[Request]) -> Vec<Result<(), NetlinkError>> {
        requests.chunks(BATCH).flat_map(|chunk| self.chunk(chunk)).collect()
    }

    /// Reads a whole table.
    ///
    /// Messages that this crate's netlink library cannot decode are left out: they describe
    /// objects that are not ours.
    pub(crate) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            match self.dump_once(message.clone()) {
                // The table changed while it was read, and entries may be missing.
                Err(NetlinkError::Interrupted) => {}
                other => return other,
            }
        }
        Err(NetlinkError::Interrupted)
    }

    /// Asks for one object.
    pub(crate) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<RouteNetlinkMessage, NetlinkError> {
        let mut bytes = Vec::new();
        self.append(&mut bytes, message, 0);
        self.send(&bytes)?;
        loop {
            for NetlinkMessage { header, payload, .. } in self.receive()? {
                if header.sequence_number != self.sequence {
                    continue;
                }
                match payload {
                    NetlinkPayload::InnerMessage(message) => return Ok(message),
                    NetlinkPayload::Error(error) => refusal(&header, &error)?,
                    _ => {}
                }
            }
        }
    }

    fn chunk(&mut self, requests: &[Request]) -> Vec<Result<(), NetlinkError>> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        for Request { message, flags } in requests {
            self.append(&mut bytes, message.clone(), NLM_F_ACK | flags);
        }
        let mut results: Vec<_> = requests.iter().map(|_| Err(NetlinkError::Unanswered)).collect();
        if let Err(error) = self.send(&bytes) {
            results[0] = Err(error);
            return results;
        }

        let mut pending = requests.len();
        while pending > 0 {
            let answers = match self.receive() {
                Ok(answers) => answers,
                Err(error) => {
                    let unanswered =
                        |r: &&mut Result<_, _>| matches!(r, Err(NetlinkError::Unanswered));
                    if let Some(slot) = results.iter_mut().find(unanswered) {
                        *slot = Err(error);
                    }
                    return results;
                }
            };
            for NetlinkMessage { header, payload, .. } in answers {
                let NetlinkPayload::Error(error) = payload else { continue };
                // Answers to a request that was given up earlier fall outside the range.
                let index = header.sequence_number.wrapping_sub(first) as usize;
                if let Some(slot) = results.get_mut(index) {
                    *slot = refusal(&header, &error);
                    pending -= 1;
                }
            }
        }
        results
    }

    fn dump_once(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut bytes = Vec::new();
        self.append(&mut bytes, message, NLM_F_DUMP);
        self.send(&bytes)?;

        let (mut found, mut interrupted) = (Vec::new(), false);
        loop {
            for NetlinkMessage { header, payload, .. } in self.receive()? {
                if header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Error(error) => {
                        return refusal(&header, &error).map(|()| found);
                    }
                    NetlinkPayload::Done(_) if interrupted => {
                        return Err(NetlinkError::Interrupted);
                    }
                    NetlinkPayload::Done(_) => return Ok(found),
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        // Every message begins at a multiple of NLMSG_ALIGNTO.
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(())
    }

    fn receive(&mut self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetlinkError> {
        let received = self.socket.recv_from(&mut &mut self.buffer[..], 0);
        let length = match received {
            Ok((length, _)) => length.min(self.buffer.len()),
            Err(error) => {
                return Err(match error.raw_os_error() {
                    Some(libc::EAGAIN) => NetlinkError::Unanswered,
                    Some(libc::ENOBUFS) => NetlinkError::Overrun,
                    _ => NetlinkError::Socket(error),
                });
            }
        };
        Ok(messages(&self.buffer[..length]))
    }
}

/// Splits a datagram into its messages.
pub(crate) fn messages(mut bytes: &[u8]) -> Vec<NetlinkMessage<RouteNetlinkMessage>> {
    let mut found = Vec::new();
    while let Some(prefix) = bytes.first_chunk::<4>() {
        let length = u32::from_ne_bytes(*prefix) as usize;
        if length < HEADER_SIZE || length > bytes.len() {
            break;
        }
        match NetlinkMessage::deserialize(&bytes[..length]) {
            Ok(message) => found.push(message),
            Err(error) => tracing::debug!(%error, "left out a netlink message of unknown form"),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Gives `socket` room for a burst; without it the kernel drops answers and the caller waits in
/// vain. Beyond the system's limit only if privileged.
pub(crate) fn enlarge(socket: &Socket) {
    if setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        let _ = setsockopt(&socket.as_fd(), sockopt::RcvBuf, &RECEIVE_BUFFER);
    }
    debug_assert!(socket.as_raw_fd() >= 0);
}

/// What an `NLMSG_ERROR` says, with the kernel's own words if it gave any.
fn refusal(header: &NetlinkHeader, error: &ErrorMessage) -> Result<(), NetlinkError> {
    match error.code {
        None => Ok(()),
        Some(code) => Err(NetlinkError::Refused {
            errno: Errno::from_raw(code.get().abs()),
            text: explanation(header.flags, &error.header),
        }),
    }
}

/// The text attribute of an extended acknowledgement (`NLMSGERR_ATTR_MSG`), which follows the
/// header of the refused request.
fn explanation(flags: u16, payload: &[u8]) -> Option<String> {
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let mut attributes = payload.get(HEADER_SIZE..)?;
    while let Some([a, b, c, d]) = attributes.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([*c, *d]) == NLMSGERR_ATTR_MSG {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// Why a netlink request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("the kernel says {errno}{}", text.as_ref().map(|t| format!(" ({t})")).unwrap_or_default())]
    Refused { errno: Errno, text: Option<String> },
    #[error("the kernel did not answer within {} s", TIMEOUT.as_secs())]
    Unanswered,
    #[error("the kernel's answers overran the receive buffer")]
    Overrun,
    #[error("the table kept changing while it was read")]
    Interrupted,
    #[error("the netlink socket failed")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("there is no interface {name}")]
    NoInterface { name: String },
}

impl NetlinkError {
    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// "Gone already" is success.
pub(crate) fn ignore_missing(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    let missing = [Errno::ENOENT, Errno::ENODEV, Errno::ESRCH, Errno::EADDRNOTAVAIL].map(Some);
    match result {
        Err(error) if missing.contains(&error.errno()) => Ok(()),
        Err(NetlinkError::NoInterface { .. }) => Ok(()),
        other => other,
    }
}

/// "There already" is success.
pub(crate) fn ignore_existing(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.errno() == Some(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

/// Requests a `send`. Measured best between 64 and 128: larger batches outgrow the caches.
const BATCH: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(10);
const DUMP_ATTEMPTS: usize = 5;
const RECEIVE_BUFFER: usize = 8 << 20;
/// The kernel fills at most 32 KiB of a datagram when it dumps.
const RECEIVE_SIZE: usize = 64 << 10;
const HEADER_SIZE: usize = 16;
/// `include/uapi/linux/netlink.h`.
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_explanation_is_found_behind_the_refused_header() {
        let mut payload = vec![0; HEADER_SIZE];
        payload.extend([8, 0, 2, 0, 1, 2, 3, 4]);
        payload.extend([9, 0, 1, 0]);
        payload.extend(b"oops\0\0\0\0");
        assert_eq!(explanation(NLM_F_ACK_TLVS, &payload).as_deref(), Some("oops"));
        assert_eq!(explanation(0, &payload), None);
        assert_eq!(explanation(NLM_F_ACK_TLVS, &payload[..HEADER_SIZE + 10]), None);
    }
}
