//! Who has a port of the host: found in `/proc`, for people.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use weft_model::{Family, Protocol};

use crate::HostPort;

/// A process that has a port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Owner {
    /// As `/proc/PID/comm` has it.
    pub process: String,
    pub pid: u32,
    /// The first twelve digits of the id of the container that it runs in, or of the one that it
    /// forwards the port to.
    pub container: Option<String>,
}

/// What has a port, as far as can be told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Holding {
    /// A socket that takes what is sent to the port.
    Serving(Option<Owner>),
    /// Connections only, and those that have ended a moment ago: nobody serves there.
    Connections,
    /// A socket that is in no table of the kernel: bound, and nothing else.
    Silent,
}

/// Looks for what keeps the calling thread's namespace from giving `ports` to anybody else. Each table
/// of the kernel is read once at most, and so is what each process has open: on a large host that is
/// dear.
pub(super) fn find(ports: &BTreeSet<HostPort>) -> BTreeMap<HostPort, Holding> {
    let mut tables = BTreeMap::new();
    let mut found = BTreeMap::new();
    for port in ports {
        let files: &[&str] = match (port.protocol, port.family) {
            (Protocol::Tcp, Family::V4) => &["tcp", "tcp6"],
            (Protocol::Tcp, Family::V6) => &["tcp6"],
            (Protocol::Udp, Family::V4) => &["udp", "udp6"],
            (Protocol::Udp, Family::V6) => &["udp6"],
        };
        for file in files {
            tables.entry(*file).or_insert_with(|| Socket::table(file));
        }
        let of_port =
            files.iter().flat_map(|file| tables[file].get(&port.port).into_iter().flatten());
        let near = of_port.filter(|socket| {
            socket.ip.is_unspecified() || port.ip.is_none_or(|own| own == socket.ip)
        });
        let mut near = near.peekable();
        let any = near.peek().is_some();
        found.insert(*port, (any, near.find(|socket| socket.serves).map(|socket| socket.inode)));
    }
    let inodes: BTreeSet<u64> = found.values().filter_map(|(_, serving)| *serving).collect();
    let owners = owners(&inodes);
    let holding = |(any, serving): (bool, Option<u64>)| match serving {
        Some(inode) => Holding::Serving(owners.get(&inode).cloned()),
        None if any => Holding::Connections,
        None => Holding::Silent,
    };
    found.into_iter().map(|(port, sight)| (port, holding(sight))).collect()
}

/// A line of `/proc/net/tcp` and its like (`proc_net_tcp.txt` of the kernel).
#[derive(Debug, Eq, PartialEq)]
struct Socket {
    ip: IpAddr,
    port: u16,
    serves: bool,
    inode: u64,
}

impl Socket {
    /// The sockets of a table of the calling thread's namespace, by their ports.
    fn table(file: &str) -> BTreeMap<u16, Vec<Self>> {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        let mut by_port: BTreeMap<u16, Vec<Self>> = BTreeMap::new();
        for socket in text.lines().filter_map(Self::parse) {
            by_port.entry(socket.port).or_default().push(socket);
        }
        by_port
    }

    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, local, remote, state, _, _, _, _, _, inode, ..] = *fields else { return None };
        let (ip, port) = local.split_once(':')?;
        let unconnected = remote.ends_with(":0000");
        Some(Self {
            ip: address(ip)?,
            port: u16::from_str_radix(port, 16).ok()?,
            // A listener of TCP; UDP knows none, but `CLOSE` is what it calls the unconnected.
            serves: state == LISTEN || (state == CLOSE && unconnected),
            inode: inode.parse().ok()?,
        })
    }
}

/// Words of 32 bits, each in the order of the host.
fn address(text: &str) -> Option<IpAddr> {
    let words = text.as_bytes().chunks(8).map(|word| {
        let word = std::str::from_utf8(word).ok()?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    });
    let bytes = words.collect::<Option<Vec<_>>>()?.concat();
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).to_canonical()),
        _ => None,
    }
}

/// Who has which sockets open.
fn owners(inodes: &BTreeSet<u64>) -> BTreeMap<u64, Owner> {
    let mut holders: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    if inodes.is_empty() {
        return BTreeMap::new();
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let open = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        let sockets = open.filter_map(|entry| inode(&fs::read_link(entry.path()).ok()?));
        let wanted: BTreeSet<u64> = sockets.filter(|inode| inodes.contains(inode)).collect();
        for inode in wanted {
            holders.entry(inode).or_default().push(pid);
        }
    }
    let owned = holders.into_iter();
    owned.filter_map(|(inode, holders)| Some((inode, first(&holders)?))).collect()
}

/// The inode of `socket:[INODE]`.
fn inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Of the processes that have a socket open the one that the others have it from.
fn first(holders: &[u32]) -> Option<Owner> {
    let read = |pid: u32, file: &str| {
        fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default()
    };
    let heir =
        |pid: &u32| parent(&read(*pid, "stat")).is_some_and(|parent| holders.contains(&parent));
    let pid =
        holders.iter().copied().find(|pid| !heir(pid)).or_else(|| holders.first().copied())?;
    Some(Owner {
        process: read(pid, "comm").trim().to_owned(),
        pid,
        container: container(&read(pid, "cgroup")),
    })
}

/// The parent in `/proc/PID/stat`: the second field behind the name, which may contain anything.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The container whose id, of 64 hexadecimal digits, a control group is named by.
fn container(cgroup: &str) -> Option<String> {
    let words = cgroup.split(|c: char| !c.is_ascii_alphanumeric());
    let mut ids = words.filter(|word| {
        word.len() == 64 && word.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    });
    ids.next_back().map(|id| id[..12].to_owned())
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { process, pid, container } = self;
        write!(f, "{process} (process {pid}")?;
        if let Some(container) = container {
            write!(f, ", container {container}")?;
        }
        f.write_str(")")
    }
}

/// `include/net/tcp_states.h`.
const LISTEN: &str = "0A";
const CLOSE: &str = "07";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernels_table_is_understood() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     \
                    0        0 23456 1 0000000000000000 100 0 0 10 0";
        let socket = Socket::parse(line).unwrap();
        let ip = if cfg!(target_endian = "little") { "127.0.0.1" } else { "1.0.0.127" };
        let expected = Socket { ip: ip.parse().unwrap(), port: 8080, serves: true, inode: 23456 };
        assert_eq!(socket, expected);
        let connected = line.replace("00000000:0000 0A", "0100007F:A000 01");
        assert!(!Socket::parse(&connected).unwrap().serves);
        assert_eq!(Socket::parse("  sl  local_address rem_address   st"), None);
    }

    #[test]
    fn a_parent_is_known_whatever_its_child_is_called() {
        assert_eq!(parent("77 (a) b) S 42 77 77 0"), Some(42));
    }

    #[test]
    fn a_container_is_known_by_its_control_group() {
        let id = "4f".repeat(32);
        for cgroup in [
            format!("0::/system.slice/docker-{id}.scope\n"),
            format!("0::/machine.slice/libpod-{id}.scope/container\n"),
            format!("1:name=systemd:/docker/{id}\n"),
        ] {
            assert_eq!(container(&cgroup).as_deref(), Some("4f4f4f4f4f4f"), "{cgroup}");
        }
        assert_eq!(container("0::/system.slice/nginx.service\n"), None);
    }
}
