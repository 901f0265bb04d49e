//! Where a peer is reached: directly, at an observed address, or through another node.
