//! Agents on loopback: real sockets, real certificates, ports chosen by the system.

mod carrier;
mod cluster;
mod failure;
mod joining;
mod stranger;
mod strangers;
