//! The address machine as its caller sees it: alone, among others, and under a model checker.

#[cfg(test)]
mod allocation;
#[cfg(test)]
mod cluster;
#[cfg(test)]
mod model;
#[cfg(test)]
mod simulation;
