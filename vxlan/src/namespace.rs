use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{FsType, fstatfs},
};
use tokio::sync::oneshot;
use weft_model::NetworkId;

use crate::cookie;

/// An open network namespace. Keeps it alive.
#[derive(Clone, Debug)]
pub struct Namespace {
    file: Arc<File>,
    path: PathBuf,
}

impl Namespace {
    /// The calling thread's own.
    ///
    /// # Errors
    ///
    /// `/proc` is not mounted.
    pub fn current() -> Result<Self, NamespaceError> {
        // `/proc/self` would name the leader's.
        Self::open("/proc/thread-self/ns/net")
    }

    /// That of a process.
    ///
    /// # Errors
    ///
    /// There is no such process, or it has exited.
    pub fn of_process(pid: u32) -> Result<Self, NamespaceError> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// The one that is mounted at `path`.
    ///
    /// # Errors
    ///
    /// Nothing is there, or what is there is no namespace: the mount has gone and left its file.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, NamespaceError> {
        let path = path.into();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(NamespaceError::Missing { path });
            }
            Err(source) => return Err(NamespaceError::Open { path, source }),
        };
        let filesystem = fstatfs(&file)
            .map_err(|errno| NamespaceError::Open { path: path.clone(), source: errno.into() })?;
        match filesystem.filesystem_type() {
            FsType(libc::NSFS_MAGIC) => Ok(Self { file: Arc::new(file), path }),
            _ => Err(NamespaceError::NotANamespace { path }),
        }
    }

    /// Runs `f` inside the namespace on a thread of its own and waits for it.
    ///
    /// Sockets that `f` makes stay in the namespace wherever they are used later; so do processes
    /// that it starts. Costs about 80 µs.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered (`CAP_SYS_ADMIN` is missing), or what `f` returns.
    pub fn run<T, E>(&self, f: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E>
    where
        T: Send,
        E: Send + From<NamespaceError>,
    {
        // A thread that has changed its namespace must end: a pool would hand it to others.
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter()?;
                    f()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// As [`run`](Self::run), without blocking the caller's runtime.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub async fn run_async<T, E>(
        &self,
        f: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: Send + From<NamespaceError> + 'static,
    {
        let (answer, result) = oneshot::channel();
        let namespace = self.clone();
        thread::spawn(move || {
            let _ = answer.send(namespace.enter().map_err(E::from).and_then(|()| f()));
        });
        match result.await {
            Ok(result) => result,
            Err(_) => Err(NamespaceError::Panicked { path: self.path.clone() }.into()),
        }
    }

    /// A number that no other namespace has had since the host started, as inode numbers have not:
    /// they are given out again at once (`SO_NETNS_COOKIE`, Linux 5.14).
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered, or the kernel is too old.
    pub fn cookie(&self) -> Result<u64, NamespaceError> {
        self.run(|| {
            cookie::of_current()
                .map_err(|source| NamespaceError::Cookie { path: self.path.clone(), source })
        })
    }

    /// Looks for the one with `cookie` among those that mounts and processes lead to.
    pub fn find(cookie: u64) -> Option<Self> {
        visible().find(|namespace| namespace.cookie().ok() == Some(cookie))
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether both are the same namespace, by whatever path they were opened.
    pub fn is(&self, other: &Self) -> bool {
        let identity = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
        identity(&self.file).is_some_and(|this| Some(this) == identity(&other.file))
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Moves the calling thread into it, for good.
    ///
    /// # Errors
    ///
    /// `CAP_SYS_ADMIN` is missing.
    pub fn enter(&self) -> Result<(), NamespaceError> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|errno| NamespaceError::Enter {
            path: self.path.clone(),
            source: errno.into(),
        })
    }
}

/// Where networks' namespaces are mounted, `/run/netns` unless told otherwise, so that
/// `ip netns exec weft-… ` works.
#[derive(Clone, Debug)]
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Opens the namespace called `name`, or makes it. Tells whether it was made.
    pub(crate) fn ensure(&self, name: &str) -> Result<(Namespace, bool), NamespaceError> {
        match self.open(name) {
            Ok(namespace) => return Ok((namespace, false)),
            Err(NamespaceError::Missing { .. } | NamespaceError::NotANamespace { .. }) => {}
            Err(error) => return Err(error),
        }
        self.share()?;
        let path = self.0.join(name);
        let failed = |source| NamespaceError::Create { path: path.clone(), source };
        OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;

        // The thread dies with the namespace as its own; the mount keeps it.
        thread::scope(|scope| {
            let made = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                mount(
                    Some("/proc/thread-self/ns/net"),
                    &path,
                    None::<&str>,
                    MsFlags::MS_BIND,
                    None::<&str>,
                )
            });
            made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
        .map_err(|errno| failed(errno.into()))?;
        Ok((self.open(name)?, true))
    }

    pub(crate) fn open(&self, name: &str) -> Result<Namespace, NamespaceError> {
        Namespace::open(self.0.join(name))
    }

    /// Removes the mount and its file. Succeeds if they have gone already.
    pub(crate) fn remove(&self, name: &str) -> Result<(), NamespaceError> {
        let path = self.0.join(name);
        // Fails if nothing is mounted there, which is what we want; the unlink tells the rest.
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(NamespaceError::Remove { path, source })
            }
            _ => Ok(()),
        }
    }

    /// The names that carry our mark.
    pub(crate) fn names(&self) -> Result<BTreeSet<String>, NamespaceError> {
        let failed = |source| NamespaceError::List { path: self.0.clone(), source };
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut names = BTreeSet::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if name.starts_with(PREFIX) {
                names.insert(name);
            }
        }
        Ok(names)
    }

    /// Makes the directory a shared mount, as `ip netns add` does, so that other mount namespaces
    /// see the networks come and, above all, do not keep them from going.
    fn share(&self) -> Result<(), NamespaceError> {
        let failed = |source| NamespaceError::Create { path: self.0.clone(), source };
        fs::create_dir_all(&self.0).map_err(failed)?;
        let shared = || {
            let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
            mount(None::<&str>, &self.0, None::<&str>, flags, None::<&str>)
        };
        if shared().is_ok() {
            return Ok(());
        }
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&self.0), &self.0, None::<&str>, flags, None::<&str>)
            .and_then(|()| shared())
            .map_err(|errno| failed(errno.into()))
    }
}

