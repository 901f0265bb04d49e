//! The resolver from outside: its answers as a client reads them, and its sockets on loopback.
#![expect(clippy::unwrap_used, reason = "a test's helper fails as the test itself does")]

mod answers;
mod forwarding;
mod lab;
mod listeners;
mod properties;
mod service;
mod services;
