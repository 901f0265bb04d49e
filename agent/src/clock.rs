use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since the Unix epoch by this host's clock. Never part of a decision that two nodes must
/// make alike.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