/// The network namespaces that mounts and processes lead to, as far as we may see them. Each at
/// least once; opened one by one.
pub(crate) fn visible() -> impl Iterator<Item = Namespace> {
    // Read from the table of this thread's mounts; `proc_pid_mountinfo(5)`.
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let mounts: Vec<_> = table.lines().filter_map(namespace_mount).collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        Some(PathBuf::from(format!("/proc/{pid}/ns/net")))
    });
    let mut seen = BTreeSet::new();
    mounts.into_iter().chain(processes).filter_map(move |path| {
        let namespace = Namespace::open(path).ok()?;
        let meta = namespace.file.metadata().ok()?;
        seen.insert((meta.dev(), meta.ino())).then_some(namespace)
    })
}

/// Where a line of a mount table says that a network namespace is mounted.
fn namespace_mount(line: &str) -> Option<PathBuf> {
    let mut fields = line.split(' ').skip(3);
    let (root, path) = (fields.next()?, fields.next()?);
    // Blanks in it are written in octal.
    let path = path.replace("\\040", " ");
    root.starts_with("net:[").then(|| path.into())
}

/// The name of `network`'s namespace.
pub fn namespace_name(network: NetworkId) -> String {
    format!("{PREFIX}{}", network.short())
}

#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("there is no network namespace at {path}: what it belonged to has gone")]
    Missing { path: PathBuf },
    #[error("{path} is no network namespace: its mount has gone")]
    NotANamespace { path: PathBuf },
    #[error("failed to open the network namespace {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("failed to tell the network namespace {path} from others (this needs Linux 5.14)")]
    Cookie { path: PathBuf, source: io::Error },
    #[error("failed to enter the network namespace {path} (this needs CAP_SYS_ADMIN)")]
    Enter { path: PathBuf, source: io::Error },
    #[error("failed to create the network namespace {path} (this needs CAP_SYS_ADMIN)")]
    Create { path: PathBuf, source: io::Error },
    #[error("failed to remove the network namespace {path}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("failed to list the network namespaces in {path}")]
    List { path: PathBuf, source: io::Error },
    #[error("a task inside the network namespace {path} panicked")]
    Panicked { path: PathBuf },
}

const PREFIX: &str = "weft-";
