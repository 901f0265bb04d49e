use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{Container, pace, ping::joined};

/// Numbered UDP datagrams in the background, one every so often.
#[derive(Debug)]
pub struct Sequence {
    stop: Arc<AtomicBool>,
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
        let target = receiver.local_addr()?;
        let unspecified = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let sender = from.inside(|| Ok(UdpSocket::bind(unspecified)?))?;
        sender.connect(target).with_context(|| format!("no way to {target}"))?;
        receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let [sending, receiving] = [Arc::clone(&stop), Arc::clone(&stop)];
        let sender = thread::spawn(move || {
            let (start, mut sent) = (Instant::now(), 0_u64);
            let mut payload = vec![0; payload_bytes.max(8)];
            while !sending.load(Ordering::Relaxed) {
                payload[..8].copy_from_slice(&sent.to_be_bytes());
                sender.send(&payload).context("cannot send a datagram")?;
                sent += 1;
                let due = every.saturating_mul(u32::try_from(sent).unwrap_or(u32::MAX));
                pace(due.saturating_sub(start.elapsed()));
            }
            Ok(sent)
        });
        let receiver = thread::spawn(move || receive(&receiver, &receiving));
        Ok(Self { stop, sender, receiver })
    }

    /// Stops sending, waits for what is still on its way, and counts.
    ///
    /// # Errors
    ///
    /// A socket failed.
    pub fn stop(self) -> anyhow::Result<SequenceSummary> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = joined(self.sender)?;
        Ok(SequenceSummary { sent, arrived: joined(self.receiver)? })
    }
}

/// Counts until `stop` is set and nothing has come for the length of the socket's patience.
fn receive(socket: &UdpSocket, stop: &AtomicBool) -> anyhow::Result<Arrived> {
    let (mut arrived, mut seen, mut highest) = (Arrived::default(), Vec::new(), None);
    let (mut last, mut buffer) = (Instant::now(), [0; 65536]);
    loop {
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stop.load(Ordering::Relaxed) {
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
