//! Whole clusters in one process: the real code over a network in memory, in virtual time.

mod cluster;
mod convergence;
mod life;
mod timing;
mod traps;
