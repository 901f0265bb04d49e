//! `weft-testbed`: the demonstration, the benchmarks and the broom.
fn main() {}
