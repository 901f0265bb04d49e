use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use nix::unistd::{Group, chown};
use tokio::net::{UnixListener, UnixStream};

/// Listens on the unix socket at `path`, mode 0660, owned by `group` if one is named.
///
/// A socket that nobody answers at is left from a killed agent and is replaced.
///
/// # Errors
///
/// Another agent answers there, the group is unknown, or the socket cannot be made.
pub async fn bind(path: &Path, group: Option<&str>) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Unusable { path: path.into(), source };
    if UnixStream::connect(path).await.is_ok() {
        return Err(SocketError::InUse { path: path.into() });
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    if let Some(name) = group {
        let group = Group::from_name(name).map_err(|e| failed(e.into()))?;
        let group = group.ok_or_else(|| SocketError::NoGroup { name: name.into() })?;
        chown(path, None, Some(group.gid)).map_err(|e| failed(e.into()))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(listener)
}

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("another agent answers at {}: stop it, or name another socket", path.display())]
    InUse { path: PathBuf },
    #[error("there is no group {name}: create it, or change socket_group")]
    NoGroup { name: String },
    #[error("cannot listen on {}", path.display())]
    Unusable { path: PathBuf, source: io::Error },
}
