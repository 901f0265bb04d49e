//! The resolver of one host: names of the overlay networks in, answers out, all else upstream.
//!
//! [`Directory`] is what the agent knows; [`answer()`] decides, without IO, what a query gets from
//! it; [`Server`] serves the listeners of all networks; queries for other names go to the host's
//! resolvers as they came.

mod answer;
mod counters;
mod fallback;
mod gate;
mod key;
pub mod resolv_conf;
mod reverse;
mod server;
mod service;
mod tcp;
mod udp;
mod upstream;
mod zone;

pub use answer::{Asker, Forward, Outcome, Reply, Transport, UDP_PAYLOAD, answer};
pub use counters::{Counters, QueryCounts, Snapshot, UpstreamCounts};
pub use fallback::{Fallback, Open};
pub use server::{Config, ListenError, Server, TcpLimits};
pub use service::{Backend, BackendPort, Service};
pub use upstream::UpstreamLimits;
pub use zone::{Directory, Entry, NetworkNames};
