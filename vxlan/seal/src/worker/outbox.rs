use std::{ops::Range, os::fd::AsFd, sync::Arc};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use socket2::SockAddr;

use crate::{
    Offload,
    counters::Share,
    mmsg::{MAX_PAYLOAD, MAX_SEGMENTS, Run, Sends},
    routes::Hop,
    shared::Shared,
    socket::LaneSocket,
};

/// Sealed packets that wait to be sent, put together to runs that one send takes.
pub(super) struct Outbox {
    shared: Arc<Shared>,
    lane: usize,
    buffer: Box<[u8]>,
    used: usize,
    runs: Vec<Pending>,
    hops: Vec<Hop>,
    sends: Sends,
    /// Whether a run of several packets may go out as one send.
    segment: bool,
    lost: Lost,
}

/// What could not be sent since it was last asked.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Lost {
    pub(super) queue: u64,
    pub(super) too_big: u64,
    pub(super) no_path: u64,
}

struct Pending {
    run: Run,
    hop: usize,
    /// The last packet was shorter than the others: nothing may follow it.
    closed: bool,
}

impl Outbox {
    pub(super) fn new(shared: Arc<Shared>, lane: usize) -> Self {
        Self {
            segment: shared.offloads.is_on(Offload::UdpSegment),
            shared,
            lane,
            buffer: vec![0; CAPACITY].into(),
            used: 0,
            runs: Vec::with_capacity(MAX_RUNS),
            hops: Vec::with_capacity(MAX_RUNS),
            sends: Sends::new(),
            lost: Lost::default(),
        }
    }

    /// Room for a packet of `len` bytes, after what waits was sent if there was none.
    pub(super) fn room(&mut self, len: usize, syscalls: &Share) -> &mut [u8] {
        if self.used + len > self.buffer.len() || self.runs.len() == MAX_RUNS {
            self.flush(syscalls);
        }
        &mut self.buffer[self.used..self.used + len]
    }

    /// The packet that was written to the room of `len` bytes goes to `hop`.
    pub(super) fn push(&mut self, len: usize, hop: &Hop) {
        let bytes = self.used..self.used + len;
        self.used += len;
        if self.segment
            && let Some(last) = self.runs.last_mut()
            && same_hop(&self.hops[last.hop], hop)
            && last.take(&bytes)
        {
            return;
        }
        let hop = match self.hops.last() {
            Some(last) if same_hop(last, hop) => self.hops.len() - 1,
            _ => {
                self.hops.push(hop.clone());
                self.hops.len() - 1
            }
        };
        self.runs.push(Pending { run: Run { bytes, size: len }, hop, closed: false });
    }

    /// Whether enough waits that sending it is worth a system call.
    pub(super) fn is_full(&self) -> bool {
        self.used >= WORTHWHILE
    }

    /// What was lost since the last call.
    pub(super) fn take_lost(&mut self) -> Lost {
        std::mem::take(&mut self.lost)
    }

    /// Sends all that waits.
    pub(super) fn flush(&mut self, syscalls: &Share) {
        let mut next = 0;
        while next < self.runs.len() {
            let socket = self.hops[self.runs[next].hop].socket;
            let of_socket = self.runs[next..]
                .iter()
                .take_while(|pending| self.hops[pending.hop].socket == socket)
                .count();
            self.send(next..next + of_socket, socket, syscalls);
            next += of_socket;
        }
        self.runs.clear();
        self.hops.clear();
        self.used = 0;
    }

