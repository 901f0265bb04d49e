use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::Value;

use crate::{Container, eventually, pace, ping::joined};

/// Sends `bytes` over one TCP connection and checks each at the other end; returns the time it
/// took.
///
/// # Errors
///
/// The connection cannot be made, breaks, stalls for 30 s, or a byte is not the one that was sent.
pub fn transfer(
    from: &Container,
    to: &Container,
    address: IpAddr,
    bytes: usize,
) -> anyhow::Result<Duration> {
    let (mut client, mut server) = connect(from, to, address)?;
    let start = Instant::now();
    let sender = thread::spawn(move || -> anyhow::Result<()> {
        let data: Vec<u8> = (0..bytes).map(byte_at).collect();
        client.write_all(&data).context("the sender's connection broke")?;
        Ok(())
    });
    let mut received = Vec::with_capacity(bytes);
    server.read_to_end(&mut received).context("the receiver's connection broke")?;
    let took = start.elapsed();
    joined(sender)?;
    anyhow::ensure!(received.len() == bytes, "{} of {bytes} bytes arrived", received.len());
    let wrong = received.iter().enumerate().find(|(at, byte)| **byte != byte_at(*at));
    anyhow::ensure!(wrong.is_none(), "byte {:?} is not the one that was sent", wrong);
    Ok(took)
}

/// A TCP connection in the background that carries a numbered block every so often.
#[derive(Debug)]
pub struct Flow {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<anyhow::Result<u64>>,
    receiver: JoinHandle<anyhow::Result<(u64, Duration)>>,
}

/// What became of a [`Flow`].
#[derive(Clone, Copy, Debug)]
pub struct FlowSummary {
    pub sent_blocks: u64,
    pub received_blocks: u64,
    /// The longest time between two arrivals; one retransmission makes at least 200 ms of it.
    pub longest_gap: Duration,
}

impl Flow {
    /// # Errors
    ///
    /// The connection cannot be made.
    pub fn start(
        from: &Container,
        to: &Container,
        address: IpAddr,
        every: Duration,
    ) -> anyhow::Result<Self> {
        let (mut client, mut server) = connect(from, to, address)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            let start = Instant::now();
            let mut sent: u64 = 0;
            while !stopped.load(Ordering::Relaxed) {
                let mut block = [0; BLOCK];
                block[..8].copy_from_slice(&sent.to_be_bytes());
                client.write_all(&block).context("the sender's connection broke")?;
                sent += 1;
                let due = every.saturating_mul(u32::try_from(sent).unwrap_or(u32::MAX));
                pace(due.saturating_sub(start.elapsed()));
            }
            Ok(sent)
        });
        let receiver = thread::spawn(move || {
            let (mut received, mut longest, mut last) = (0, Duration::ZERO, Instant::now());
            let mut block = [0; BLOCK];
            loop {
                match server.read_exact(&mut block) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                        return Ok((received, longest));
                    }
                    Err(error) => return Err(error).context("the receiver's connection broke"),
                }
                anyhow::ensure!(block[..8] == u64::to_be_bytes(received), "a block is missing");
                received += 1;
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
        });
        Ok(Self { stop, sender, receiver })
    }

    /// Ends the connection and counts.
    ///
    /// # Errors
    ///
    /// It broke on the way, or a block is missing.
    pub fn stop(self) -> anyhow::Result<FlowSummary> {
        self.stop.store(true, Ordering::Relaxed);
        let sent_blocks = joined(self.sender)?;
        let (received_blocks, longest_gap) = joined(self.receiver)?;
        Ok(FlowSummary { sent_blocks, received_blocks, longest_gap })
    }
}

/// What iperf3 measured.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    pub gigabits_per_second: f64,
    pub retransmits: u64,
}

/// Runs iperf3, one TCP flow, between two containers.
///
/// # Errors
///
/// iperf3 is not installed or fails.
pub fn throughput(
    from: &Container,
    to: &Container,
    address: IpAddr,
    seconds: u32,
) -> anyhow::Result<Throughput> {
    let server = to.sh("iperf3 --server --one-off --daemon")?;
    eventually(Duration::from_secs(20), &format!("iperf3 listens ({server})"), || {
        to.sh("ss -tlnH 'sport = 5201' | grep -q 5201")
    })?;
    let text = from
        .exec(&[
            "iperf3",
            "--client",
            &address.to_string(),
            "--time",
            &seconds.to_string(),
            "--omit",
            "1",
            "--json",
        ])?
        .ok()?;
    let report: Value = serde_json::from_str(&text)?;
    let number = |pointer: &str| {
        report.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("no {pointer}"))
    };
    Ok(Throughput {
        gigabits_per_second: number("/end/sum_received/bits_per_second")? / 1e9,
        retransmits: number("/end/sum_sent/retransmits")? as u64,
    })
}

/// A connection from `from` to `to`; the first end is the client's.
pub(crate) fn connect(
    from: &Container,
    to: &Container,
    address: IpAddr,
) -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = to.inside(|| Ok(TcpListener::bind(SocketAddr::new(address, 0))?))?;
    let target = listener.local_addr()?;
    let client = from
        .inside(|| Ok(TcpStream::connect_timeout(&target, PATIENCE)?))
        .with_context(|| format!("{} cannot connect to {target}", from.name()))?;
    let (server, _) = listener.accept()?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
    }
    Ok((client, server))
}

/// A pattern with no period that a lost or repeated segment could hide in.
fn byte_at(at: usize) -> u8 {
    ((at * 31) ^ (at >> 8) ^ (at >> 16)) as u8
}

const BLOCK: usize = 1024;
const PATIENCE: Duration = Duration::from_secs(30);
