//! `weft-cni` called as a container runtime calls it, with a real agent behind it.

mod attach;
mod call;
mod chain;
mod leftovers;
mod networks;
mod ports;

use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);
