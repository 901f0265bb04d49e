//! Services in the kernel of one host: which backend a connection to a service gets.
//!
//! State flows one way, as in weft-vxlan: the owner publishes a whole [`Desired`] state on a
//! `watch` channel, one task per network and one for the host bring the kernel's nftables to it,
//! and a [`Status`] says what is in force. All translation is the kernel's; what is in it stays
//! when the agent ends, and the next agent adopts it.

mod balancer;
mod board;
mod conntrack;
mod desired;
mod error;
mod events;
mod expression;
mod holdings;
mod host;
mod jhash;
mod kernel;
mod maglev;
mod messages;
mod netfilter;
mod network;
mod parts;
mod set;
mod shortcut;
mod skeleton;
mod slots;
mod status;
mod task;
mod wire;

pub use balancer::{Balancer, Config, StartError};
pub use desired::{Backend, Desired, Frontend, HostPort, HostPublish, NetworkBalance, Pool};
pub use error::BalanceError;
pub use host::{
    holder::{HostPorts, Taken},
    owner::Owner,
};
pub use maglev::maglev;
pub use netfilter::NetfilterError;
pub use status::{Counters, HostStatus, NetworkStatus, Status, Traffic};
