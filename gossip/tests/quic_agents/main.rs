//! Agents on loopback: real sockets, real certificates, ports chosen by the system.

#![expect(clippy::print_stdout, reason = "measured figures, shown when asked for")]
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod carrier;
mod cluster;
mod detour;
mod failure;
mod gateway;
mod joining;
mod member;
mod nat;
mod restart;
mod sessions;
mod stranger;
mod strangers;
