//! Answers names inside sandboxes on networks without a gateway of weft's: at 127.0.0.11, as Docker
//! does.
//!
//! A socket keeps its namespace alive. So this end must be found by itself: when no process and no
//! mount leads into a sandbox any more its sockets are closed; then the kernel ends it, and says so
//! to the data plane.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    os::unix::fs::MetadataExt,
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify},
    task::spawn_blocking,
    time,
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use weft_model::{NetworkId, SandboxId};
use weft_vxlan::{DnsRedirect, KernelError, Namespace, NamespaceError, Process, redirect_dns};

use super::{ListenError, Listeners};
use crate::{
    api::types::Sandbox,
    chain::Chain,
    ledger::{
        Snapshots,
        book::{Book, EndpointState, LocalEndpoint},
    },
};

/// Where a sandbox asks.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// How often sandboxes are looked at that no process is known to be in.
const LOOK: Duration = Duration::from_millis(500);

/// Who asks in a sandbox: its address in one of its networks. The directory knows the others.
type Asker = (NetworkId, IpAddr);

/// The sockets in all sandboxes. Clones share them.
#[derive(Clone)]
pub struct SandboxListeners {
    listeners: Listeners,
    served: Arc<Mutex<BTreeMap<SandboxId, Served>>>,
    /// A process that led into a sandbox has ended.
    doubt: Arc<Notify>,
    tracker: TaskTracker,
}

struct Served {
    asker: Asker,
    inode: Inode,
    /// What leads into the sandbox.
    path: PathBuf,
    /// Of who waits for the end of the process that it is, if it is one.
    _watch: Option<DropGuard>,
    /// Ends when it is dropped.
    _redirect: DnsRedirect,
}

/// A namespace while somebody holds it; given out again afterwards.
type Inode = (u64, u64);

/// A sandbox to answer names in.
pub(crate) struct Resident {
    sandbox: SandboxId,
    reference: Sandbox,
    /// One of them is asked for; the others may take over.
    askers: Vec<Asker>,
    /// Whether it is only about to be connected: then it is served by whoever does so.
    pending: bool,
}

impl Resident {
    pub(crate) fn of(local: &LocalEndpoint) -> Self {
        let endpoint = &local.endpoint;
        let ip = endpoint.ips().next();
        Self {
            sandbox: endpoint.sandbox.clone(),
            reference: local.sandbox.clone(),
            askers: ip.map(|ip| (endpoint.network, ip)).into_iter().collect(),
            pending: local.state != EndpointState::Attached,
        }
    }

    /// Opens the sandbox by the reference that it was attached by, or by whatever leads into it still:
    /// the process may have ended while no agent ran, and left the sandbox to another.
    async fn open(&self) -> Result<Namespace, ServeError> {
        let (reference, sandbox) = (self.reference.clone(), self.sandbox.clone());
        let opened = spawn_blocking(move || match reference.open_if(&sandbox) {
            Ok(Some(namespace)) => Some(namespace),
            _ => Namespace::find(sandbox.parse().ok()?),
        });
        let opened = opened.await.unwrap_or_else(|panic| resume_unwind(panic.into_panic()));
        opened.ok_or(ServeError::Ended)
    }

    fn join(&mut self, other: Self) {
        self.askers.extend(other.askers);
        self.pending &= other.pending;
    }
}

/// The sandboxes to serve: those on a network without a gateway.
fn residents(book: &Book) -> BTreeMap<SandboxId, Resident> {
    let bare: BTreeSet<_> = book
        .networks
        .values()
        .filter(|network| !network.driver.has_gateway())
        .map(|network| network.id)
        .collect();
    let mut residents: BTreeMap<SandboxId, Resident> = BTreeMap::new();
    if bare.is_empty() {
        return residents;
    }
    for local in book.endpoints.values() {
        let here = bare.contains(&local.endpoint.network);
        if !here || local.state == EndpointState::Detaching {
            continue;
        }
        let resident = Resident::of(local);
        match residents.get_mut(&resident.sandbox) {
            Some(known) => known.join(resident),
            None => drop(residents.insert(resident.sandbox.clone(), resident)),
        }
    }
    residents
}

impl SandboxListeners {
    pub fn new(listeners: Listeners, tracker: TaskTracker) -> Self {
        Self { listeners, served: Arc::default(), doubt: Arc::default(), tracker }
    }

