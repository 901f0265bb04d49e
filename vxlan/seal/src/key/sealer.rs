use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::Suite;

use super::root::Root;
use super::schedule::{Chain, Key};
use super::wire::{HEADER, Header, Lane, OVERHEAD};

/// How much one key seals before the sender goes to the next epoch. What is set beyond the bounds
/// counts as the bound.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// At least one, at most [`MAX_PACKETS`](Self::MAX_PACKETS).
    pub packets: u64,
    /// Whole sealed packets, headers and tags included; at most [`MAX_BYTES`](Self::MAX_BYTES). A
    /// key seals one packet at least.
    pub bytes: u64,
    /// The control lane, which seals little and whose receiver has nobody to tell it an epoch,
    /// keeps a key for an hour at least.
    pub age: Duration,
}

impl Limits {
    /// RFC 9001 appendix B.1.1 allows 2^28 packets of 2^11 bytes for an advantage of 2^-57.
    pub const MAX_PACKETS: u64 = 1 << 28;

    /// The same bound in bytes is 2^39, for packets of any size; half of it, for the headers.
    pub const MAX_BYTES: u64 = 1 << 38;

    /// How long the control lane keeps a key at least.
    pub const CONTROL_AGE: Duration = Duration::from_secs(3600);

    fn bounded(self, lane: Lane) -> Self {
        Self {
            packets: self.packets.clamp(1, Self::MAX_PACKETS),
            bytes: self.bytes.min(Self::MAX_BYTES),
            age: match lane {
                Lane::CONTROL => self.age.max(Self::CONTROL_AGE),
                _ => self.age,
            },
        }
    }
}

impl Default for Limits {
    /// 2^26 packets, 2^36 bytes, 120 seconds.
    fn default() -> Self {
        Self { packets: 1 << 26, bytes: 1 << 36, age: Duration::from_secs(120) }
    }
}

/// Why a packet was not sealed. It must not be sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Unsealed {
    #[error("the session has used up its keys: it needs a new one")]
    Exhausted,
    #[error("a certificate of the session has expired: renew it")]
    Expired,
    #[error("{len} bytes are no packet: it has {OVERHEAD} to 65535")]
    Size { len: usize },
}

/// Seals the packets of one lane of one root. Lent by [`Root::sealer`], owned by one thread.
///
/// It goes to the next epoch by itself; that, and nothing else, derives keys and allocates.
pub struct Sealer {
    root: Arc<Root>,
    lane: Lane,
    limits: Limits,
    // Always there, until the sealer is dropped.
    state: Option<Box<Sending>>,
    /// `epoch` and `suite` stay, `counter` is the next packet's.
    header: Header,
    key: Option<Key>,
    packets: u64,
    bytes: u64,
    until: Option<Instant>,
    rekeys: u64,
}

impl Sealer {
    pub(super) fn new(
        root: Arc<Root>,
        lane: Lane,
        suite: Suite,
        limits: Limits,
        state: Box<Sending>,
    ) -> Self {
        let header = Header {
            suite,
            lane,
            epoch: root.sending_epoch(lane),
            tag: root.outbound_tag(),
            counter: state.counter,
        };
        Self {
            root,
            lane,
            limits: limits.bounded(lane),
            state: Some(state),
            header,
            key: None,
            packets: 0,
            bytes: 0,
            until: None,
            rekeys: 0,
        }
    }

    /// Seals a packet in place: [`HEADER`](super::HEADER) bytes of room, description and body,
    /// [`TAG`](super::TAG) bytes of room. All of it is then ready to be sent.
    ///
    /// # Errors
    ///
    /// If the packet has no possible size, or if the session is over: [`Unsealed::Expired`] and
    /// [`Unsealed::Exhausted`] stay so. The packet is then as it was.
    #[inline]
    pub fn seal(&mut self, now: Instant, packet: &mut [u8]) -> Result<(), Unsealed> {
        let len = packet.len();
        if !(OVERHEAD..=usize::from(u16::MAX)).contains(&len) {
            return Err(Unsealed::Size { len });
        }
        let spent = self.packets == 0
            || self.bytes < len as u64
            || self.until.is_none_or(|until| now >= until);
        if spent {
            self.renew(now, len as u64)?;
        }
        let Some(key) = &self.key else { return Err(Unsealed::Exhausted) };

        let room = packet.first_chunk_mut::<HEADER>().expect("the size was checked");
        self.header.encode(room);
        key.seal(self.header.counter, packet);
        self.header.counter += 1;
        self.packets -= 1;
        self.bytes = self.bytes.saturating_sub(len as u64);
        Ok(())
    }

    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    pub fn lane(&self) -> Lane {
        self.lane
    }

    pub fn suite(&self) -> Suite {
        self.header.suite
    }

    /// The epoch of the packet that was sealed last.
    pub fn epoch(&self) -> u16 {
        self.header.epoch
    }

    /// The counter of the next packet.
    pub fn counter(&self) -> u64 {
        self.header.counter
    }

    /// How often this sealer went to a next epoch.
    pub fn rekeys(&self) -> u64 {
        self.rekeys
    }

    /// Takes the next epoch's key into use.
    #[cold]
    fn renew(&mut self, now: Instant, len: u64) -> Result<(), Unsealed> {
        if now >= self.root.expires() {
            self.key = None;
            self.packets = 0;
            return Err(Unsealed::Expired);
        }
        let next = self.state.as_mut().and_then(|state| state.step(self.header.suite));
        let Some((epoch, key)) = next.filter(|_| self.header.counter < MAX_COUNTER) else {
            self.key = None;
            self.packets = 0;
            return Err(Unsealed::Exhausted);
        };

        self.rekeys += u64::from(self.key.is_some());
        self.key = Some(key);
        self.header.epoch = epoch;
        self.packets = self.limits.packets;
        self.bytes = self.limits.bytes.max(len);
        self.until = Some(match now.checked_add(self.limits.age) {
            Some(until) => until.min(self.root.expires()),
            None => self.root.expires(),
        });
        self.root.note_epoch(self.lane, epoch);
        Ok(())
    }
}

impl Drop for Sealer {
    fn drop(&mut self) {
        if let Some(mut state) = self.state.take() {
            state.counter = self.header.counter;
            self.root.return_sender(self.lane, state);
        }
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer")
            .field("root", &self.root.id())
            .field("next", &self.header)
            .finish_non_exhaustive()
    }
}

/// What a lane's sender must never forget while the root lives.
pub(super) struct Sending {
    /// Of `epoch`, which was not used yet; none once all epochs are.
    chain: Option<Chain>,
    epoch: u16,
    counter: u64,
}

impl Sending {
    pub(super) fn new(chain: Chain) -> Self {
        Self { chain: Some(chain), epoch: 0, counter: 0 }
    }

    /// An epoch that was never used, and its key.
    fn step(&mut self, suite: Suite) -> Option<(u16, Key)> {
        let chain = self.chain.take()?;
        let epoch = self.epoch;
        if let Some(next) = epoch.checked_add(1) {
            self.chain = Some(chain.next());
            self.epoch = next;
        }
        Some((epoch, chain.key(suite)))
    }
}

/// No lane comes near: 2^16 epochs of 2^28 packets are 2^44. A key that starts below it ends
/// below 2^64.
const MAX_COUNTER: u64 = 1 << 62;
