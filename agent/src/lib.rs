//! The agent `weft`: the composition root of the overlay network, and its command line.
//!
//! State flows one way: requests and news of other nodes go to the [`ledger`], which keeps this
//! node's records; [`cluster`] understands everybody's; [`projection`] derives what the kernel and
//! the names shall be; the data plane and the DNS server make it so; [`status`] tells.

pub mod advertise;
pub mod api;
mod bulk;
pub mod chain;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod daemon;
mod declaration;
pub mod definition;
pub mod encryption;
pub mod engines;
#[cfg(test)]
pub(crate) mod fixture;
pub mod health;
pub mod joining;
pub mod ledger;
pub mod listeners;
pub mod metrics;
pub mod projection;
pub mod refusal;
pub mod remembered;
pub mod renewal;
pub mod roster;
pub mod sandbox;
pub mod scrape;
pub mod state_dir;
pub mod status;
pub mod tokens;
pub mod underlay;
