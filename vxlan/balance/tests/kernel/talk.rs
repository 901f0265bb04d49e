//! Servers and clients in sandboxes.

use std::{
    io::{self, Read, Write},
    net::{
        IpAddr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket,
    },
    thread,
    time::Duration,
};

use socket2::{Domain, Protocol as Protocol4, Socket, Type};
use weft_model::Protocol;
use weft_vxlan::{Namespace, NamespaceError};

/// What a server says: who it is and whom it sees. One that is not asked again stays for the rest
/// of the test's process.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Answer {
    pub(crate) station: u8,
    pub(crate) client: IpAddr,
}

/// Why there was no answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Silence {
    /// Somebody said that there is nobody.
    Refused,
    /// Nobody said anything.
    TimedOut,
    /// The client's port belongs to a connection that has ended.
    PortResting,
}

/// Answers every connection and every packet to `port` of `sandbox`; connections stay open, and
/// whatever comes is sent back.
pub(crate) fn serve(station: u8, sandbox: &Namespace, port: u16) {
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let bind = || Ok::<_, Failed>((TcpListener::bind(address)?, UdpSocket::bind(address)?));
    let (tcp, udp) = sandbox.run(bind).unwrap();
    thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let client = stream.peer_addr().unwrap().ip().to_canonical();
                let greeting = format!("{station} {client}\n");
                let mut buffer = [0; 4096];
                let mut outcome = stream.write_all(greeting.as_bytes());
                while outcome.is_ok() {
                    outcome = match stream.read(&mut buffer) {
                        Ok(0) => return,
                        Ok(length) => stream.write_all(&buffer[..length]),
                        Err(error) => Err(error),
                    };
                }
            });
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 65_535];
        loop {
            let (length, client) = udp.recv_from(&mut buffer).unwrap();
            let mut answer = format!("{station} {}\n", client.ip().to_canonical()).into_bytes();
            answer.resize(answer.len().max(length), b'.');
            // The client may have gone.
            let _ = udp.send_to(&answer, client);
        }
    });
}

/// Asks once from `sandbox`, by a connection of its own.
pub(crate) fn ask(
    sandbox: &Namespace,
    protocol: Protocol,
    to: (IpAddr, u16),
) -> Result<Answer, Silence> {
    ask_often(sandbox, protocol, to, 1).pop().unwrap()
}

/// Asks `times` times, each by a connection of its own.
pub(crate) fn ask_often(
    sandbox: &Namespace,
    protocol: Protocol,
    to: (IpAddr, u16),
    times: usize,
) -> Vec<Result<Answer, Silence>> {
    let to = SocketAddr::from(to);
    let once = || match protocol {
        Protocol::Tcp => Conversation::open(to).map(|conversation| conversation.answer),
        Protocol::Udp => Sender::open(to).and_then(|sender| sender.ask(8)),
    };
    sandbox.run(|| Ok::<_, Failed>((0..times).map(|_| once()).collect())).unwrap()
}

/// A TCP connection.
pub(crate) struct Conversation {
    pub(crate) answer: Answer,
    /// Bytes that came with the answer, behind it.
    surplus: usize,
    stream: TcpStream,
}

impl Conversation {
    pub(crate) fn start(sandbox: &Namespace, to: (IpAddr, u16)) -> Result<Self, Silence> {
        sandbox.run(|| Ok::<_, Failed>(Self::open(to.into()))).unwrap()
    }

    /// From a port that others of the client's may have, too.
    pub(crate) fn start_from(
        sandbox: &Namespace,
        source: u16,
        to: (IpAddr, u16),
    ) -> Result<Self, Silence> {
        let to = SocketAddr::from(to);
        let connected = || {
            let socket = bound(Type::STREAM, source, to)?;
            let outcome = socket.connect_timeout(&to.into(), PATIENCE);
            Ok::<_, Failed>(outcome.map(|()| socket.into()))
        };
        let stream: io::Result<TcpStream> = sandbox.run(connected).unwrap();
        Self::over(stream.map_err(|error| silence(&error))?)
    }

    /// Ends it, and waits until the server has as well.
    pub(crate) fn close(mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
    }

