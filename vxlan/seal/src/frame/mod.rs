//! What a frame means: headers, super-frames and their segments, answers that need no peer.
//!
//! All of it is pure: no IO, no clock, no allocation per packet, and no input makes it panic.
//!
//! From the TAP to a peer: [`VnetHeader::parse`] and [`Headers::parse`], then [`answer`], then the
//! peer is looked up by [`Headers::destination`], then [`Splitter::new`] gives the segments, each
//! with the [`Part`] that its meta data has to carry. If [`Splitter::packet_len`] is more than the
//! peer's path takes, [`too_big`] says what to do.
//!
//! From a peer to the TAP: [`Headers::parse`], [`check_source`], [`Coalescer::push`]; at the end of
//! the batch [`Coalescer::flush`].

mod answer;
mod checksum;
mod coalesce;
mod fragment;
mod headers;
mod slot;
mod source;
mod split;
mod too_big;
mod vnet;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod kernel;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod wire;

pub use answer::{ANSWER_ROOM, Answer, answer};
pub use coalesce::{Accepts, Arrival, Coalescer};
pub use fragment::Fragments;
pub use headers::{Fragment, Headers, Ip, L4, Malformed, Network, Tcp, Transport, station};
pub use slot::{Built, MAX_PIECES};
pub use source::{Spoofed, Stations, check_source};
pub use split::{Part, Splitter};
pub use too_big::{Excess, Gateway, REPORT_ROOM, Remedy, TokenBucket, too_big};
pub use vnet::{Checksum, Gso, GsoKind, InvalidVnet, VNET_LEN, VnetHeader};
