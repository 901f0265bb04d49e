//! Membership and the replicated tables.
//!
//! Every node writes records under typed [`Key`]s of its own; [`Gossip`] brings them to all other
//! nodes and shows everybody's in one immutable [`ClusterView`]. Two paths carry a change: an eager
//! push straight to the members, and chitchat's anti-entropy, which catches what the push missed.
//! Both run over a [`Carrier`]: QUIC between hosts, [`memory`] in tests.

mod carrier;
mod command;
mod counters;
mod detector;
mod farewell;
mod frame;
mod gossip;
mod guard;
pub mod identity;
mod membership;
pub mod memory;
mod message;
mod outbox;
mod own;
mod push;
pub mod quic;
mod replica;
mod replicator;
mod table;
mod timers;
mod view;
mod wire;

pub use carrier::{Carrier, MAX_MESSAGE_BYTES, Received};
pub use counters::{Counters, Flow};
pub use gossip::{ForgetError, Gossip, GossipConfig, PublishError, Refused, Stopped, Timing};
pub use table::{Bucket, EncodeError, Key, MAX_RECORD_BYTES, MAX_VALUE_BYTES, Record, UnknownKey};
pub use view::{ClusterView, Liveness, Member};
