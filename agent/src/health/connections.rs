//! The TCP connections that an endpoint serves, by the kernel's own tables.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use weft_vxlan::{Namespace, NamespaceError};

/// Counts the connections in `namespace` that others have opened to one of `ips`: those to a port
/// somebody listens at, or to one of `ports`.
///
/// # Errors
///
/// The namespace cannot be entered.
pub(super) async fn count(
    namespace: &Namespace,
    ips: BTreeSet<IpAddr>,
    ports: BTreeSet<u16>,
) -> Result<usize, NamespaceError> {
    let read = || -> Result<String, NamespaceError> {
        // `/proc/net` would be that of the process's first thread. Without IPv6 there is no second
        // table.
        let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
        Ok(tables.iter().filter_map(|table| fs::read_to_string(table).ok()).collect())
    };
    let tables = namespace.run_async(read).await?;
    Ok(count_in(&tables, &ips, &ports))
}

/// Counts in the text of the kernel's tables (Linux, Documentation/networking/proc_net_tcp.rst).
fn count_in(tables: &str, ips: &BTreeSet<IpAddr>, ports: &BTreeSet<u16>) -> usize {
    let sockets: Vec<Socket> = tables.lines().filter_map(Socket::parse).collect();
    let mut served = ports.clone();
    let listening = sockets.iter().filter(|socket| socket.state == LISTEN);
    served.extend(listening.map(|socket| socket.local.port()));
    let open = sockets.iter().filter(|socket| OPEN.contains(&socket.state));
    open.filter(|socket| {
        ips.contains(&socket.local.ip().to_canonical()) && served.contains(&socket.local.port())
    })
    .count()
}

/// One line of a table.
struct Socket {
    local: SocketAddr,
    /// As in the kernel's `include/net/tcp_states.h`.
    state: u8,
}

impl Socket {
    /// Nothing for the heading.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_whitespace();
        let (local, state) = (fields.nth(1)?, fields.nth(1)?);
        let (ip, port) = local.split_once(':')?;
        let local = SocketAddr::new(address(ip)?, u16::from_str_radix(port, 16).ok()?);
        Some(Self { local, state: u8::from_str_radix(state, 16).ok()? })
    }
}

/// Reads an address: words of the host's byte order, each of which holds four bytes of the network's.
fn address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

const LISTEN: u8 = 10;
/// Established, being established, closed by the client alone, or closed with bytes that the client
/// may not have yet.
const OPEN: [u8; 6] = [1, 3, 4, 8, 9, 11];

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    const TABLES: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0800010A:0050 0900010A:C001 01 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 0800010A:0050 0900010A:C002 06 00000000:00000000 03:00000000 00000000     0        0 0 3
   3: 0800010A:C350 0900010A:0050 01 00000000:00000000 00:00000000 00000000     0        0 4 1
   4: 0100007F:0050 0100007F:C003 01 00000000:00000000 00:00000000 00000000     0        0 5 1
   5: 0800010A:0051 0900010A:C004 08 00000000:00000000 00:00000000 00000000     0        0 6 1
  sl  local_address                         remote_address                        st tx_queue
   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 0000000000000000FFFF00000800010A:1F90 0000000000000000FFFF00000900010A:C005 04 00000000:00000000
   2: 000000FD000000000000000008000000:1F90 000000FD000000000000000009000000:C006 01 00000000:00000000
";

    #[test]
    fn what_others_opened_counts_until_it_is_closed() {
        let ip: IpAddr = "10.1.0.8".parse().unwrap();
        let v6: IpAddr = "fd00::8".parse().unwrap();
        let none = BTreeSet::new();
        // One of its listener, and one of the listener for both families.
        assert_eq!(count_in(TABLES, &BTreeSet::from([ip]), &none), 2);
        // Its listener has gone already.
        assert_eq!(count_in(TABLES, &BTreeSet::from([ip]), &BTreeSet::from([0x51])), 3);
        assert_eq!(count_in(TABLES, &BTreeSet::from([v6]), &none), 1);
        assert_eq!(count_in(TABLES, &BTreeSet::new(), &none), 0);
    }

    #[test]
    fn the_kernels_own_table_is_understood() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let namespace = Namespace::current().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let ips = BTreeSet::from([address.ip()]);
        let ports = BTreeSet::from([address.port()]);
        let open = || runtime.block_on(count(&namespace, ips.clone(), ports.clone())).unwrap();
        let before = open();
        let _client = std::net::TcpStream::connect(address).unwrap();
        let _server = listener.accept().unwrap();
        assert_eq!((before, open()), (0, 1));
    }
}
