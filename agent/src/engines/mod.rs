//! Container engines: what they ask for in their own words, turned into requests to the ledger.

mod attachment;
pub mod cni;
pub mod docker;
mod input;
mod interior;
mod naming;
mod wanted;

use std::{ffi::OsStr, path::Path};

/// What the one binary is, by the name that it is called by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// The agent and the command line.
    Weft,
    /// `weft-cni`, a CNI plugin.
    Cni,
}

impl Role {
    /// Reads a program's own name, with whatever path before it.
    pub fn of(program: Option<&OsStr>) -> Self {
        let name = program.and_then(|program| Path::new(program).file_name()?.to_str());
        match name {
            Some("weft-cni") => Self::Cni,
            _ => Self::Weft,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_the_binary_is_what_it_is_called() {
        let role = |program: &str| Role::of(Some(OsStr::new(program)));
        assert_eq!(role("/opt/cni/bin/weft-cni"), Role::Cni);
        assert_eq!(role("weft"), Role::Weft);
        assert_eq!(role("/usr/lib/weft-cni/weft"), Role::Weft);
        assert_eq!(Role::of(None), Role::Weft);
    }
}