    /// Serves what the book speaks of until `stop`.
    pub async fn keep(self, mut snapshots: Snapshots, stop: CancellationToken) {
        let mut look = time::interval(LOOK);
        look.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut unserved = BTreeSet::new();
        loop {
            let residents = residents(&snapshots.borrow_and_update().book);
            self.retain(&residents).await;
            unserved.retain(|sandbox| residents.contains_key(sandbox));
            for resident in residents.values().filter(|resident| !resident.pending) {
                if unserved.contains(&resident.sandbox) {
                    continue;
                }
                if let Err(error) = self.serve(resident).await {
                    note(&resident.reference, &error);
                    unserved.insert(resident.sandbox.clone());
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = snapshots.changed() => if changed.is_err() { return },
                () = self.doubt.notified() => self.let_go_of_ended().await,
                _ = look.tick(), if !residents.is_empty() => {
                    self.let_go_of_ended().await;
                    for resident in residents.values() {
                        if unserved.contains(&resident.sandbox)
                            && self.serve(resident).await.is_ok()
                        {
                            unserved.remove(&resident.sandbox);
                        }
                    }
                }
            }
        }
    }

    /// Serves a sandbox; nothing is done where that is so already.
    ///
    /// # Errors
    ///
    /// It has ended, has a resolver at that address, or refuses.
    pub(crate) async fn serve(&self, resident: &Resident) -> Result<(), ServeError> {
        let mut served = self.served.lock().await;
        if let Some(found) = served.get(&resident.sandbox) {
            if resident.askers.contains(&found.asker) {
                return Ok(());
            }
            let (network, ip) = found.asker;
            self.listeners.unlisten_in_sandbox(network, ip).await;
            served.remove(&resident.sandbox);
        }
        let Some(&asker) = resident.askers.first() else { return Ok(()) };
        let namespace = resident.open().await?;
        let path = namespace.path().to_owned();
        let inode = inode(&path).ok_or(ServeError::Ended)?;
        let opened = namespace.run_async(|| -> Result<_, ServeError> {
            if has_resolver(&fs::read_to_string("/proc/thread-self/net/udp")?) {
                return Err(ServeError::Taken);
            }
            // The port is any: a container may have a name server of its own at 53.
            let socket = SocketAddrV4::new(RESOLVER, 0);
            Ok((UdpSocket::bind(socket)?, TcpListener::bind(socket)?))
        });
        let sockets = opened.await?;
        let (udp, tcp) = (sockets.0.local_addr()?.port(), sockets.1.local_addr()?.port());
        let (network, ip) = asker;
        self.listeners.listen_in_sandbox(network, ip, None, sockets).await?;
        let redirected = spawn_blocking(move || redirect_dns(&namespace, RESOLVER, udp, tcp)).await;
        match redirected.unwrap_or_else(|panic| resume_unwind(panic.into_panic())) {
            Ok(redirect) => {
                let watch = self.watch(&path);
                let entry = Served { asker, inode, path, _watch: watch, _redirect: redirect };
                served.insert(resident.sandbox.clone(), entry);
                Ok(())
            }
            Err(error) => {
                self.listeners.unlisten_in_sandbox(network, ip).await;
                Err(error.into())
            }
        }
    }

    /// Waits for the end of the process that `path` is of, if it is of one.
    fn watch(&self, path: &Path) -> Option<DropGuard> {
        let pid = path.strip_prefix("/proc").ok()?.iter().next()?.to_str()?.parse().ok()?;
        let (stop, doubt) = (CancellationToken::new(), Arc::clone(&self.doubt));
        let stopped = stop.clone();
        self.tracker.spawn(async move {
            // One that cannot be opened has ended already.
            if let Ok(process) = Process::open(pid)
                && stopped.run_until_cancelled(process.ended()).await.is_none()
            {
                return;
            }
            doubt.notify_one();
        });
        Some(stop.drop_guard())
    }

    /// Lets go of sandboxes that are on no such network any more.
    async fn retain(&self, residents: &BTreeMap<SandboxId, Resident>) {
        let mut served = self.served.lock().await;
        let left: Vec<_> =
            served.keys().filter(|sandbox| !residents.contains_key(*sandbox)).cloned().collect();
        for sandbox in left {
            if let Some(Served { asker: (network, ip), .. }) = served.remove(&sandbox) {
                self.listeners.unlisten_in_sandbox(network, ip).await;
            }
        }
    }

    /// Closes the sockets in sandboxes that nothing leads into.
    async fn let_go_of_ended(&self) {
        let mut served = self.served.lock().await;
        let doubtful: Vec<_> = served
            .iter()
            .filter(|(_, served)| inode(&served.path) != Some(served.inode))
            .map(|(sandbox, served)| (sandbox.clone(), served.inode))
            .collect();
        for (sandbox, wanted) in doubtful {
            let way = spawn_blocking(move || another_way(wanted)).await;
            let Some(found) = served.get_mut(&sandbox) else { continue };
            match way.ok().flatten() {
                Some(path) => {
                    found._watch = self.watch(&path);
                    found.path = path;
                }
                None => {
                    let (network, ip) = found.asker;
                    served.remove(&sandbox);
                    self.listeners.unlisten_in_sandbox(network, ip).await;
                }
            }
        }
    }
}

/// Says that a sandbox is not served. That one has ended others will tell.
pub(crate) fn note(sandbox: &Sandbox, error: &ServeError) {
    let ended = matches!(error, ServeError::Ended);
    let error = Chain(error);
    match ended {
        true => tracing::debug!(?sandbox, %error, "names are not answered"),
        false => tracing::warn!(?sandbox, %error, "names are not answered in the sandbox"),
    }
}

/// Which namespace `path` leads to now.
fn inode(path: &Path) -> Option<Inode> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// A process or a mount that leads into the namespace.
fn another_way(wanted: Inode) -> Option<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounts: Vec<_> = table.lines().filter_map(namespace_mount).collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        Some(Sandbox::Pid(pid).path())
    });
    mounts.into_iter().chain(processes).find(|path| inode(path) == Some(wanted))
}

