use std::{fmt::Display, io};

use weft_seal::TapError;

use crate::{Missing, NamespaceError, NetlinkError, Table};

/// A kernel table of one namespace, as its reconciler needs it.
///
/// Synchronous: the kernel answers within the system call, and a whole pass runs on a blocking
/// thread. The fakes of the property tests implement it too.
pub(crate) trait KernelTable {
    const TABLE: Table;
    type State;
    /// Prints as the command an operator would type.
    type Op: Display;

    fn read(&mut self) -> Result<Self::State, KernelError>;

    /// Carries out `ops` in order, one result each. An operation succeeds if it had already been
    /// applied; one that fails does not stop the rest.
    fn apply(&mut self, ops: &[Self::Op]) -> Vec<Result<(), KernelError>>;
}

/// What one pass over a table did.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    pub(crate) applied: u64,
    pub(crate) errors: Vec<TableError>,
}

impl Pass {
    /// Adds what a further pass over the same table did.
    pub(crate) fn join(&mut self, other: Self) {
        self.applied += other.applied;
        self.errors.extend(other.errors);
    }
}

/// Reads `table`, lets `plan` say what differs, and applies it. A failed operation does not stop
/// the rest: the next pass starts from what the kernel then holds.
pub(crate) fn reconcile<T: KernelTable>(
    table: &mut T,
    plan: impl FnOnce(&T::State) -> Vec<T::Op>,
) -> Pass {
    let actual = match table.read() {
        Ok(actual) => actual,
        Err(source) => {
            let error = TableError::Read { table: T::TABLE.as_str(), source };
            return Pass { applied: 0, errors: vec![error] };
        }
    };
    let ops = plan(&actual);
    let mut pass = Pass::default();
    for (op, result) in ops.iter().zip(table.apply(&ops)) {
        match result {
            Ok(()) => {
                tracing::debug!(table = T::TABLE.as_str(), %op, "applied");
                pass.applied += 1;
            }
            Err(source) => {
                let table = T::TABLE.as_str();
                pass.errors.push(TableError::Apply { table, op: op.to_string(), source });
            }
        }
    }
    pass
}

/// A pass that could not do all it had to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    #[error("failed to read the table {table}")]
    Read { table: &'static str, source: KernelError },
    #[error("failed to apply `{op}` to the table {table}")]
    Apply { table: &'static str, op: String, source: KernelError },
}

/// Why the kernel could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("failed to access the kernel setting {path}")]
    Sysctl { path: String, source: io::Error },
    #[error("failed to run nft: install nftables (package `nftables`)")]
    NftMissing { source: io::Error },
    #[error("neither a process nor a mount on this host leads into the sandbox: attach it again")]
    HiddenSandbox,
    #[error("encrypted networks cannot leave this host: {0}")]
    NoTunnel(Missing),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("nft refused the rules: {message}")]
    NftRefused { message: String },
}

/// An error and what caused it, on one line.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn std::error::Error);

impl Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