    fn open(to: SocketAddr) -> Result<Self, Silence> {
        Self::over(TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| silence(&e))?)
    }

    fn over(mut stream: TcpStream) -> Result<Self, Silence> {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut buffer = [0; 100];
        let length = stream.read(&mut buffer).map_err(|error| silence(&error))?;
        let line =
            buffer[..length].iter().position(|byte| *byte == b'\n').map_or(length, |at| at + 1);
        Ok(Self { answer: parse(&buffer[..length]), surplus: length - line, stream })
    }

    /// Hears what somebody else has said in this one's place.
    pub(crate) fn heard_before(&mut self, length: usize) {
        self.stream.read_exact(&mut vec![0; length.saturating_sub(self.surplus)]).unwrap();
    }

    /// Whether what is said comes back.
    pub(crate) fn goes_on(&mut self) -> Result<(), Silence> {
        let mut buffer = [0; 5];
        let said =
            self.stream.write_all(b"hello").and_then(|()| self.stream.read_exact(&mut buffer));
        said.map_err(|error| silence(&error))
    }
}

/// A UDP client that sends from one port all the time.
pub(crate) struct Sender(UdpSocket);

impl Sender {
    pub(crate) fn start(sandbox: &Namespace, to: (IpAddr, u16)) -> Self {
        sandbox.run(|| Ok::<_, Failed>(Self::open(to.into()).unwrap())).unwrap()
    }

    /// From a port that others of the client's may have, too.
    pub(crate) fn start_from(sandbox: &Namespace, source: u16, to: (IpAddr, u16)) -> Self {
        let to = SocketAddr::from(to);
        let socket = sandbox.run(|| Ok::<_, Failed>(bound(Type::DGRAM, source, to)?)).unwrap();
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(PATIENCE / 10)).unwrap();
        socket.connect(to).unwrap();
        Self(socket)
    }

    fn open(to: SocketAddr) -> Result<Self, Silence> {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE / 10)).unwrap();
        socket.connect(to).map_err(|error| silence(&error))?;
        Ok(Self(socket))
    }

    /// Sends that many bytes and waits for the answer.
    pub(crate) fn ask(&self, length: usize) -> Result<Answer, Silence> {
        self.0.send(&vec![b'?'; length]).map_err(|error| silence(&error))?;
        let mut buffer = [0; 65_535];
        let length = self.0.recv(&mut buffer).map_err(|error| silence(&error))?;
        Ok(parse(&buffer[..length]))
    }
}

fn bound(kind: Type, source: u16, to: SocketAddr) -> io::Result<Socket> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = Socket::new(Domain::for_address(to), kind, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(any, source).into())?;
    Ok(socket)
}

/// Sends packets of TCP, each in two fragments, from `port` of the sandbox's address.
pub(crate) fn throw_fragments(sandbox: &Namespace, port: u16, to: SocketAddrV4, packets: u16) {
    let segment = |offset: usize| {
        // Sequence and acknowledgement, five words, ACK; no checksum.
        let mut bytes = [port.to_be_bytes(), to.port().to_be_bytes()].concat();
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 4, 0, 0, 0, 0, 0]);
        bytes.resize(1024, b'x');
        bytes[offset..offset + 512].to_vec()
    };
    let throw = || {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol4::from(IPPROTO_RAW)))?;
        for id in 0..packets {
            for (offset, more) in [(0, 0x2000), (512, 0)] {
                let place = u16::try_from(offset / 8).unwrap() | more;
                // The kernel fills in length, checksum and source.
                let mut packet = vec![0x45, 0, 0, 0];
                packet.extend((id + 1).to_be_bytes());
                packet.extend(place.to_be_bytes());
                packet.extend([64, 6, 0, 0, 0, 0, 0, 0]);
                packet.extend(to.ip().octets());
                packet.extend(segment(offset));
                socket.send_to(&packet, &SocketAddr::from(to).into())?;
            }
        }
        Ok::<_, Failed>(())
    };
    sandbox.run(throw).unwrap();
}

const IPPROTO_RAW: i32 = 255;

fn parse(answer: &[u8]) -> Answer {
    // What follows the line may be anything.
    let line = answer.split(|byte| *byte == b'\n').next().unwrap();
    let text = std::str::from_utf8(line).unwrap();
    let (station, client) = text.split_once(' ').unwrap();
    Answer { station: station.parse().unwrap(), client: client.parse().unwrap() }
}

fn silence(error: &io::Error) -> Silence {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Silence::Refused,
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Silence::TimedOut,
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable => Silence::PortResting,
        other => panic!("{other:?}: {error}"),
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Socket(#[from] io::Error),
}

/// How long an answer may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
