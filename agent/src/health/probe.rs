use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpSocket, TcpStream},
    sync::Semaphore,
    time,
};
use weft_model::Probe;
use weft_vxlan::DataPlane;

use super::{
    exec::{self, Programs},
    failure::Failure,
    http,
    targets::{Engine, Target},
};

/// Finds out once whether a backend can serve.
pub(super) trait Prober: Send + Sync + 'static {
    fn probe(&self, target: &Target) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// Asks the endpoint itself: over its own interface, as clients reach it.
pub(super) struct KernelProber {
    plane: DataPlane,
    programs: Programs,
    /// A thread enters a namespace to make a socket there; so few of them live at a time.
    threads: Arc<Semaphore>,
}

impl KernelProber {
    pub(super) fn new(plane: DataPlane, programs: PathBuf) -> Self {
        let threads = Arc::new(Semaphore::new(THREADS));
        Self { plane, programs: Programs::new(programs), threads }
    }

    async fn attempt(&self, target: &Target) -> Result<(), Failure> {
        match &target.check.probe {
            Probe::Tcp { port } => self.connect(target, *port).await.map(drop),
            Probe::Http { port, path, status, body } => {
                let (stream, address) = self.connect(target, *port).await?;
                let wanted = http::Wanted { path, status: *status, body: body.as_deref() };
                http::get(stream, address, wanted).await
            }
            Probe::Exec { command } => {
                let command = self.programs.command(command, &target.program)?;
                let permit = self.threads.acquire().await;
                let namespace = exec::namespace_of(&target.program)?;
                let running = exec::start(command, Some(namespace)).await?;
                drop(permit);
                running.end().await
            }
            Probe::Engine => match &target.engine {
                Some(Engine::Podman(container)) => {
                    exec::start(exec::podman_check(container), None).await?.end().await
                }
                // Docker tells by itself.
                Some(Engine::Docker) | None => Err(Failure::NoEngine),
            },
        }
    }

    /// Connects to the first of the endpoint's addresses that accepts.
    async fn connect(
        &self,
        target: &Target,
        port: NonZeroU16,
    ) -> Result<(TcpStream, SocketAddr), Failure> {
        let mut failure = None;
        for (address, from) in target.at(port) {
            match self.connect_to(target, address, from).await {
                Ok(stream) => return Ok((stream, address)),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.expect("an endpoint has an address"))
    }

    /// Asks from the network's own namespace, and by the gateway's address: a virtual address that
    /// is there too would lead the answer astray.
    async fn connect_to(
        &self,
        target: &Target,
        address: SocketAddr,
        from: IpAddr,
    ) -> Result<TcpStream, Failure> {
        let permit = self.threads.acquire().await;
        let socket = self
            .plane
            .socket_in(target.network, move || {
                let open = || {
                    let socket = match address {
                        SocketAddr::V4(_) => TcpSocket::new_v4(),
                        SocketAddr::V6(_) => TcpSocket::new_v6(),
                    }?;
                    socket.bind(SocketAddr::new(from, 0))?;
                    Ok(socket)
                };
                open().map_err(|error| Failure::connect(address, &error))
            })
            .await?;
        drop(permit);
        socket.connect(address).await.map_err(|error| Failure::connect(address, &error))
    }
}

impl Prober for KernelProber {
    async fn probe(&self, target: &Target) -> Result<(), Failure> {
        let milliseconds = target.check.timeout;
        let limit = Duration::from_millis(milliseconds.into());
        let late = |_| Err(Failure::Late { milliseconds });
        time::timeout(limit, self.attempt(target)).await.unwrap_or_else(late)
    }
}

/// Threads that make sockets at one time.
const THREADS: usize = 16;
