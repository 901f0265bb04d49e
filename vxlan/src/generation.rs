//! The generation of a namespace's nftables: a number that every transaction increments.

use std::{io, os::fd::AsFd};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};

use crate::{namespace::Namespace, netlink::NetlinkError};

/// What number the rules of `namespace` have come to. As long as it stays, nobody has changed them.
pub(crate) fn of(namespace: &Namespace) -> Result<u32, NetlinkError> {
    let answer = namespace.run(|| {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        let timeout = TimeVal::new(TIMEOUT_SECONDS, 0);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &timeout).map_err(io::Error::from)?;
        socket.send_to(&request(), &SocketAddr::new(0, 0), 0)?;
        let mut answer = Vec::with_capacity(4096);
        socket.recv_from(&mut answer, 0)?;
        Ok::<_, NetlinkError>(answer)
    })?;
    parse(&answer).ok_or(NetlinkError::Unanswered)
}

/// The one that follows `generation`; zero is left out (`net/netfilter/nf_tables_api.c`).
pub(crate) fn next(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(1)
}

/// A netlink header and an empty `nfgenmsg`.
fn request() -> Vec<u8> {
    let length = (HEADER + FAMILY_HEADER) as u32;
    let mut bytes = Vec::from(length.to_ne_bytes());
    bytes.extend(GET_GENERATION.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence number, port, and the family, version and resource of no meaning here.
    bytes.extend([0; 12]);
    bytes
}

fn parse(answer: &[u8]) -> Option<u32> {
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    let mut attributes = answer.get(HEADER + FAMILY_HEADER..)?;
    while let (NEW_GENERATION, Some([a, b, c, d])) = (kind, attributes.first_chunk::<4>()) {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([*c, *d]) == GENERATION_ID {
            return Some(u32::from_be_bytes(value.try_into().ok()?));
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

const TIMEOUT_SECONDS: i64 = 10;
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
/// `include/uapi/linux/netlink.h`, `include/uapi/linux/netfilter/nf_tables.h`.
const NLM_F_REQUEST: u16 = 1;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NEW_GENERATION: u16 = NFNL_SUBSYS_NFTABLES << 8 | 15;
const GET_GENERATION: u16 = NFNL_SUBSYS_NFTABLES << 8 | 16;
const GENERATION_ID: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_kind_has_no_generation() {
        let mut answer = request();
        answer.extend([8, 0, 1, 0, 0, 0, 1, 2]);
        assert_eq!(parse(&answer), None);
        answer[4..6].copy_from_slice(&NEW_GENERATION.to_ne_bytes());
        assert_eq!(parse(&answer), Some(0x0102));
        assert_eq!(parse(&answer[..24]), None);
        assert_eq!(parse(&[]), None);
    }
}
