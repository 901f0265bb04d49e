//! Container engines: what they ask for in their own words, turned into requests to the ledger.

pub(crate) mod attachment;
pub mod cni;
pub mod docker;
mod input;
mod interior;
mod mapping;
mod naming;
pub mod podman;
mod wanted;

use std::{ffi::OsStr, path::Path};

/// What the one binary is, by the name that it is called by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// The agent and the command line.
    Weft,
    /// `weft-cni`, a CNI plugin.
    Cni,
    /// `weft-netavark`, or whatever stands in a directory `netavark`: podman calls its network
    /// drivers by the names of the files in there.
    Netavark,
}

impl Role {
    /// Reads a program's own name, with whatever path before it.
    pub fn of(program: Option<&OsStr>) -> Self {
        let path = program.map(Path::new);
        let name = path.and_then(Path::file_name);
        let directory = path.and_then(Path::parent).and_then(Path::file_name);
        match () {
            () if name.is_some_and(|name| name == "weft-cni") => Self::Cni,
            () if name.is_some_and(|name| name == "weft-netavark") => Self::Netavark,
            () if directory.is_some_and(|name| name == "netavark") => Self::Netavark,
            () => Self::Weft,
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
        assert_eq!(role("/usr/local/lib/netavark/weft"), Role::Netavark);
        assert_eq!(role("weft-netavark"), Role::Netavark);
        assert_eq!(role("/usr/lib/weft-cni/weft"), Role::Weft);
        assert_eq!(Role::of(None), Role::Weft);
    }
}
