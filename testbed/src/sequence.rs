use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{
    Container,
    ping::{joined, widen},
    wait::Rhythm,
};

/// Numbered UDP datagrams in the background, one every so often.
#[derive(Debug)]
pub struct Sequence {
    stop: Arc<AtomicBool>,
    /// How many were sent, once that is known.
    all: Arc<OnceLock<u64>>,
    sender: JoinHandle<anyhow::Result<u64>>,
    receiver: JoinHandle<anyhow::Result<Arrived>>,
}

/// What became of a [`Sequence`].
#[derive(Clone, Copy, Debug, Default)]
pub struct SequenceSummary {
    pub sent: u64,
    pub arrived: Arrived,
}

/// What the receiver saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Arrived {
    /// Each counts once.
    pub datagrams: u64,
    /// Came after one with a higher number.
    pub late: u64,
    pub twice: u64,
    /// The longest time between two arrivals.
    pub longest_gap: Duration,
}

impl SequenceSummary {
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.arrived.datagrams)
    }
}

impl Sequence {
    /// # Errors
    ///
    /// A container is gone.
    pub fn start(
        from: &Container,
        to: &Container,
        address: IpAddr,
        payload_bytes: usize,
        every: Duration,
    ) -> anyhow::Result<Self> {
        let receiver = to.inside(|| Ok(UdpSocket::bind(SocketAddr::new(address, 0))?))?;
        widen(&receiver)?;
        let target = receiver.local_addr()?;
        let unspecified = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let sender = from.inside(|| Ok(UdpSocket::bind(unspecified)?))?;
        sender.connect(target).with_context(|| format!("no way to {target}"))?;
        receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let all: Arc<OnceLock<u64>> = Arc::default();
        let (sending, told) = (Arc::clone(&stop), Arc::clone(&all));
        let sender = thread::spawn(move || {
            let (mut rhythm, mut sent) = (Rhythm::new(every), 0_u64);
            let mut payload = vec![0; payload_bytes.max(8)];
            while !sending.load(Ordering::Relaxed) {
                payload[..8].copy_from_slice(&sent.to_be_bytes());
                sender.send(&payload).context("cannot send a datagram")?;
                sent += 1;
                rhythm.wait();
            }
            Ok(sent)
        });
        let receiver = thread::spawn(move || receive(&receiver, &told));
        Ok(Self { stop, all, sender, receiver })
    }

    /// Stops sending, waits for what is still on its way, and counts.
    ///
    /// # Errors
    ///
    /// A socket failed.
    pub fn stop(self) -> anyhow::Result<SequenceSummary> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = joined(self.sender);
        // Whatever the sender has done, the receiver is to end.
        let _ = self.all.set(*sent.as_ref().unwrap_or(&0));
        let sent = sent?;
        Ok(SequenceSummary { sent, arrived: joined(self.receiver)? })
    }
}

/// Counts until it is told how many were sent and has all of them, or those that it lacks have had
/// their time; and in any case until nothing has come for the length of the socket's patience.
fn receive(socket: &UdpSocket, all: &OnceLock<u64>) -> anyhow::Result<Arrived> {
    let (mut arrived, mut seen, mut highest) = (Arrived::default(), Vec::new(), None);
    let (mut last, mut buffer) = (Instant::now(), [0; 65536]);
    loop {
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                let complete = all.get().is_some_and(|&all| arrived.datagrams >= all);
                if complete || all.get().is_some() && last.elapsed() > STRAGGLERS {
                    return Ok(arrived);
                }
                continue;
            }
            Err(error) => return Err(error).context("cannot receive a datagram"),
        };
        let number = buffer[..length].first_chunk().copied().context("a datagram is cut")?;
        let number = usize::try_from(u64::from_be_bytes(number))?;
        if seen.len() <= number {
            seen.resize(number + 1, false);
        }
        match std::mem::replace(&mut seen[number], true) {
            true => arrived.twice += 1,
            false => arrived.datagrams += 1,
        }
        arrived.late += u64::from(highest.is_some_and(|highest| number < highest));
        highest = highest.max(Some(number));
        arrived.longest_gap = arrived.longest_gap.max(last.elapsed());
        last = Instant::now();
    }
}

/// How long after the last arrival one that is missing may still come.
const STRAGGLERS: Duration = Duration::from_secs(2);
