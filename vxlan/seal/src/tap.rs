//! The TAP that an encrypted network has in the place of a VXLAN link.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
};

use nix::{errno::Errno, net::if_::if_nametoindex};

use crate::{Offload, OffloadState, OffloadSwitches};

/// Bytes of the header before each frame that is read from or written to a TAP
/// (`struct virtio_net_hdr`).
pub const VNET_HEADER: usize = 10;

/// A persistent multi-queue TAP in the calling thread's network namespace.
#[derive(Debug)]
pub struct Tap;

/// The open queues of one TAP. The link stays when they are dropped, without a carrier.
#[derive(Debug)]
pub struct TapQueues {
    name: String,
    queues: Vec<File>,
    states: [(Offload, OffloadState); 2],
}

impl Tap {
    /// Opens `queues` queues of the TAP `name`, which is made if it is not there.
    ///
    /// The link outlives the process: whoever keeps the namespace's links removes it. Its transmit
    /// queue should be made 2000 packets long, or bursts are lost at its mouth.
    ///
    /// # Errors
    ///
    /// There is no `/dev/net/tun`, `CAP_NET_ADMIN` is missing, a link of that name is something
    /// else, or the kernel lacks what no TAP of weft can be without: several queues, and frames
    /// with a checksum left to do.
    pub fn ensure(
        name: &str,
        queues: usize,
        switches: OffloadSwitches,
    ) -> Result<TapQueues, TapError> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ {
            return Err(TapError::Name { name: name.into() });
        }
        let existed = if_nametoindex(name).is_ok();
        let queues =
            (0..queues.max(1)).map(|_| open_queue(name, existed)).collect::<Result<Vec<_>, _>>()?;

        // The offloads belong to the device; any queue sets them for all.
        let states = set_offloads(&queues[0], name, switches)?;
        Ok(TapQueues { name: name.into(), queues, states })
    }
}

impl TapQueues {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the kernel said to each offload of the TAP.
    pub fn offloads(&self) -> &[(Offload, OffloadState)] {
        &self.states
    }

    pub(crate) fn into_parts(self) -> (String, Vec<File>) {
        (self.name, self.queues)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("{name:?} is no name of a link: give 1 to 15 bytes")]
    Name { name: String },
    #[error(
        "no /dev/net/tun on this host: load the module `tun`, or give the device to the agent's container"
    )]
    Missing,
    #[error("not permitted to {op} TAP {name}: run the agent as root or give it CAP_NET_ADMIN")]
    NotPermitted { name: String, op: &'static str },
    #[error(
        "link {name} is there, but is no multi-queue TAP of weft: remove it (`ip link del {name}`)"
    )]
    NotOurs { name: String },
    #[error("TAP {name} is in use by another process: stop the other agent")]
    Busy { name: String },
    #[error(
        "failed to {op} TAP {name}: encrypted networks need the kernel's multi-queue TUN/TAP driver"
    )]
    Kernel {
        name: String,
        op: &'static str,
        #[source]
        source: io::Error,
    },
}

impl TapError {
    fn new(name: &str, op: &'static str, existed: bool, errno: Errno) -> Self {
        let name = name.to_owned();
        match errno {
            Errno::EPERM | Errno::EACCES => Self::NotPermitted { name, op },
            Errno::EBUSY => Self::Busy { name },
            Errno::EINVAL if existed => Self::NotOurs { name },
            errno => Self::Kernel { name, op, source: errno.into() },
        }
    }
}

fn open_queue(name: &str, existed: bool) -> Result<File, TapError> {
    let failed = |op| move |errno| TapError::new(name, op, existed, errno);
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let queue = options.open("/dev/net/tun").map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::Missing,
        errno => TapError::new(name, "open", existed, Errno::from_raw(errno.unwrap_or(libc::EIO))),
    })?;

    let fd = queue.as_raw_fd();
    kernel::attach(fd, name).map_err(failed("attach a queue to"))?;
    kernel::persist(fd).map_err(failed("keep"))?;
    kernel::set_header_size(fd, VNET_HEADER).map_err(failed("set the header size of"))?;
    Ok(queue)
}

