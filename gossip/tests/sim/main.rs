//! Whole clusters in one process: the real code over a network in memory, in virtual time.

#![expect(clippy::print_stdout, reason = "seeds and measured figures, shown when asked for")]
#![expect(clippy::unwrap_used, reason = "all of it is test code")]

mod cluster;
mod convergence;
mod life;
mod pairs;
mod timing;
mod traps;
