//! Packets and their keys: the wire format, derivation, sealing and opening, replay.
//!
//! Two nodes that share a TLS session hold the same [`Root`]. Each of a root's lanes has one
//! [`Sealer`] at the node that sends on it and one [`Opener`] at the node that receives; the root
//! lends each of them once, so that no two threads can ever count the same nonces.
//!
//! A sender writes a [`Meta`] and a body behind [`HEADER`] bytes of room, leaves [`TAG`] bytes of
//! room at the end and calls [`Sealer::seal`]. A receiver reads [`Header::decode`], finds the root
//! whose [`Root::inbound_tag`] it names, and calls [`Opener::open`] of that root and lane.
//!
//! Nothing here reads a clock: callers pass `now`, taken once per batch.

mod opener;
mod root;
mod schedule;
mod sealer;
mod suite;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;
mod window;
mod wire;

pub use opener::{Opener, Refused};
pub use root::{Lent, Role, Root, RootId};
pub use sealer::{Limits, Sealer, Unsealed};
pub use suite::{choose, offer};
pub use window::{WINDOW, Window};
pub use wire::{
    Content, Flags, HEADER, Header, InvalidLane, LANES, Lane, META, Malformed, Meta, OVERHEAD, TAG,
    VERSION,
};
