use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        time::TimeVal,
    },
};
use weft_vxlan::{Namespace, NetlinkError};

/// Every frame that passes the interfaces of a namespace, from its making to its reading.
pub(crate) struct Capture {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Vec<Vec<u8>>>,
}

impl Capture {
    pub(crate) fn on(namespace: &Namespace) -> Self {
        let socket = namespace.run(|| Ok::<_, NetlinkError>(open()?)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Self { stop, reader: thread::spawn(move || read(&socket, &stopped)) }
    }

    /// What was sent before.
    pub(crate) fn frames(self) -> Vec<Vec<u8>> {
        self.stop.store(true, Ordering::Relaxed);
        self.reader.join().unwrap()
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
    setsockopt(&socket, RcvBufForce, &(32 << 20))?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 50_000))?;
    Ok(socket)
}

fn read(socket: &OwnedFd, stopped: &AtomicBool) -> Vec<Vec<u8>> {
    let (mut frames, mut buffer) = (Vec::new(), vec![0; 1 << 17]);
    loop {
        // Looked at before: what the socket holds by then is still read.
        let last = stopped.load(Ordering::Relaxed);
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => frames.push(buffer[..length].to_vec()),
            Err(Errno::EAGAIN) if last => return frames,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => panic!("the capture ended: {errno}"),
        }
    }
}
