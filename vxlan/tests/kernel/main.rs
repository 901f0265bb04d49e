//! The data plane on the real kernel. Each test has namespaces of its own and leaves nothing
//! behind, even if it fails; all of them can run at once.

#![expect(
    clippy::unwrap_used,
    reason = "`allow-unwrap-in-tests` does not reach the helpers of an integration test"
)]

mod capture;
mod lab;
mod room;
mod stream;
mod tunnels;

mod exposed;
mod hygiene;
mod lifecycle;
mod local;
mod macvlan;
mod mtu;
mod overlay;
mod ports;
mod repair;
mod scale;
mod sealed;
mod sealed_hygiene;
mod sealed_traffic;
mod system;
mod transit;
