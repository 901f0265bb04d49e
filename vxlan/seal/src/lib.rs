//! The sealed data path: Ethernet frames of encrypted networks, from a TAP to the agents of other
//! hosts and back, each packet under an AEAD key of that pair of nodes.
//!
//! [`key`] decides what a packet looks like and which keys it has, [`frame`] what a frame means,
//! [`path`] where a peer is reached. None of them does IO. A [`Tunnel`] does: its workers move
//! frames between [`TapQueues`] and sockets, its control thread keeps paths and sessions alive.

mod control;
mod counters;
mod detour;
mod forwarding;
pub mod frame;
pub mod key;
mod members;
mod mmsg;
mod networks;
mod offload;
pub mod path;
mod routes;
mod shared;
mod socket;
mod status;
mod stop;
pub mod tap;
pub mod tunnel;
mod worker;

pub use counters::{Counters, DropReason, Traffic};
pub use detour::{Detour, DetourError, DetourSender};
pub use forwarding::{Forwarding, Station};
pub use members::{Members, Peer};
pub use offload::{Offload, OffloadState, OffloadStatus, OffloadSwitches};
pub use socket::SocketError;
pub use status::{CarriedStatus, PathStatus, PeerStatus, TunnelStatus};
pub use tap::{Tap, TapError, TapQueues};
pub use tunnel::{StartError, Tunnel, TunnelConfig};
