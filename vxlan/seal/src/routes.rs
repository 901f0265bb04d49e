use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use socket2::SockAddr;
use weft_model::{NodeId, Suite};

use crate::{
    DropReason,
    key::{LANES, Lane, OVERHEAD, Root},
};

/// How every peer is reached at one moment: what the control thread tells those that seal.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    pub(crate) peers: BTreeMap<NodeId, Result<Route, DropReason>>,
}

/// How one peer is reached.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) root: Arc<Root>,
    pub(crate) suite: Suite,
    pub(crate) way: Way,
    /// Bytes of the longest inner IP packet that crosses whole.
    pub(crate) inner_mtu: usize,
}

/// Where sealed packets go next.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// To the peer itself; lane L uses hop L modulo their number. Never empty.
    Straight(Arc<[Hop]>),
    /// To the control thread, which has a relay pass them on.
    Relay,
}

/// A socket of ours and where it sends to.
#[derive(Clone, Debug)]
pub(crate) struct Hop {
    pub(crate) socket: usize,
    pub(crate) to: SockAddr,
}

/// Bytes that an inner IP packet grows by until it is a sealed packet: Ethernet and what sealing
/// adds.
pub(crate) const GROWTH: usize = 14 + OVERHEAD;

impl Routes {
    /// The route to `node`, or why there is none.
    pub(crate) fn to(&self, node: NodeId) -> Result<&Route, DropReason> {
        match self.peers.get(&node) {
            Some(Ok(route)) => Ok(route),
            Some(Err(reason)) => Err(*reason),
            None => Err(DropReason::NoKey),
        }
    }
}

/// What those that open need to know: who may have sealed a packet with which tag.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    /// Two roots may have the same tag: the right one is found by trying.
    pub(crate) by_tag: BTreeMap<u32, Vec<Arc<Session>>>,
}

/// One root that a peer may seal with.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) peer: NodeId,
    pub(crate) root: Arc<Root>,
    epochs: [AtomicU16; LANES as usize],
}

impl Session {
    pub(crate) fn new(peer: NodeId, root: Arc<Root>) -> Self {
        Self { peer, root, epochs: Default::default() }
    }

    /// The epoch that the peer's `lane` seals in, as its latest probe said.
    pub(crate) fn epoch(&self, lane: Lane) -> u16 {
        let epoch = self.epochs.get(usize::from(lane.number()));
        epoch.map_or(0, |epoch| epoch.load(Ordering::Relaxed))
    }

    /// Notes what a probe of the peer says of its data lanes, lane 0 first.
    pub(crate) fn note_epochs(&self, epochs: &[u16]) {
        for (known, said) in self.epochs.iter().zip(epochs) {
            known.store(*said, Ordering::Relaxed);
        }
    }
}
