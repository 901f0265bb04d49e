use std::{fmt, io, pin::Pin, sync::Arc};

/// Makes sockets that lead to a sandbox's own resolver. They must be made inside the sandbox.
pub type Open<T> =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = io::Result<T>> + Send>> + Send + Sync>;

/// The resolver that a sandbox had before ours, such as Docker's at 127.0.0.11: asked for all names
/// that are not the cluster's, instead of the host's resolvers.
#[derive(Clone)]
pub struct Fallback {
    /// Connected to the resolver.
    pub udp: Open<std::net::UdpSocket>,
    pub tcp: Open<std::net::TcpStream>,
}

impl fmt::Debug for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fallback")
    }
}