    /// Sends `runs`, all from one socket.
    fn send(&mut self, mut runs: Range<usize>, socket: usize, syscalls: &Share) {
        let shared = Arc::clone(&self.shared);
        let socket = &shared.sockets[socket];
        let used = &shared.used(Offload::UdpSegment).sealing[self.lane];
        while !runs.is_empty() {
            let waiting = self.runs[runs.clone()]
                .iter()
                .map(|pending| (&pending.run, &self.hops[pending.hop].to));
            syscalls.add(1);
            match self.sends.send(socket, &self.buffer, waiting) {
                Ok(sent) => {
                    let sent = runs.start..runs.start + sent;
                    let cut = self.runs[sent.clone()].iter().filter(|p| p.run.packets() > 1);
                    used.add(cut.count() as u64);
                    runs.start = sent.end;
                }
                Err(Errno::EAGAIN) if wait_writable(socket) => {}
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    self.send_refused(runs.start, errno, socket, syscalls);
                    runs.start += 1;
                }
            }
        }
    }

    /// The kernel refused a run: either the path has become narrower, or it cannot cut runs there
    /// (a device without checksums, before Linux 6.x took that upon itself). Single packets tell.
    fn send_refused(&mut self, index: usize, errno: Errno, socket: &LaneSocket, syscalls: &Share) {
        let run = &self.runs[index].run;
        let suspect = run.packets() > 1
            && matches!(errno, Errno::EIO | Errno::EINVAL | Errno::EMSGSIZE | Errno::EOPNOTSUPP);
        if !suspect {
            return self.lose(index, errno, run.packets() as u64);
        }
        let all_sent = self.send_singly(index, socket, syscalls);
        if all_sent {
            self.segment = false;
            let why = format!("sending a run on {} gave {errno}", socket.local());
            if self.shared.offloads.fell_back(Offload::UdpSegment, why.clone()) {
                tracing::warn!(offload = %Offload::UdpSegment, "fell back to single sends: {why}");
            }
        }
    }

    /// Sends the packets of one run each on its own. True if none was refused.
    fn send_singly(&mut self, index: usize, socket: &LaneSocket, syscalls: &Share) -> bool {
        let Pending { ref run, hop, .. } = self.runs[index];
        let singles: Vec<_> = run.singles().collect();
        let to: SockAddr = self.hops[hop].to.clone();
        let mut next = 0;
        let mut all_sent = true;
        while next < singles.len() {
            syscalls.add(1);
            let waiting = singles[next..].iter().map(|single| (single, &to));
            match self.sends.send(socket, &self.buffer, waiting) {
                Ok(sent) => next += sent,
                Err(Errno::EAGAIN) if wait_writable(socket) => {}
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    all_sent = false;
                    self.lose(index, errno, 1);
                    next += 1;
                }
            }
        }
        all_sent
    }

    fn lose(&mut self, index: usize, errno: Errno, packets: u64) {
        match errno {
            Errno::EMSGSIZE => {
                self.lost.too_big += packets;
                let Pending { ref run, hop, .. } = self.runs[index];
                self.shared.narrowed(&self.hops[hop], run.size);
            }
            Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM => self.lost.queue += packets,
            _ => self.lost.no_path += packets,
        }
    }
}

impl Pending {
    /// Takes the packet at `bytes` into the run, if one send can have it too.
    fn take(&mut self, bytes: &Range<usize>) -> bool {
        let Run { bytes: own, size } = &mut self.run;
        let fits = !self.closed
            && own.end == bytes.start
            && bytes.len() <= *size
            && own.len() < *size * MAX_SEGMENTS
            && own.len() + bytes.len() <= MAX_PAYLOAD;
        if fits {
            self.closed = bytes.len() < *size;
            own.end = bytes.end;
        }
        fits
    }
}

fn same_hop(one: &Hop, other: &Hop) -> bool {
    one.socket == other.socket && one.to == other.to
}

/// Waits a moment for a full socket to drain. False if it did not.
fn wait_writable(socket: &LaneSocket) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    matches!(poll(&mut fds, PollTimeout::from(PATIENCE_MS)), Ok(1..))
}

/// Bytes of sealed packets that wait at most: more than the largest super-frame makes.
const CAPACITY: usize = 256 << 10;

/// Bytes from which on waiting for more gains nothing.
const WORTHWHILE: usize = 64 << 10;

const MAX_RUNS: usize = 256;