/// Asks for the offloads that `switches` allow, one after the other: an older kernel refuses the
/// whole set for the sake of one.
fn set_offloads(
    queue: &File,
    name: &str,
    switches: OffloadSwitches,
) -> Result<[(Offload, OffloadState); 2], TapError> {
    let fd = queue.as_raw_fd();
    let mut flags = kernel::TUN_F_CSUM;
    kernel::set_offload(fd, flags)
        .map_err(|errno| TapError::new(name, "set the checksum offload of", false, errno))?;

    let mut probe = |offload: Offload, more: u32, possible: bool| {
        if !switches.allows(offload) {
            return OffloadState::Off;
        }
        if !possible {
            return OffloadState::Unsupported("it needs tap-tso".into());
        }
        match kernel::set_offload(fd, flags | more) {
            Ok(()) => {
                flags |= more;
                OffloadState::On
            }
            Err(errno) => OffloadState::Unsupported(format!("TUNSETOFFLOAD: {errno}")),
        }
    };
    let tso = probe(Offload::TapTso, kernel::TUN_F_TSO, true);
    let uso = probe(Offload::TapUso, kernel::TUN_F_USO, true);
    Ok([(Offload::TapTso, tso), (Offload::TapUso, uso)])
}

#[expect(unsafe_code, reason = "the TUN/TAP driver is spoken to by ioctl alone")]
mod kernel {
    use super::{Errno, RawFd};

    // include/uapi/linux/if_tun.h
    const IFF_TAP: i16 = 0x0002;
    const IFF_NO_PI: i16 = 0x1000;
    const IFF_VNET_HDR: i16 = 0x4000;
    const IFF_MULTI_QUEUE: i16 = 0x0100;
    pub(super) const TUN_F_CSUM: u32 = 0x01;
    /// TSO4, TSO6 and TSO with ECN.
    pub(super) const TUN_F_TSO: u32 = 0x02 | 0x04 | 0x08;
    /// USO4 and USO6.
    pub(super) const TUN_F_USO: u32 = 0x20 | 0x40;

    mod request {
        use nix::{
            ioctl_readwrite_bad, ioctl_write_int_bad, ioctl_write_ptr_bad, request_code_write,
        };

        const fn code(number: u8) -> libc::c_ulong {
            request_code_write!(b'T', number, size_of::<libc::c_int>()) as libc::c_ulong
        }

        ioctl_readwrite_bad!(set_iff, code(202), libc::ifreq);
        ioctl_write_int_bad!(set_persist, code(203));
        ioctl_write_int_bad!(set_offload, code(208));
        ioctl_write_ptr_bad!(set_vnet_hdr_sz, code(216), libc::c_int);
    }

    pub(super) fn attach(fd: RawFd, name: &str) -> Result<(), Errno> {
        // SAFETY: `ifreq` is plain data; all zeros is a value of it.
        let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        ifreq.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
        // SAFETY: `fd` is open for the call, `ifreq` is a whole `struct ifreq`, which the driver reads
        // reads, and writes nothing but its name into.
        unsafe { request::set_iff(fd, &raw mut ifreq) }.map(drop)
    }

    pub(super) fn persist(fd: RawFd) -> Result<(), Errno> {
        // SAFETY: the argument is a number.
        unsafe { request::set_persist(fd, 1) }.map(drop)
    }

    pub(super) fn set_header_size(fd: RawFd, bytes: usize) -> Result<(), Errno> {
        let bytes = libc::c_int::try_from(bytes).map_err(|_| Errno::EINVAL)?;
        // SAFETY: `bytes` is an int that lives through the call.
        unsafe { request::set_vnet_hdr_sz(fd, &raw const bytes) }.map(drop)
    }

    pub(super) fn set_offload(fd: RawFd, flags: u32) -> Result<(), Errno> {
        // SAFETY: the argument is a number.
        unsafe { request::set_offload(fd, flags.cast_signed()) }.map(drop)
    }
}
