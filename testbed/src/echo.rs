use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;

use crate::{Container, holder::in_network_namespace, ping::joined};

/// A server in a container that tells every client the container's name and the address that it
/// sees of the client, at one port, by TCP and UDP, IPv4 and IPv6.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

/// What an [`Echo`] answered.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Answer {
    /// The container's.
    pub name: String,
    /// The client's, as the server sees it.
    pub client: IpAddr,
}

/// How an [`Echo`] is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum By {
    Tcp,
    Udp,
}

impl Echo {
    /// # Errors
    ///
    /// The port is taken, or the container is gone.
    pub fn start(container: &Container, port: u16) -> anyhow::Result<Self> {
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let open = || Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?));
        let (tcp, udp) =
            container.inside(open).with_context(|| format!("cannot listen at {at}"))?;
        udp.set_read_timeout(Some(GLANCE))?;
        tcp.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let name = container.name().to_owned();
        let threads = vec![
            thread::spawn({
                let (stop, name) = (Arc::clone(&stop), name.clone());
                move || serve_tcp(&tcp, &name, &stop)
            }),
            thread::spawn({
                let stop = Arc::clone(&stop);
                move || serve_udp(&udp, &name, &stop)
            }),
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = joined(thread);
        }
    }
}

impl By {
    /// Asks once from the network namespace at `from`, by a socket of its own.
    ///
    /// # Errors
    ///
    /// There is no answer within a second.
    pub fn ask(self, from: &Path, target: SocketAddr) -> anyhow::Result<Answer> {
        let text = in_network_namespace(from, || match self {
            Self::Tcp => {
                let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let mut text = String::new();
                stream.read_to_string(&mut text)?;
                Ok(text)
            }
            Self::Udp => {
                let any: IpAddr = match target.is_ipv4() {
                    true => std::net::Ipv4Addr::UNSPECIFIED.into(),
                    false => Ipv6Addr::UNSPECIFIED.into(),
                };
                let socket = UdpSocket::bind((any, 0))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.connect(target)?;
                socket.send(b"who?")?;
                let mut buffer = [0; 512];
                let length = socket.recv(&mut buffer)?;
                Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
            }
        });
        let text = text.with_context(|| format!("{self:?}: {target} does not answer"))?;
        let (name, client) = text.trim().split_once(' ').context("an answer has two words")?;
        Ok(Answer { name: name.to_owned(), client: client.parse()? })
    }
}

fn serve_tcp(listener: &TcpListener, name: &str, stop: &AtomicBool) -> anyhow::Result<()> {
    use std::os::fd::AsFd as _;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    while !stop.load(Ordering::Relaxed) {
        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::try_from(GLANCE)?)?;
        match listener.accept() {
            Ok((mut stream, client)) => {
                // A client that has gone again is none of our business.
                let _ = stream.write_all(line(name, client).as_bytes());
                let _ = stream.shutdown(Shutdown::Write);
            }
            Err(error) if is_quiet(error.kind()) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) -> anyhow::Result<()> {
    let mut buffer = [0; 512];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((_, client)) => drop(socket.send_to(line(name, client).as_bytes(), client)),
            Err(error) if is_quiet(error.kind()) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn line(name: &str, client: SocketAddr) -> String {
    format!("{name} {}\n", client.ip().to_canonical())
}

fn is_quiet(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::ConnectionRefused)
}

/// How often a server looks whether it shall end.
const GLANCE: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(1);
