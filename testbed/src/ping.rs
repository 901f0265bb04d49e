use std::{
    io::{ErrorKind, Read as _},
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Container, wait::Rhythm};

/// A raw ICMP socket in a container (RFC 792, RFC 4443 §4): echoes without a process each.
#[derive(Debug)]
pub struct Pinger {
    socket: Socket,
    target: IpAddr,
    identifier: u16,
}

impl Pinger {
    /// # Errors
    ///
    /// The container is gone, or has no address of the target's family.
    pub fn open(from: &Container, target: IpAddr) -> anyhow::Result<Self> {
        let (domain, protocol) = match target {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = from.inside(|| Ok(Socket::new(domain, Type::RAW, Some(protocol))?))?;
        socket
            .connect(&SocketAddr::new(target, 0).into())
            .with_context(|| format!("{} has no way to {target}", from.name()))?;
        let identifier = (std::process::id() & 0xffff) as u16;
        Ok(Self { socket, target, identifier })
    }

    /// Sends echo `sequence` and waits for its answer; `None` when there is none in time.
    ///
    /// # Errors
    ///
    /// The kernel refuses to send; a host that cannot be reached counts as no answer.
    pub fn echo(&self, sequence: u16, patience: Duration) -> anyhow::Result<Option<Duration>> {
        let start = Instant::now();
        self.send(sequence)?;
        while let Some(left) = patience.checked_sub(start.elapsed()).filter(|left| !left.is_zero())
        {
            match self.receive(left)? {
                Some(answered) if answered == sequence => return Ok(Some(start.elapsed())),
                Some(_) | None => {}
            }
        }
        Ok(None)
    }

    fn send(&self, sequence: u16) -> anyhow::Result<()> {
        match self.socket.send(&echo_request(self.target, self.identifier, sequence)) {
            Ok(_) => Ok(()),
            Err(error) if is_unreachable(&error) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot ping {}", self.target)),
        }
    }

    /// The sequence number of the next answer, or `None` when none comes in time.
    fn receive(&self, patience: Duration) -> anyhow::Result<Option<u16>> {
        self.socket.set_read_timeout(Some(patience))?;
        let mut buffer = [0; 2048];
        match (&self.socket).read(&mut buffer) {
            Ok(length) => Ok(self.answered(&buffer[..length])),
            Err(error) if is_unreachable(&error) => Ok(None),
            Err(error) => Err(error).context("cannot read a raw socket"),
        }
    }

    fn answered(&self, packet: &[u8]) -> Option<u16> {
        // IPv4 hands the packet over with its header, IPv6 without.
        let (message, reply) = match self.target {
            IpAddr::V4(_) => (packet.get(usize::from(packet.first()? & 0x0f) * 4..)?, 0),
            IpAddr::V6(_) => (packet, 129),
        };
        let ours = *message.first()? == reply
            && message.get(4..6)? == self.identifier.to_be_bytes().as_slice();
        ours.then(|| Some(u16::from_be_bytes([*message.get(6)?, *message.get(7)?])))?
    }
}

/// A ping in the background, an echo every so often.
#[derive(Debug)]
pub struct PingStream {
    stop: Arc<AtomicBool>,
    /// How many echoes were sent, once that is known.
    all: Arc<OnceLock<u64>>,
    sender: JoinHandle<anyhow::Result<u64>>,
    receiver: JoinHandle<anyhow::Result<PingSummary>>,
}

/// What became of a [`PingStream`].
#[derive(Clone, Debug, Default)]
pub struct PingSummary {
    pub sent: u64,
    pub received: u64,
    /// The longest time between two answers.
    pub longest_gap: Duration,
    /// Where answers were missing: when the next one came, and how many were not there.
    pub holes: Vec<(Duration, u16)>,
}

impl PingSummary {
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }
}

impl PingStream {
    /// # Errors
    ///
    /// As [`Pinger::open`].
    pub fn start(from: &Container, target: IpAddr, every: Duration) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let outgoing = Pinger::open(from, target)?;
        let incoming = Pinger { socket: outgoing.socket.try_clone()?, ..outgoing };
        widen(&incoming.socket)?;
        let stopped = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            let mut rhythm = Rhythm::new(every);
            let mut sent: u64 = 0;
            while !stopped.load(Ordering::Relaxed) {
                outgoing.send((sent & 0xffff) as u16)?;
                sent += 1;
                rhythm.wait();
            }
            Ok(sent)
        });
        let all: Arc<OnceLock<u64>> = Arc::default();
        let told = Arc::clone(&all);
        let receiver = thread::spawn(move || {
            let (start, mut last) = (Instant::now(), Instant::now());
            let (mut summary, mut expected) = (PingSummary::default(), 0_u16);
            // What has not come two seconds after the last is lost.
            while told.get().is_none_or(|all| summary.received < *all && last.elapsed() < LOST) {
                let Some(sequence) = incoming.receive(Duration::from_millis(100))? else {
                    continue;
                };
                summary.received += 1;
                summary.longest_gap = summary.longest_gap.max(last.elapsed());
                if sequence != expected {
                    let missing = sequence.wrapping_sub(expected);
                    summary.holes.push((start.elapsed(), missing));
                }
                expected = sequence.wrapping_add(1);
                last = Instant::now();
            }
            Ok(summary)
        });
        Ok(Self { stop, all, sender, receiver })
    }

    /// Stops sending, waits for the last answers and counts.
    ///
    /// # Errors
    ///
    /// A socket failed on the way.
    pub fn stop(self) -> anyhow::Result<PingSummary> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = joined(self.sender);
        // Whatever the sender has done, the receiver is to end.
        let _ = self.all.set(*sent.as_ref().unwrap_or(&0));
        let sent = sent?;
        Ok(PingSummary { sent, ..joined(self.receiver)? })
    }
}

/// Makes room for what comes while a busy machine lets the receiver wait: what does not fit is lost
/// to it, but was not lost on the way. As root, whatever the host's limit is (socket(7)).
pub(crate) fn widen(socket: &impl AsFd) -> anyhow::Result<()> {
    setsockopt(socket, RcvBufForce, &RECEIVED_BYTES).context("no larger receive buffer")
}

pub(crate) fn joined<T>(thread: JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn echo_request(target: IpAddr, identifier: u16, sequence: u16) -> Vec<u8> {
    let kind = if target.is_ipv4() { 8 } else { 128 };
    let mut message = vec![kind, 0, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend([0; 48]);
    // The kernel fills the checksum in for ICMPv6, which covers a pseudo-header.
    if target.is_ipv4() {
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// The Internet checksum of an even number of bytes (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn is_unreachable(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock
            | ErrorKind::TimedOut
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::Interrupted
    )
}

const RECEIVED_BYTES: usize = 16 << 20;
const LOST: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_checked_message_is_zero() {
        let message = echo_request(IpAddr::from([10, 0, 0, 1]), 77, 3);
        assert_eq!(checksum(&message), 0);
    }
}
