//! The sealed data path: Ethernet frames of encrypted networks, from a TAP to the agents of other
//! hosts and back, each packet under an AEAD key of that pair of nodes.
//!
//! [`key`] decides what a packet looks like and which keys it has, [`frame`] what a frame means,
//! [`path`] where a peer is reached. None of them does IO.

mod forwarding;
pub mod frame;
pub mod key;
mod offload;
pub mod path;

pub use forwarding::{Forwarding, Station, short_id};
pub use offload::{Offload, OffloadState, OffloadStatus, OffloadSwitches};
