use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::random;

/// A file or directory of the agent's state that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("failed to {op} {}", path.display())]
pub struct FileError {
    op: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl FileError {
    fn new(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { op, path, source }
    }

    /// What the system said.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

/// Replaces the content of `path` with `bytes`: after a crash it holds either the old content or
/// the new one, and it holds the new one once this has returned.
///
/// The file is readable by its owner alone. A file that was written half by a crash lies beside
/// it under a name that begins with a dot, and nobody reads it.
///
/// # Errors
/// If the directory of `path` does not exist or the file system refuses; the old content stands.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}", hex::encode(random::<6>())));

    let written = write_new(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path).map_err(FileError::new("replace", path)));
    match written {
        Ok(()) => sync_directory(parent(path)),
        Err(error) => {
            // The first error is the one to tell; an orphan is harmless.
            let _ = std::fs::remove_file(&temporary);
            Err(error)
        }
    }
}

/// Creates `path` with `bytes` and brings it to the disk, but not the directory's entry of it.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .map_err(FileError::new("write", path))
}

/// Creates `path` and its parents, open to their owner alone; an existing directory is kept.
pub fn create_directory(path: &Path) -> Result<(), FileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(FileError::new("create", path))
}

/// Gives the directory `from`, which is on the disk entirely, the name `to`.
///
/// # Errors
/// With kind `DirectoryNotEmpty` if there is something at `to`.
pub(super) fn publish_directory(from: &Path, to: &Path) -> Result<(), FileError> {
    sync_directory(from)?;
    std::fs::rename(from, to).map_err(FileError::new("create", to))?;
    sync_directory(parent(to))
}

/// The content of `path`; `None` if there is no such file.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::new("read", path)(error)),
    }
}

/// Removes `path`; that it is gone already is success.
pub(super) fn remove(path: &Path) -> Result<(), FileError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FileError::new("remove", path)(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn sync_directory(path: &Path) -> Result<(), FileError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(FileError::new("synchronise", path))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write_atomic(&path, b"old and long").unwrap();
        write_atomic(&path, b"new").unwrap();

        assert_eq!(read(&path).unwrap().unwrap(), b"new");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_error_names_the_operation_and_the_path() {
        let error = write_atomic(Path::new("/nonexistent/state"), b"").unwrap_err();
        assert!(error.to_string().starts_with("failed to write /nonexistent/.state."), "{error}");
    }
}
