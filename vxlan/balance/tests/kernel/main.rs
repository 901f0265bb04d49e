//! Services on the real kernel, with traffic. Each test has namespaces of its own and leaves nothing
//! behind, even if it fails; all of them can run at once.

#![expect(
    clippy::unwrap_used,
    reason = "`allow-unwrap-in-tests` does not reach the helpers of an integration test"
)]

mod lab;
mod site;
mod talk;

mod changes;
mod direct;
mod east_west;
mod ingress;
mod ports;
mod repair;
mod shortcut;
