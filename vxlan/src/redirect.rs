//! Sends the DNS queries of an engine's sandbox to sockets of ours.
//!
//! Docker does the same by NAT rules of its own, in the same namespace. Of all chains of one hook the
//! first that translates a connection has it, so ours only needs to come before.

use std::net::Ipv4Addr;

use crate::{namespace::Namespace, nft, table::KernelError};

/// Redirects what a sandbox asks at `resolver`, port 53, to the ports `udp` and `tcp` of the same
/// address. Replaces what was redirected before.
///
/// # Errors
///
/// The sandbox has gone, or nft refuses.
pub fn redirect_dns(
    sandbox: &Namespace,
    resolver: Ipv4Addr,
    udp: u16,
    tcp: u16,
) -> Result<(), KernelError> {
    nft::load(sandbox, &script(resolver, udp, tcp))
}

/// Takes the redirection away. Succeeds if there is none.
///
/// # Errors
///
/// The sandbox has gone, or nft refuses.
pub fn restore_dns(sandbox: &Namespace) -> Result<(), KernelError> {
    nft::load(sandbox, &format!("table ip {TABLE}\ndelete table ip {TABLE}\n"))
}

fn script(resolver: Ipv4Addr, udp: u16, tcp: u16) -> String {
    format!(
        "table ip {TABLE}\n\
         delete table ip {TABLE}\n\
         table ip {TABLE} {{\n\
         chain output {{\n\
         type nat hook output priority {PRIORITY}; policy accept;\n\
         ip daddr {resolver} udp dport 53 dnat to {resolver}:{udp}\n\
         ip daddr {resolver} tcp dport 53 dnat to {resolver}:{tcp}\n\
         }}\n\
         }}\n"
    )
}

const TABLE: &str = "weft_dns";
/// Before Docker's, which has that of iptables (`NF_IP_PRI_NAT_DST`, -100) in all its flavours.
const PRIORITY: i32 = -110;
