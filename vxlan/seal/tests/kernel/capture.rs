use std::{
    io::Read,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::namespace::Namespace;

/// Everything that crosses the links of a namespace, as seen by a packet socket (packet(7)).
pub(crate) struct Capture {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    pub(crate) fn of(namespace: &Namespace) -> Self {
        const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();
        let mut socket = namespace.run(|| {
            Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(ALL)))).unwrap()
        });
        socket.set_recv_buffer_size(64 << 20).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let frames = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, ended) = (Arc::clone(&frames), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut frame = vec![0; 1 << 17];
            loop {
                match socket.read(&mut frame) {
                    Ok(len) => seen.lock().unwrap().push(frame[..len].to_vec()),
                    Err(_) if ended.load(Ordering::Relaxed) => return,
                    Err(_) => {}
                }
            }
        });
        Self { frames, stop, thread: Some(thread) }
    }

    /// What was seen so far.
    pub(crate) fn frames(&self) -> Vec<Vec<u8>> {
        self.frames.lock().unwrap().clone()
    }

    /// Ends, and gives all that was seen.
    pub(crate) fn end(mut self) -> Vec<Vec<u8>> {
        self.join();
        self.frames()
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.join();
    }
}

/// The payload of a UDP datagram over IPv4 or IPv6 to `port`, if the frame is one.
pub(crate) fn udp_payload(frame: &[u8], port: u16) -> Option<&[u8]> {
    let (udp, ok) = match frame.get(12..14)? {
        [8, 0] => (14 + usize::from(frame[14] & 15) * 4, frame.get(23) == Some(&17)),
        [0x86, 0xdd] => (54, frame.get(20) == Some(&17)),
        _ => return None,
    };
    let header = frame.get(udp..udp + 8)?;
    (ok && header[2..4] == port.to_be_bytes()).then(|| &frame[udp + 8..])
}