/// How long a full socket may hold up the frames behind.
const PATIENCE_MS: u8 = 2;

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::{OffloadState, OffloadSwitches, TunnelConfig, socket};

    /// What a tunnel on loopback has, and a socket that receives what it sends.
    fn outbox(port: u16, offloads: OffloadSwitches) -> (Arc<Shared>, Outbox, UdpSocket, Hop) {
        let config = TunnelConfig { offloads, ..TunnelConfig::on_loopback(port) };
        let (shared, _) = Shared::open(config).unwrap();
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_nonblocking(true).unwrap();
        let hop = Hop { socket: 0, to: receiver.local_addr().unwrap().into() };
        let outbox = Outbox::new(Arc::clone(&shared), 0);
        (shared, outbox, receiver, hop)
    }

    fn push(outbox: &mut Outbox, hop: &Hop, len: usize, byte: u8) {
        outbox.room(len, &Share::default()).fill(byte);
        outbox.push(len, hop);
    }

    fn received(receiver: &UdpSocket) -> Vec<(usize, u8)> {
        let mut datagram = [0; 2000];
        std::iter::from_fn(|| receiver.recv(&mut datagram).ok().map(|len| (len, datagram[0])))
            .collect()
    }

    #[test]
    fn packets_of_one_size_are_one_run_and_a_shorter_one_ends_it() {
        let (shared, mut outbox, receiver, hop) = outbox(16_791, OffloadSwitches::ALL_ON);
        for (byte, len) in [100, 100, 60, 100, 200, 200].into_iter().enumerate() {
            push(&mut outbox, &hop, len, byte as u8);
        }
        let runs: Vec<_> = outbox.runs.iter().map(|pending| pending.run.packets()).collect();
        assert_eq!(runs, [3, 1, 2]);

        outbox.flush(&Share::default());
        let lens = [(100, 0), (100, 1), (60, 2), (100, 3), (200, 4), (200, 5)];
        assert_eq!(received(&receiver), lens);
        assert_eq!(shared.used(Offload::UdpSegment).read(), 2);
    }

    #[test]
    fn a_run_has_no_more_packets_and_bytes_than_one_send_takes() {
        let (_, mut outbox, _, hop) = outbox(16_793, OffloadSwitches::ALL_ON);
        for _ in 0..65 {
            push(&mut outbox, &hop, 64, 0);
        }
        for _ in 0..45 {
            push(&mut outbox, &hop, 1482, 0);
        }
        let runs: Vec<_> = outbox.runs.iter().map(|pending| pending.run.packets()).collect();
        assert_eq!(runs, [64, 1, 44, 1]);
    }

    #[test]
    fn a_kernel_that_refuses_runs_gets_single_packets_and_none_is_lost() {
        let (shared, mut outbox, receiver, hop) = outbox(16_795, OffloadSwitches::ALL_ON);
        // The kernel cuts no datagrams that it must not put a checksum on.
        socket::forbid_checksums(&shared.sockets[0]).unwrap();
        for byte in 0..10 {
            push(&mut outbox, &hop, 100, byte);
        }
        outbox.flush(&Share::default());

        assert_eq!(received(&receiver), (0..10).map(|byte| (100, byte)).collect::<Vec<_>>());
        assert_eq!(outbox.take_lost(), Lost::default());
        let state = shared.offloads.state(Offload::UdpSegment);
        assert!(matches!(state, OffloadState::FellBack(_)), "{state}");

        for byte in 0..3 {
            push(&mut outbox, &hop, 100, byte);
        }
        assert_eq!(outbox.runs.len(), 3);
        outbox.flush(&Share::default());
        assert_eq!(received(&receiver).len(), 3);
        assert_eq!(shared.offloads.refused(Offload::UdpSegment), 1);
    }

    #[test]
    fn what_cannot_be_sent_at_all_is_counted_and_costs_no_offload() {
        let (shared, mut outbox, receiver, _) = outbox(16_797, OffloadSwitches::ALL_ON);
        let nowhere = "240.0.0.1:9".parse::<std::net::SocketAddr>().unwrap();
        push(&mut outbox, &Hop { socket: 0, to: nowhere.into() }, 100, 1);
        outbox.flush(&Share::default());
        assert_eq!(outbox.take_lost(), Lost { no_path: 1, ..Lost::default() });
        assert!(shared.offloads.is_on(Offload::UdpSegment));
        assert!(received(&receiver).is_empty());
    }
}
