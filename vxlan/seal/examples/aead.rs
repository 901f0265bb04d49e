//! Prints what it costs to seal and to open a packet, by suite and size, on one core.
//!
//! `cargo run --release -p weft-seal --example aead`

use std::error::Error;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::Suite;
use weft_seal::key::{Content, HEADER, Lane, Limits, Meta, OVERHEAD, Role, Root};

/// Bodies: a small datagram, a full packet at MTU 1500, a full packet at MTU 9000.
const BODIES: [usize; 3] = [64, 1414, 8900];

/// As many packets as one batch has before they are opened: they fit the caches.
const BATCH: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let mut out = io::stdout();
    writeln!(out, "{:<20}{:>8}{:>12}{:>12}", "suite", "bytes", "seal ns", "open ns")?;
    for suite in Suite::ALL {
        for body in BODIES {
            let (seal, open) = measure(suite, body)?;
            writeln!(out, "{:<20}{body:>8}{seal:>12.0}{open:>12.0}", suite.as_str())?;
        }
    }
    Ok(())
}

/// The fastest of many batches, in nanoseconds per packet: the others were disturbed.
fn measure(suite: Suite, body: usize) -> Result<(f64, f64), Box<dyn Error>> {
    let expires = Instant::now() + Duration::from_secs(3600);
    let root = |role| Arc::new(Root::new(&[7; 32], role, expires));
    let mut sealer = root(Role::Dialler).sealer(Lane::CONTROL, suite, Limits::default())?;
    let mut opener = root(Role::Acceptor).opener(Lane::CONTROL, &[suite])?;
    let mut packets = vec![vec![0; OVERHEAD + body]; BATCH];
    let (mut sealing, mut opening) = (Duration::MAX, Duration::MAX);

    for _ in 0..2000 {
        for packet in &mut packets {
            packet.fill(0);
            let room = packet[HEADER..].first_chunk_mut().expect("a packet has room for its meta");
            Meta::control(Content::Probe).encode(room);
        }
        let start = Instant::now();
        for packet in &mut packets {
            sealer.seal(start, packet)?;
        }
        sealing = sealing.min(start.elapsed());

        let start = Instant::now();
        for packet in &mut packets {
            opener.open(start, packet)?;
        }
        opening = opening.min(start.elapsed());
    }
    let each = |batch: Duration| batch.as_secs_f64() * 1e9 / BATCH as f64;
    Ok((each(sealing), each(opening)))
}