/// Where a line of a mount table says that a network namespace is mounted (`proc_pid_mountinfo(5)`).
fn namespace_mount(line: &str) -> Option<PathBuf> {
    let mut fields = line.split(' ').skip(3);
    let (root, path) = (fields.next()?, fields.next()?);
    // Blanks in it are written in octal.
    root.starts_with("net:[").then(|| path.replace("\\040", " ").into())
}

/// Whether somebody, Docker mostly, answers at the resolver's address, by a table of `/proc/net`.
fn has_resolver(table: &str) -> bool {
    // Addresses are printed as the number that they are in memory.
    let resolver = format!("{:08X}:", u32::from_ne_bytes(RESOLVER.octets()));
    table.lines().skip(1).any(|line| {
        line.split_whitespace().nth(1).is_some_and(|local| local.starts_with(&resolver))
    })
}

/// Why names are not answered in a sandbox.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("it has ended")]
    Ended,
    #[error("it has a resolver at {RESOLVER} already")]
    Taken,
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("cannot open a socket in it")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("cannot redirect its queries")]
    Redirect(#[from] KernelError),
}

#[cfg(test)]
mod tests {
    use weft_model::{Driver, Macvlan};

    use super::*;
    use crate::fixture::{book_with, network};

    #[test]
    fn sandboxes_on_networks_with_a_gateway_ask_there() {
        let app = network(1, "app");
        let mut lan = network(2, "lan");
        lan.driver = Driver::Macvlan;
        lan.options.macvlan = Some(Macvlan::default());
        let mut book = book_with(&app, "web", "10.1.0.8");
        book.networks.insert(app.id, app);
        assert!(residents(&book).is_empty());
        let mut own = book_with(&lan, "web", "10.2.0.8");
        let (id, local) = own.endpoints.pop_first().unwrap();
        book.endpoints.insert(id, local);
        book.networks.insert(lan.id, lan.clone());
        let residents = residents(&book);
        let askers: Vec<_> = residents.values().flat_map(|resident| &resident.askers).collect();
        assert_eq!(askers, [&(lan.id, "10.2.0.8".parse().unwrap())]);
    }

    #[test]
    fn a_sandbox_is_found_again_by_whatever_leads_into_it() {
        let own = inode(Path::new("/proc/self/ns/net")).unwrap();
        let way = another_way(own).unwrap();
        assert_eq!(inode(&way), Some(own));
        assert_eq!(another_way((own.0, 1)), None);
        let line = "36 35 0:4 net:[4026532281] /run/netns/a\\040b rw shared:9 - nsfs nsfs rw";
        assert_eq!(namespace_mount(line), Some("/run/netns/a b".into()));
        assert_eq!(namespace_mount("36 35 0:4 / /proc rw - proc proc rw"), None);
    }

    #[test]
    fn another_resolver_is_found_by_its_address() {
        let head = "  sl  local_address rem_address   st\n";
        assert!(has_resolver(&format!("{head}  412: 0B00007F:9C41 00000000:0000 07\n")));
        assert!(!has_resolver(&format!("{head}  412: 0100007F:0035 00000000:0000 07\n")));
        assert!(!has_resolver(head));
    }
}
