use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::Suite;

use super::root::Root;
use super::schedule::{Chain, Key};
use super::window::Window;
use super::wire::{Header, Lane, Malformed, code};

/// Why a packet was refused. Everything but [`Auth`](Self::Auth) is found out without a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The tag or the lane is another one: the packet belongs to another opener.
    #[error("the packet is of another session or lane")]
    Foreign,
    #[error("the packet's cipher suite is not among those that this node offers")]
    Suite,
    #[error("a certificate of the session has expired: renew it")]
    Expired,
    #[error("the packet came before, or is too old to tell")]
    Replay,
    #[error("the packet's epoch is over, or too far ahead")]
    Epoch,
    /// Not sealed by the peer, or changed on the way. The packet is destroyed.
    #[error("the packet is not authentic")]
    Auth,
    #[error("the session has refused too many forged packets: it needs a new one")]
    Exhausted,
}

/// Opens the packets of one of the peer's lanes under one root. Lent by [`Root::opener`], owned by
/// one thread.
///
/// It follows the sender from epoch to epoch without a word between them: it takes an epoch up to
/// [`AHEAD`](Self::AHEAD) ahead, and a superseded one for [`OVERLAP`](Self::OVERLAP) more. An
/// authentic packet of a later epoch moves it on; a forged one moves nothing.
pub struct Opener {
    root: Arc<Root>,
    lane: Lane,
    suites: [bool; SUITES],
    // Always there, until the opener is dropped.
    state: Option<Box<Receiving>>,
    confirmed: bool,
}

impl Opener {
    /// How many epochs beyond the present one a packet may be of.
    pub const AHEAD: u16 = 16;

    /// How many superseded epochs are kept at most.
    pub const BEHIND: u16 = 16;

    /// How long a superseded epoch is kept at most.
    pub const OVERLAP: Duration = Duration::from_secs(30);

    /// RFC 9001 appendix B.1: ChaCha20-Poly1305 bears 2^36 forgeries under one key, AES-GCM more.
    /// Here they are counted over the whole life of the lane.
    pub const MAX_FORGERIES: u64 = 1 << 36;

    pub(super) fn new(
        root: Arc<Root>,
        lane: Lane,
        suites: &[Suite],
        state: Box<Receiving>,
    ) -> Self {
        let mut offered = [false; SUITES];
        for &suite in suites {
            offered[place(suite)] = true;
        }
        let confirmed = root.is_confirmed();
        Self { root, lane, suites: offered, state: Some(state), confirmed }
    }

    /// Opens a packet in place and returns description and body:
    /// [`Meta::decode`](super::Meta::decode) splits them.
    ///
    /// # Errors
    ///
    /// If the packet must be dropped; [`Refused::reason`] is what to count it under. After
    /// [`Refused::Auth`] the bytes are destroyed, after the others they are as they were.
    #[inline]
    pub fn open<'a>(
        &mut self,
        now: Instant,
        packet: &'a mut [u8],
    ) -> Result<&'a mut [u8], Refused> {
        let header = Header::decode(packet)?;
        self.admit(now, &header)?;
        let state = self.state.as_mut().expect("an opener has its state until it is dropped");
        state.drop_superseded(now);

        let key = state.key(header.epoch, header.suite).ok_or(Refused::Epoch)?;
        let Some(opened) = key.open(header.counter, packet) else {
            state.forgeries += 1;
            return Err(Refused::Auth);
        };
        state.window.commit(header.counter);
        if header.epoch > state.current {
            state.advance(now, header.epoch);
        }
        if !self.confirmed {
            self.confirmed = true;
            self.root.confirm();
        }
        Ok(opened)
    }

    /// Makes up for epochs that were lost whole: `epoch` is the one that the peer says, in an
    /// authentic probe, that this lane of it seals in at present.
    ///
    /// Does nothing unless `epoch` is further ahead than packets may be.
    pub fn catch_up(&mut self, epoch: u16) {
        if let Some(state) = &mut self.state
            && state.current.saturating_add(Self::AHEAD) < epoch
        {
            state.jump(epoch);
        }
    }

    /// Wipes superseded keys whose time is over. [`open`](Self::open) does so too: this is for
    /// lanes that nothing comes on.
    pub fn prune(&mut self, now: Instant) {
        if let Some(state) = &mut self.state {
            state.drop_superseded(now);
        }
    }

    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// The latest epoch that an authentic packet was of.
    pub fn epoch(&self) -> u16 {
        self.state.as_ref().map_or(0, |state| state.current)
    }

    /// Refuses what no key needs to be asked for.
    #[inline]
    fn admit(&self, now: Instant, header: &Header) -> Result<(), Refused> {
        let state = self.state.as_ref().expect("an opener has its state until it is dropped");
        if header.tag != self.root.inbound_tag() || header.lane != self.lane {
            return Err(Refused::Foreign);
        }
        if !self.suites[place(header.suite)] {
            return Err(Refused::Suite);
        }
        if now >= self.root.expires() {
            return Err(Refused::Expired);
        }
        if header.counter == u64::MAX {
            return Err(Refused::Malformed(Malformed::Counter));
        }
        if !state.window.is_fresh(header.counter) {
            return Err(Refused::Replay);
        }
        if state.forgeries >= Self::MAX_FORGERIES {
            return Err(Refused::Exhausted);
        }
        Ok(())
    }
}

impl Refused {
    /// What a dropped packet is counted under.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::Foreign => "unknown-peer",
            Self::Suite | Self::Exhausted => "no-key",
            Self::Expired => "expired",
            Self::Replay => "replay",
            Self::Epoch => "epoch",
            Self::Auth => "auth",
        }
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            self.root.return_receiver(self.lane, state);
        }
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener")
            .field("root", &self.root.id())
            .field("lane", &self.lane)
            .field("epoch", &self.epoch())
            .finish_non_exhaustive()
    }
}

