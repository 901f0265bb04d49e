use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

/// Keeps other agents off a state directory for as long as it lives, also after a crash of theirs.
#[derive(Debug)]
pub struct StateLock {
    _held: Flock<File>,
}

impl StateLock {
    /// Takes the directory.
    ///
    /// # Errors
    ///
    /// Another agent has it, or the lock's file cannot be made.
    pub fn take(state_dir: &Path) -> Result<Self, StateLockError> {
        let path = state_dir.join("lock");
        let unusable = |source| StateLockError::Unusable { path: path.clone(), source };
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(unusable)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Self { _held: held }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                Err(StateLockError::InUse { state_dir: state_dir.into() })
            }
            Err((_, errno)) => Err(unusable(errno.into())),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StateLockError {
    #[error(
        "another agent works with {}: stop it, or name another directory with --state-dir",
        state_dir.display()
    )]
    InUse { state_dir: PathBuf },
    #[error("cannot lock {}", path.display())]
    Unusable { path: PathBuf, source: io::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_has_one_agent_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateLock::take(dir.path()).unwrap();
        let second = StateLock::take(dir.path());
        assert!(matches!(second, Err(StateLockError::InUse { .. })), "{second:?}");
        drop(first);
        StateLock::take(dir.path()).unwrap();
    }
}
