//! Tunnels on the real kernel: TAPs, sockets and threads, in namespaces of their own that nobody
//! else sees and that go with the test.

#![expect(
    clippy::unwrap_used,
    reason = "`allow-unwrap-in-tests` does not reach the helpers of an integration test"
)]

mod capture;
mod lab;
mod namespace;
mod stream;

mod carry;
mod closed;
mod hostile;
mod keys;
mod mtu;
mod paths;
