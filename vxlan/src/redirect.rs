//! Sends the DNS queries of an engine's sandbox to sockets of ours.
//!
//! Docker does the same by NAT rules of its own, in the same namespace. Of all chains of one hook the
//! first that translates a connection has it, so ours only needs to come before.
//!
//! The table belongs to the netlink socket that made it (`NFT_TABLE_F_OWNER`, Linux 5.12): the kernel
//! removes it when that socket is closed, so when this process is killed as well. With `nft`, it would
//! go with nft's own socket; so the rules, which are few, are written here.

use std::{fmt, io, net::Ipv4Addr, os::fd::AsFd};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::{
    errno::Errno,
    sys::{
        socket::{setsockopt, sockopt},
        time::TimeVal,
    },
};

use crate::{namespace::Namespace, netlink::NetlinkError, table::KernelError};

/// A redirection in a sandbox. It ends when this is dropped, or with the process.
pub struct DnsRedirect {
    owner: Socket,
}

impl fmt::Debug for DnsRedirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DnsRedirect").field("owner", &self.owner.as_fd()).finish()
    }
}

/// Redirects what a sandbox asks at `resolver`, port 53, to the ports `udp` and `tcp` of the same
/// address.
///
/// # Errors
///
/// The sandbox has gone, or the kernel refuses: where a redirection is held already, too.
pub fn redirect_dns(
    sandbox: &Namespace,
    resolver: Ipv4Addr,
    udp: u16,
    tcp: u16,
) -> Result<DnsRedirect, KernelError> {
    let owner = sandbox.run(|| {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        let timeout = TimeVal::new(TIMEOUT_SECONDS, 0);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &timeout).map_err(io::Error::from)?;
        socket.send_to(&transaction(resolver, udp, tcp), &SocketAddr::new(0, 0), 0)?;
        let mut answer = Vec::with_capacity(4096);
        socket.recv_from(&mut answer, 0)?;
        accepted(&answer)?;
        Ok::<_, NetlinkError>(socket)
    })?;
    Ok(DnsRedirect { owner })
}

/// All of the table, or nothing.
fn transaction(resolver: Ipv4Addr, udp: u16, tcp: u16) -> Vec<u8> {
    let table = || text(1, TABLE);
    let hook = nest(4, &[number(1, NF_INET_LOCAL_OUT), number(2, PRIORITY.cast_unsigned())]);
    let rule = |flags, protocol, port| {
        let flags = flags | NLM_F_CREATE | NLM_F_APPEND;
        let rule = redirection(resolver, protocol, port);
        message(NEW_RULE, flags, &[table(), text(2, CHAIN), rule])
    };
    [
        batch(BATCH_BEGIN),
        // One that is nobody's was left by an agent that had none of its own; to be deleted, a table
        // must be there.
        message(NEW_TABLE, NLM_F_CREATE, &[table()]),
        message(DELETE_TABLE, 0, &[table()]),
        message(NEW_TABLE, NLM_F_CREATE, &[table(), number(2, NFT_TABLE_F_OWNER)]),
        message(NEW_CHAIN, NLM_F_CREATE, &[table(), text(3, CHAIN), hook, text(7, "nat")]),
        rule(0, IPPROTO_UDP, udp),
        // The answer to the last one is the answer to all.
        rule(NLM_F_ACK, IPPROTO_TCP, tcp),
        batch(BATCH_END),
    ]
    .concat()
}

/// As `nft --debug=netlink` shows `ip daddr RESOLVER udp dport 53 dnat to RESOLVER:PORT`.
fn redirection(resolver: Ipv4Addr, protocol: u8, port: u16) -> Vec<u8> {
    let expression = |name: &str, parts: &[Vec<u8>]| nest(1, &[text(1, name), nest(2, parts)]);
    // Of the packet's header of `base`.
    let load = |base, offset, length| {
        let parts = [number(1, REGISTER), number(2, base), number(3, offset), number(4, length)];
        expression("payload", &parts)
    };
    let equals = |value: &[u8]| {
        let value = nest(3, &[attribute(1, value)]);
        expression("cmp", &[number(1, REGISTER), number(2, NFT_CMP_EQ), value])
    };
    let set = |register, value: &[u8]| {
        let value = nest(2, &[attribute(1, value)]);
        expression("immediate", &[number(1, register), value])
    };
    let translate = [
        number(1, NFT_NAT_DNAT),
        number(2, NFPROTO_IPV4.into()),
        number(3, REGISTER),
        number(5, NEXT_REGISTER),
    ];
    nest(
        4,
        &[
            load(NETWORK_HEADER, 16, 4),
            equals(&resolver.octets()),
            expression("meta", &[number(2, NFT_META_L4PROTO), number(1, REGISTER)]),
            equals(&[protocol]),
            load(TRANSPORT_HEADER, 2, 2),
            equals(&DNS_PORT.to_be_bytes()),
            set(REGISTER, &resolver.octets()),
            set(NEXT_REGISTER, &port.to_be_bytes()),
            expression("nat", &translate),
        ],
    )
}

