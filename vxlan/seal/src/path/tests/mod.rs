//! Books of several nodes on a network in virtual time.

mod behaviour;
mod mtu;
mod nat;
mod relay;
mod world;
