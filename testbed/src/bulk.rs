use std::{
    io::{Read as _, Write as _},
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use aws_lc_rs::digest::{Context as Hash, SHA256};

use crate::{Container, flow::connect, ping::joined};

/// What became of many bytes over one TCP connection.
#[derive(Clone, Copy, Debug)]
pub struct Bulk {
    pub took: Duration,
    /// Segments that the sender's kernel sent again.
    pub retransmits: u64,
}

impl Bulk {
    pub fn gigabits_per_second(&self, bytes: u64) -> f64 {
        bytes as f64 * 8.0 / 1e9 / self.took.as_secs_f64()
    }
}

/// Sends `bytes` over one TCP connection, of which no part is like another, and compares the
/// SHA-256 of both ends.
///
/// # Errors
///
/// The connection cannot be made, breaks or stalls for 30 s, or other bytes arrive than were sent.
pub fn bulk(from: &Container, to: &Container, address: IpAddr, bytes: u64) -> anyhow::Result<Bulk> {
    let before = retransmits(from)?;
    let (mut client, mut server) = connect(from, to, address)?;
    let start = Instant::now();
    let sender = thread::spawn(move || -> anyhow::Result<_> {
        let (mut hash, mut block) = (Hash::new(&SHA256), pattern());
        let mut left = bytes;
        while left > 0 {
            // Each kilobyte says where it is, so that none can stand for another.
            for (at, piece) in block.chunks_exact_mut(1024).enumerate() {
                piece[..8].copy_from_slice(&(left.wrapping_mul(1024) + at as u64).to_be_bytes());
            }
            let length = block.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            hash.update(&block[..length]);
            client.write_all(&block[..length]).context("the sender's connection broke")?;
            left -= length as u64;
        }
        Ok(hash.finish())
    });
    let (mut hash, mut received, mut buffer) = (Hash::new(&SHA256), 0_u64, vec![0; BLOCK_BYTES]);
    loop {
        match server.read(&mut buffer).context("the receiver's connection broke")? {
            0 => break,
            length => {
                hash.update(&buffer[..length]);
                received += length as u64;
            }
        }
    }
    let (took, sent) = (start.elapsed(), joined(sender)?);
    anyhow::ensure!(received == bytes, "{received} of {bytes} bytes arrived");
    let arrived = hash.finish();
    anyhow::ensure!(arrived.as_ref() == sent.as_ref(), "other bytes arrived than were sent");
    Ok(Bulk { took, retransmits: retransmits(from)?.saturating_sub(before) })
}

/// TCP segments that the kernel of `container` has sent again, of all its connections
/// (RFC 4022, tcpRetransSegs).
fn retransmits(container: &Container) -> anyhow::Result<u64> {
    let text = container.host().sh(&format!("cat /proc/{}/net/snmp", container.pid()))?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let mut pairs = names.split(' ').zip(values.split(' '));
    let value = pairs.find(|(name, _)| *name == "RetransSegs").map(|(_, value)| value);
    value.with_context(|| format!("no RetransSegs in {text}"))?.parse().context("a count")
}

fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).take(BLOCK_BYTES / 8).flatten().collect()
}

const BLOCK_BYTES: usize = 1 << 20;