/// What a lane's receiver must never forget while the root lives.
pub(super) struct Receiving {
    window: Window,
    /// The latest epoch that an authentic packet was of; always among the generations.
    current: u16,
    /// The epoch of the first generation.
    first: u16,
    /// Consecutive; superseded ones, the current one, and those ahead that were asked for.
    generations: VecDeque<Generation>,
    forgeries: u64,
}

impl Receiving {
    pub(super) fn new(chain: Chain) -> Self {
        Self {
            window: Window::new(),
            current: 0,
            first: 0,
            generations: VecDeque::from([Generation::new(chain)]),
            forgeries: 0,
        }
    }

    /// The key of an epoch that packets may be of at present.
    ///
    /// What is derived is kept, so that forged headers make each key be derived once only.
    #[inline]
    fn key(&mut self, epoch: u16, suite: Suite) -> Option<&Key> {
        let index = usize::from(epoch.checked_sub(self.first)?);
        if index >= self.generations.len() {
            self.derive_to(epoch)?;
        }
        let generation = self.generations.get_mut(index)?;
        Some(generation.keys[place(suite)].get_or_insert_with(|| generation.chain.key(suite)))
    }

    #[cold]
    fn derive_to(&mut self, epoch: u16) -> Option<()> {
        if epoch > self.current.saturating_add(Opener::AHEAD) {
            return None;
        }
        while usize::from(epoch - self.first) >= self.generations.len() {
            let next = self.generations.back()?.chain.next();
            self.generations.push_back(Generation::new(next));
        }
        Some(())
    }

    /// Makes `epoch`, of which there is a generation, the current one.
    #[cold]
    fn advance(&mut self, now: Instant, epoch: u16) {
        let superseded = usize::from(epoch - self.first);
        for generation in self.generations.iter_mut().take(superseded) {
            generation.until.get_or_insert(now + Opener::OVERLAP);
        }
        self.current = epoch;
        while self.current - self.first > Opener::BEHIND {
            self.drop_first();
        }
    }

    /// Wipes the superseded generations whose time is over: the eldest ones end first.
    #[inline]
    fn drop_superseded(&mut self, now: Instant) {
        while let Some(until) = self.generations.front().and_then(|eldest| eldest.until)
            && now >= until
        {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        self.generations.pop_front();
        self.first += 1;
    }

    /// Makes `epoch`, which is far ahead, the current one and forgets all others.
    fn jump(&mut self, epoch: u16) {
        let last = self.first + (self.generations.len() - 1) as u16;
        if let Some(Generation { chain, .. }) = self.generations.pop_back() {
            let chain = (last..epoch).fold(chain, |chain, _| chain.next());
            self.generations = VecDeque::from([Generation::new(chain)]);
            (self.first, self.current) = (epoch, epoch);
        }
    }
}

/// One epoch: its keys are derived when a packet asks for them.
struct Generation {
    chain: Chain,
    keys: [Option<Key>; SUITES],
    /// When it ends; not known before a later epoch has begun.
    until: Option<Instant>,
}

impl Generation {
    fn new(chain: Chain) -> Self {
        Self { chain, keys: [const { None }; SUITES], until: None }
    }
}

const SUITES: usize = Suite::ALL.len();

/// A suite's place in tables of all suites.
#[inline]
fn place(suite: Suite) -> usize {
    usize::from(code(suite) - 1)
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, OVERHEAD, Role};
    use super::*;

    #[test]
    fn a_lane_that_refused_too_many_forgeries_takes_nothing_more() {
        let now = Instant::now();
        let expires = now + Duration::from_secs(60);
        let root = |role| Arc::new(Root::new(&[7; 32], role, expires));
        let suite = Suite::Chacha20Poly1305;
        let mut sealer =
            root(Role::Dialler).sealer(Lane::CONTROL, suite, Limits::default()).unwrap();
        let mut opener = root(Role::Acceptor).opener(Lane::CONTROL, &[suite]).unwrap();
        let mut packet = [0; OVERHEAD];
        sealer.seal(now, &mut packet).unwrap();
        opener.state.as_mut().unwrap().forgeries = Opener::MAX_FORGERIES - 1;

        let mut forged = packet;
        forged[OVERHEAD - 1] ^= 1;
        assert_eq!(opener.open(now, &mut forged).unwrap_err(), Refused::Auth);
        assert_eq!(opener.open(now, &mut packet).unwrap_err(), Refused::Exhausted);
    }

    #[test]
    fn superseded_keys_are_let_go_of_in_time_also_without_a_packet() {
        let now = Instant::now();
        let expires = now + Duration::from_secs(3600);
        let root = |role| Arc::new(Root::new(&[7; 32], role, expires));
        let limits = Limits { packets: 1, ..Limits::default() };
        let lane = Lane::try_from(0).unwrap();
        let mut sealer = root(Role::Dialler).sealer(lane, Suite::Aes128Gcm, limits).unwrap();
        let mut opener = root(Role::Acceptor).opener(lane, &Suite::ALL).unwrap();
        for _ in 0..40 {
            let mut packet = [0; OVERHEAD];
            sealer.seal(now, &mut packet).unwrap();
            opener.open(now, &mut packet).unwrap();
        }
        let generations = |opener: &Opener| opener.state.as_ref().unwrap().generations.len();
        assert_eq!(generations(&opener), 1 + usize::from(Opener::BEHIND));
        opener.prune(now + Opener::OVERLAP);
        assert_eq!(generations(&opener), 1);
        assert_eq!(opener.epoch(), 39);
    }
}
