use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use aws_lc_rs::hkdf;
use weft_model::Suite;

use super::opener::{Opener, Receiving};
use super::schedule::{self, Chain, Direction};
use super::sealer::{Limits, Sealer, Sending};
use super::wire::{LANES, Lane};

/// The keys of one TLS session between two nodes: what both of them can seal and open with.
///
/// A root keeps no master secret: it derives the first chain of each lane when it is made. Each
/// lane's sending and receiving state exists once. [`sealer`](Self::sealer) and
/// [`opener`](Self::opener) lend it out, and dropping what they gave returns it, with its counter
/// or its replay window: no nonce is used twice and no packet is taken twice, whoever asks how
/// often. That holds for one `Root` per secret: never make two roots from one secret at one node.
pub struct Root {
    id: RootId,
    role: Role,
    expires: Instant,
    outbound: u32,
    inbound: u32,
    confirmed: AtomicBool,
    sending: [AtomicU16; SLOTS],
    lanes: Mutex<Lanes>,
}

/// Tells roots apart in logs and maps: derived from the secret, tells nothing of it, and is the
/// same at both nodes.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RootId(u64);

/// Which end of the TLS session this node is: each direction has keys of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    Dialler,
    Acceptor,
}

/// Somebody else has this lane of this root: ask again once they dropped it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("lane {lane} of session {root} is in use: drop its user first")]
pub struct Lent {
    pub root: RootId,
    pub lane: Lane,
}

impl Root {
    /// Derives everything from `secret`: 32 bytes that TLS exported for the session (RFC 8446
    /// section 7.5) and that nobody but its two ends knows.
    ///
    /// Wipe `secret` afterwards: the root does not need it. Nothing is sealed or opened from
    /// `expires` on.
    pub fn new(secret: &[u8; 32], role: Role, expires: Instant) -> Self {
        let prk = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, secret);
        let (from_here, from_there) = match role {
            Role::Dialler => (Direction::FromDialler, Direction::FromAcceptor),
            Role::Acceptor => (Direction::FromAcceptor, Direction::FromDialler),
        };
        let lanes = Lanes {
            senders: slots(|lane| Sending::new(Chain::first(&prk, from_here, lane))),
            receivers: slots(|lane| Receiving::new(Chain::first(&prk, from_there, lane))),
        };

        Self {
            id: RootId(schedule::identity(&prk)),
            role,
            expires,
            outbound: schedule::tag(&prk, from_here),
            inbound: schedule::tag(&prk, from_there),
            confirmed: AtomicBool::new(false),
            sending: std::array::from_fn(|_| AtomicU16::new(0)),
            lanes: Mutex::new(lanes),
        }
    }

    pub fn id(&self) -> RootId {
        self.id
    }

    pub fn role(&self) -> Role {
        self.role
    }

    /// From when on nothing is sealed or opened any more.
    pub fn expires(&self) -> Instant {
        self.expires
    }

    /// The tag in packets that the peer sealed under this root. Two roots of one node may have the
    /// same one: then try each, on a copy, because a wrong key destroys the packet.
    pub fn inbound_tag(&self) -> u32 {
        self.inbound
    }

    /// The tag in packets that this node seals under this root.
    pub fn outbound_tag(&self) -> u32 {
        self.outbound
    }

    /// Whether an authentic packet has come under this root: then the peer has it as well, and
    /// will open what is sealed under it.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// The epoch that a lane of this node seals in at present. Tell it to the peer in probes: see
    /// [`Opener::catch_up`].
    pub fn sending_epoch(&self, lane: Lane) -> u16 {
        self.sending[slot(lane)].load(Ordering::Relaxed)
    }

    /// Lends the sending side of `lane`. A lane that was lent before goes on counting where it
    /// stopped, in the next epoch.
    ///
    /// # Errors
    ///
    /// If the lane is lent already.
    pub fn sealer(
        self: &Arc<Self>,
        lane: Lane,
        suite: Suite,
        limits: Limits,
    ) -> Result<Sealer, Lent> {
        let state = self.lanes().senders[slot(lane)].take();
        let state = state.ok_or(Lent { root: self.id, lane })?;
        Ok(Sealer::new(Arc::clone(self), lane, suite, limits, state))
    }

    /// Lends the receiving side of the peer's `lane`, which opens packets of the given suites
    /// only. Its replay window and epochs go on from where they were.
    ///
    /// # Errors
    ///
    /// If the lane is lent already.
    pub fn opener(self: &Arc<Self>, lane: Lane, suites: &[Suite]) -> Result<Opener, Lent> {
        let state = self.lanes().receivers[slot(lane)].take();
        let state = state.ok_or(Lent { root: self.id, lane })?;
        Ok(Opener::new(Arc::clone(self), lane, suites, state))
    }

    pub(super) fn return_sender(&self, lane: Lane, state: Box<Sending>) {
        self.lanes().senders[slot(lane)] = Some(state);
    }

    pub(super) fn return_receiver(&self, lane: Lane, state: Box<Receiving>) {
        self.lanes().receivers[slot(lane)] = Some(state);
    }

    pub(super) fn confirm(&self) {
        self.confirmed.store(true, Ordering::Relaxed);
    }

    pub(super) fn note_epoch(&self, lane: Lane, epoch: u16) {
        self.sending[slot(lane)].store(epoch, Ordering::Relaxed);
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        // A slot is taken and filled in one step: a panic elsewhere leaves it whole.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Root")
            .field("id", &self.id)
            .field("role", &self.role)
            .field("confirmed", &self.is_confirmed())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootId({self})")
    }
}

/// The data lanes and the control lane.
const SLOTS: usize = LANES as usize + 1;

/// What is not lent at present.
struct Lanes {
    senders: [Option<Box<Sending>>; SLOTS],
    receivers: [Option<Box<Receiving>>; SLOTS],
}

fn slots<T>(make: impl Fn(Lane) -> T) -> [Option<Box<T>>; SLOTS] {
    let mut slots = [const { None }; SLOTS];
    for lane in Lane::all() {
        slots[slot(lane)] = Some(Box::new(make(lane)));
    }
    slots
}

fn slot(lane: Lane) -> usize {
    usize::from(lane.number().min(LANES))
}
