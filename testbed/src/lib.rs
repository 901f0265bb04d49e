//! Several hosts on one machine: real kernel, real agents, nothing mocked.
//!
//! ```text
//!   lab directory /tmp/weft-lab-PID-N             (logs, state of each host, captures)
//!
//!   underlay namespace
//!   ┌──────────────────────────────────────────────────────────────────────┐
//!   │        br0 10.99.0.1/24, or fd99::1:0/64 when the underlay is IPv6   │
//!   │        p1                     p2                     p3              │ nft drops, losses,
//!   └────────┼──────────────────────┼──────────────────────┼───────────────┘ links up and down
//!    ┌───────┼────────┐    ┌────────┼───────┐    ┌─────────┼──────┐
//!    │ eth0 10.99.0.11│    │ eth0 10.99.0.12│    │ eth0 10.99.0.13│  host = network, mount, uts
//!    │ weft agent     │    │ weft agent     │    │ weft agent     │  and pid namespaces, kept by
//!    │ /run /var/lib  │    │ /run /var/lib  │    │ /run /var/lib  │  a holder: pid 1 of the host
//!    │ ┌────┐  ┌────┐ │    │ ┌────┐         │    │ ┌────┐         │
//!    │ │ c1 │  │ c2 │ │    │ │ c3 │         │    │ │ c4 │         │  container = namespaces and a
//!    │ └────┘  └────┘ │    │ └────┘         │    │ └────┘         │  process inside its host
//!    └────────────────┘    └────────────────┘    └────────────────┘
//! ```
//!
//! Everything hangs from pipes that the lab's process holds: when it ends, in whatever way, the
//! holders read the end of file, and the kernel takes down what they held. No namespace has a
//! name outside the lab, so nothing can be left behind, and two labs cannot collide.
//!
//! Everything here needs root and says so when it is missing.

mod agent;
mod api;
pub mod baseline;
mod bulk;
mod capture;
mod command;
mod container;
mod cpu;
mod daemon;
mod dns;
mod echo;
mod engine;
mod flow;
mod forger;
mod holder;
mod host;
mod lab;
mod lan;
mod load;
mod markers;
mod metrics;
mod nat;
mod network;
mod pair;
mod ping;
mod place;
mod recording;
pub mod report;
mod sealing;
mod sequence;
mod underlay;
mod wait;
mod web;

pub use agent::Stop;
pub use api::{ApiAnswer, api_call, plugin_call};
pub use bulk::{Bulk, bulk};
pub use capture::Capture;
pub use command::Ran;
pub use container::{Attachment, Container};
pub use cpu::{CpuSpent, CpuTime};
pub use daemon::Daemon;
pub use dns::{DnsReply, Question, query};
pub use echo::{Answer, By, Echo};
pub use engine::{Containerd, Docker, Engine, IMAGE, Podman};
pub use flow::{Flow, FlowSummary, Throughput, throughput, transfer};
pub use forger::Forger;
pub use holder::in_network_namespace;
pub use host::Host;
pub use lab::{Builder, Lab, sweep};
pub use lan::Lan;
pub use load::{Carried, Load};
pub use markers::Marker;
pub use metrics::Metrics;
pub use network::NetworkView;
pub use pair::Pair;
pub use ping::{PingStream, PingSummary, Pinger};
pub use place::Place;
pub use recording::{Datagram, Recording};
pub use sealing::{PeerView, SealingView};
pub use sequence::{Arrived, Sequence, SequenceSummary};
pub use underlay::{Family, Wire};
pub use wait::{eventually, holds_for, pace};
pub use web::{Pressure, Requests, Served, WebServer};
