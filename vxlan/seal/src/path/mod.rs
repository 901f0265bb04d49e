//! Where a peer is reached: directly, at an observed address, or through another node.
//!
//! A [`Book`] holds what is known of every peer. It is told what happened (a record, an authentic
//! packet, a reply, an error of the socket, the time) and says what to do: which probes to send
//! and which [`Route`] frames take. It does no IO and reads no clock: after every call take
//! [`Book::actions`], and call [`Book::tick`] at [`Book::deadline`].
//!
//! [`Probe`], [`Reply`] and [`Relayed`] are what control packets carry.

mod book;
mod message;
mod mtu;
mod peer;
mod relay;
mod route;
#[cfg(test)]
mod tests;
mod track;

pub use book::{Action, Book, Config};
pub use message::{
    InvalidMessage, Payload, Probe, Relayed, Reply, SMALL, relay_overhead, unrelayable,
};
pub use peer::Candidate;
pub use relay::Unrelayed;
pub use route::{Kind, Route, Via, Way};
