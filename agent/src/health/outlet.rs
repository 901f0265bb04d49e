//! How probes get into namespaces.
//!
//! A thread enters the namespace for each socket and each program, so there is a limit to how many do
//! so at one time. None waits for a backend inside: what a backend does, or does not do, costs the
//! others nothing. Programs have places of their own, because a disk may keep one from starting.

use std::net::{IpAddr, SocketAddr};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpSocket, TcpStream},
    process::Command,
    sync::Semaphore,
};
use weft_model::NetworkId;
use weft_vxlan::DataPlane;

use super::{
    exec::{self, Running},
    failure::Failure,
    targets::ProgramContext,
};

/// What a probe works with.
pub(super) trait Outlet: Send + Sync + 'static {
    type Socket: Send;
    type Stream: AsyncRead + AsyncWrite + Unpin + Send;

    /// Makes a socket in the network's own namespace, bound to `from`: a virtual address that is
    /// there too would lead the answer astray.
    fn socket(
        &self,
        network: NetworkId,
        to: SocketAddr,
        from: IpAddr,
    ) -> impl Future<Output = Result<Self::Socket, Failure>> + Send;

    /// Connects it, for as long as that takes.
    fn connect(
        socket: Self::Socket,
        to: SocketAddr,
    ) -> impl Future<Output = Result<Self::Stream, Failure>> + Send;

    /// Starts a program in the endpoint's namespace.
    fn start(
        &self,
        command: Command,
        context: &ProgramContext,
    ) -> impl Future<Output = Result<Running, Failure>> + Send;
}

impl Outlet for DataPlane {
    type Socket = TcpSocket;
    type Stream = TcpStream;

    async fn socket(
        &self,
        network: NetworkId,
        to: SocketAddr,
        from: IpAddr,
    ) -> Result<TcpSocket, Failure> {
        let open = move || {
            let socket = match to {
                SocketAddr::V4(_) => TcpSocket::new_v4(),
                SocketAddr::V6(_) => TcpSocket::new_v6(),
            }?;
            socket.bind(SocketAddr::new(from, 0))?;
            Ok(socket)
        };
        self.socket_in(network, move || open().map_err(|error| Failure::connect(to, &error))).await
    }

    async fn connect(socket: TcpSocket, to: SocketAddr) -> Result<TcpStream, Failure> {
        socket.connect(to).await.map_err(|error| Failure::connect(to, &error))
    }

    async fn start(&self, command: Command, context: &ProgramContext) -> Result<Running, Failure> {
        exec::start(command, Some(exec::namespace_of(context)?)).await
    }
}

/// The places of those that are in a namespace at one time.
#[derive(Debug)]
pub(super) struct Places {
    sockets: Semaphore,
    programs: Semaphore,
}

impl Places {
    pub(super) async fn for_socket<T>(&self, work: impl Future<Output = T>) -> T {
        let _place = self.sockets.acquire().await;
        work.await
    }

    pub(super) async fn for_program<T>(&self, work: impl Future<Output = T>) -> T {
        let _place = self.programs.acquire().await;
        work.await
    }
}

impl Default for Places {
    fn default() -> Self {
        Self { sockets: Semaphore::new(THREADS), programs: Semaphore::new(THREADS) }
    }
}

/// Threads that make sockets at one time, and such that start programs.
const THREADS: usize = 16;
