//! How much a user may say about one object. It travels in records of bounded length, and a record
//! that is too long would keep a node from telling anything.

use weft_model::Labels;

use crate::refusal::{Refusal, refuse};

/// The most that one field of a request may bring, in bytes: a record takes 60 KiB packed
/// (`weft_gossip::MAX_VALUE_BYTES`) and may have to hold several endpoints.
pub(crate) const MOST: usize = 4096;

/// Refuses `field` if it brings more than a record can carry.
pub(crate) fn refuse_bulk(field: &'static str, bytes: usize) -> Result<(), Refusal> {
    match bytes <= MOST {
        true => Ok(()),
        false => refuse(field, format!("{bytes} bytes of {field}: give at most {MOST} in all")),
    }
}

/// The length of all keys and values.
pub(crate) fn label_bytes(labels: &Labels) -> usize {
    labels.iter().map(|(key, value)| key.len() + value.len()).sum()
}
/// How many ports of the host may lead to one endpoint: the agent holds each by a socket a family.
pub(crate) const MOST_PORTS: usize = 1024;

/// Says that there are more.
pub(crate) fn too_many_ports(count: usize) -> String {
    format!(
        "{count} ports of the host for one container, each of which takes the agent a descriptor: give at most {MOST_PORTS}"
    )
}
