use std::{error::Error, fmt};

use weft_vxlan::{KernelError, NamespaceError};

use crate::netfilter::NetfilterError;

/// Why a network's services could not be read or changed in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum BalanceError {
    #[error("failed to load the tables of services")]
    Load(#[from] KernelError),
    #[error("failed to read or change the tables of services")]
    Netfilter(#[from] NetfilterError),
    #[error("failed to open the network's namespace")]
    Namespace(#[from] NamespaceError),
    #[error("services of network {network} are not served on this host")]
    NotServed { network: weft_model::NetworkId },
    #[error("the balancer has stopped")]
    Stopped,
}

/// An error with all its causes, in one line.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.0, f)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
