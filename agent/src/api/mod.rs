//! The agent's API: JSON over HTTP on a unix socket.

pub(crate) mod client;
pub(crate) mod extract;
mod server;
mod socket;
pub mod types;

pub use server::{Api, router};
pub use socket::{SocketError, bind};
