//! What the program plays on a lab.

pub(crate) mod converge;
pub(crate) mod demo;
pub(crate) mod docker;
pub(crate) mod ingress;
pub(crate) mod plain;
pub(crate) mod sealed;