fn message(kind: u16, flags: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
    framed(kind, flags, NFPROTO_IPV4, 0, attributes)
}

fn batch(kind: u16) -> Vec<u8> {
    framed(kind, 0, 0, NFNL_SUBSYS_NFTABLES, &[])
}

/// A netlink header, an `nfgenmsg`, and attributes.
fn framed(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    let attributes = attributes.concat();
    let length = u32::try_from(HEADER + FAMILY_HEADER + attributes.len()).expect("a few rules");
    let mut bytes = Vec::from(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence number and port are of no use with one answer.
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("a few rules");
    let mut bytes = Vec::from(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nest(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(NLA_F_NESTED | kind, &parts.concat())
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

/// Reads the first answer, which is an error wherever one was made.
fn accepted(answer: &[u8]) -> Result<(), NetlinkError> {
    let kind = answer.get(4..).and_then(|rest| rest.first_chunk());
    let code = answer.get(HEADER..).and_then(|rest| rest.first_chunk());
    match (kind.map(|kind| u16::from_ne_bytes(*kind)), code.map(|code| i32::from_ne_bytes(*code))) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => {
            Err(NetlinkError::Refused { errno: Errno::from_raw(code.saturating_abs()), text: None })
        }
        _ => Err(NetlinkError::Unanswered),
    }
}

const TABLE: &str = "weft_dns";
const CHAIN: &str = "output";
/// Before Docker's, which has that of iptables (`NF_IP_PRI_NAT_DST`, -100) in all its flavours.
const PRIORITY: i32 = -110;
const DNS_PORT: u16 = 53;
const TIMEOUT_SECONDS: i64 = 10;
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
/// `include/uapi/linux/netlink.h`.
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLA_F_NESTED: u16 = 0x8000;
/// `include/uapi/linux/netfilter.h`, `netfilter/nfnetlink.h`.
const NFPROTO_IPV4: u8 = 2;
const NF_INET_LOCAL_OUT: u32 = 3;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// `include/uapi/linux/netfilter/nf_tables.h`.
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NFT_TABLE_F_OWNER: u32 = 2;
const REGISTER: u32 = 1;
const NEXT_REGISTER: u32 = 2;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const NFT_CMP_EQ: u32 = 0;
const NFT_META_L4PROTO: u32 = 16;
const NFT_NAT_DNAT: u32 = 1;

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::nft;

    const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

    /// A namespace that nobody else has.
    fn fresh() -> Namespace {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Namespace::current().unwrap()
        });
        made.join().unwrap()
    }

    fn listed(namespace: &Namespace) -> Option<String> {
        nft::list(namespace, &["ip weft_dns"]).unwrap()
    }

    #[test]
    fn the_table_is_what_nft_would_make_and_goes_with_its_owner() {
        let namespace = fresh();
        nft::load(&namespace, "table ip weft_dns {\nchain stale {\n}\n}\n").unwrap();
        let redirect = redirect_dns(&namespace, RESOLVER, 5353, 5354).unwrap();
        let table = listed(&namespace).unwrap();
        for line in [
            "type nat hook output priority -110; policy accept;",
            "ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:5353",
            "ip daddr 127.0.0.11 tcp dport 53 dnat to 127.0.0.11:5354",
        ] {
            assert!(table.contains(line), "no {line:?} in {table}");
        }
        assert!(!table.contains("stale"), "{table}");
        // One at a time: a second agent changes nothing.
        let second = redirect_dns(&namespace, RESOLVER, 1, 2).unwrap_err();
        assert!(matches!(second, KernelError::Netlink(NetlinkError::Refused { .. })), "{second}");
        assert_eq!(listed(&namespace), Some(table));
        drop(redirect);
        assert_eq!(listed(&namespace), None);
        drop(redirect_dns(&namespace, RESOLVER, 1, 2).unwrap());
    }
}
