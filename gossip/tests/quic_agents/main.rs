//! Agents on loopback: real sockets, real certificates, ports chosen by the system.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod carrier;
mod cluster;
mod failure;
mod joining;
mod stranger;
mod strangers;
