use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use crate::namespace::Namespace;

/// Sends `bytes` of content that never repeats from one namespace to another by TCP, and checks
/// every byte where it arrives.
pub(crate) fn tcp(from: &Namespace, to: &Namespace, address: &str, bytes: usize) {
    let address: IpAddr = address.parse().unwrap();
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
    let target = listener.local_addr().unwrap();
    let stream = from.run(|| {
        let stream = TcpStream::connect_timeout(&target, PATIENCE);
        stream.unwrap_or_else(|error| panic!("{target}: {error}"))
    });
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = stream;
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            for chunk in Content::default().chunks(bytes) {
                stream.write_all(&chunk).unwrap();
            }
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut at = 0;
        for expected in Content::default().chunks(bytes) {
            let mut chunk = vec![0; expected.len()];
            stream.read_exact(&mut chunk).unwrap_or_else(|error| panic!("at {at}: {error}"));
            assert!(chunk == expected, "other bytes arrived somewhere after {at}");
            at += chunk.len();
        }
    });
}

/// Sends a datagram of each size and waits for its echo; a lost one is sent again, a changed one
/// fails.
pub(crate) fn udp(from: &Namespace, to: &Namespace, address: &str, sizes: &[usize]) {
    let address: IpAddr = address.parse().unwrap();
    let any: SocketAddr = match address {
        IpAddr::V4(_) => "0.0.0.0:0".parse().unwrap(),
        IpAddr::V6(_) => "[::]:0".parse().unwrap(),
    };
    let server = to.run(|| UdpSocket::bind(SocketAddr::new(address, 0)).unwrap());
    let target = server.local_addr().unwrap();
    let client = from.run(|| {
        let client = UdpSocket::bind(any).unwrap();
        client.connect(target).unwrap();
        client
    });
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut datagram = vec![0; 65_536];
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                if let Ok((len, from)) = server.recv_from(&mut datagram) {
                    server.send_to(&datagram[..len], from).unwrap();
                }
            }
        });
        let result = std::panic::catch_unwind(|| {
            for &size in sizes {
                echo(&client, size);
            }
        });
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

fn echo(client: &UdpSocket, size: usize) {
    let datagram: Vec<u8> = Content::seeded(size as u64).chunks(size).flatten().collect();
    let mut back = vec![0; 65_536];
    for _ in 0..TRIES {
        client.send(&datagram).unwrap();
        while let Ok(len) = client.recv(&mut back) {
            if len == size {
                assert!(back[..len] == datagram[..], "{size} bytes came back changed");
                return;
            }
        }
    }
    panic!("{size} bytes are not answered");
}

/// Bytes that look random and are the same each time (xorshift, Marsaglia 2003).
pub(crate) struct Content(u64);

impl Default for Content {
    fn default() -> Self {
        Self::seeded(1)
    }
}

impl Content {
    pub(crate) fn seeded(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn chunks(mut self, bytes: usize) -> impl Iterator<Item = Vec<u8>> {
        let mut left = bytes;
        std::iter::from_fn(move || {
            let len = left.min(CHUNK);
            left -= len;
            (len > 0).then(|| {
                let words = std::iter::repeat_with(|| self.next().to_le_bytes());
                words.take(len.div_ceil(8)).flatten().take(len).collect()
            })
        })
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

const CHUNK: usize = 1 << 16;
const PATIENCE: Duration = Duration::from_secs(60);
const TRIES: usize = 10;
