//! Sandboxes on this host: making one for `weft run`, and telling which one a reference names.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use weft_model::SandboxId;
use weft_vxlan::{Namespace, NamespaceError, NetlinkError};

use crate::api::types::Sandbox;

impl Sandbox {
    /// Identifies the namespace behind the reference: two references to one namespace agree, and a
    /// namespace that is made later never has the same identity.
    ///
    /// # Errors
    ///
    /// There is no such process or file, or it is no network namespace.
    pub fn identify(&self) -> Result<SandboxId, NamespaceError> {
        self.identity_of(|| self.open())
    }

    /// Opens the namespace behind the reference, if it is still the one called `id`.
    ///
    /// # Errors
    ///
    /// There is no such process or file, or it is no network namespace.
    pub fn open_if(&self, id: &SandboxId) -> Result<Option<Namespace>, NamespaceError> {
        let namespace = self.open()?;
        let found = self.identity_of(|| Ok(namespace.clone()))?;
        Ok((found == *id).then_some(namespace))
    }

    fn identity_of(
        &self,
        namespace: impl FnOnce() -> Result<Namespace, NamespaceError>,
    ) -> Result<SandboxId, NamespaceError> {
        match self {
            Self::Pid(_) | Self::Path(_) => Ok(namespace()?.cookie()?.to_string()),
            // It may not be there yet; engines never give out a path twice.
            Self::Engine(path) => Ok(path.display().to_string()),
            // The same one after a reboot.
            Self::Host => Ok("host".into()),
        }
    }

    fn open(&self) -> Result<Namespace, NamespaceError> {
        Namespace::open(self.path())
    }

    /// The file that stands for it.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Pid(pid) => format!("/proc/{pid}/ns/net").into(),
            Self::Path(path) | Self::Engine(path) => path.clone(),
            Self::Host => "/proc/thread-self/ns/net".into(),
        }
    }
}

/// Moves this process into new network, mount and UTS namespaces; of the network there is the
/// loopback interface only. The process must have one thread.
pub fn enter_new(hostname: &str) -> Result<(), SandboxError> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(SandboxError::Unshare)?;
    leave_host(hostname)?;
    Namespace::current()?.take_up_loopback().map_err(SandboxError::Loopback)
}

/// Moves this process into `network`, which others are in too, and new mount and UTS namespaces. The
/// process must have one thread.
pub fn enter_shared(network: &Namespace, hostname: &str) -> Result<(), SandboxError> {
    network.enter()?;
    leave_host(hostname)
}

/// Moves this process into new mount and UTS namespaces. The process must have one thread.
pub fn leave_host(hostname: &str) -> Result<(), SandboxError> {
    let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS;
    unshare(flags).map_err(SandboxError::Unshare)?;
    // What is mounted here must not show on the host; what the host mounts still shows here.
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .map_err(SandboxError::Unshare)?;
    nix::unistd::sethostname(hostname).map_err(SandboxError::Unshare)
}

/// Lays `text` over `/etc/resolv.conf`, in this process's mount namespace only.
pub fn replace_resolv_conf(text: &str) -> Result<(), SandboxError> {
    let target = Path::new("/etc/resolv.conf");
    let failed = |source| SandboxError::ResolvConf { source };
    let file = std::env::temp_dir().join(format!("weft-resolv-{}", std::process::id()));
    fs::write(&file, text).map_err(failed)?;
    let none = None::<&str>;
    let mounted = mount(Some(&file), target, none, MsFlags::MS_BIND, none);
    // A bind mount keeps the file; its name is no longer needed.
    fs::remove_file(&file).map_err(failed)?;
    mounted.map_err(|errno| failed(errno.into()))
}

/// Points standard output and standard error to `/dev/null`.
pub fn silence_output() -> Result<(), SandboxError> {
    let null =
        fs::OpenOptions::new().write(true).open("/dev/null").map_err(SandboxError::Output)?;
    nix::unistd::dup2_stdout(&null).map_err(|e| SandboxError::Output(e.into()))?;
    nix::unistd::dup2_stderr(&null).map_err(|e| SandboxError::Output(e.into()))
}

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("cannot make new namespaces; weft run needs root")]
    Unshare(#[source] nix::Error),
    #[error(transparent)]
    Network(#[from] NamespaceError),
    #[error("cannot take up the loopback interface")]
    Loopback(#[source] NetlinkError),
    #[error("cannot lay a resolver file over /etc/resolv.conf; the file must exist")]
    ResolvConf { source: io::Error },
    #[error("cannot silence the background process")]
    Output(#[source] io::Error),
}
