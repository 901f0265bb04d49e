//! Membership and the replicated tables.
//!
//! Agents exchange messages through a [`Carrier`].

mod carrier;

pub use carrier::{Carrier, MAX_MESSAGE_BYTES, Received};
