//! The real kernel's opinion of what is cut and put together here.
//!
//! ```text
//!   namespace left                                   namespace right
//!   sockets - tap0  <->  split, coalesce, answer  <->  tap0 - sockets        (streams, datagrams)
//!
//!   super-frame -> tap0 - bridge - tap1 -> segments of the kernel's own      (segmentation)
//! ```

use std::{
    fs::File,
    future::Future,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr},
    process::Command,
    thread,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{setsockopt, sockopt},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::yield_now,
    time::timeout,
};
use weft_model::MacAddr;

use super::{
    ANSWER_ROOM, Answer, Arrival, Built, Checksum, Coalescer, Headers, Splitter, VNET_LEN,
    VnetHeader, answer,
    reference::{Flow, ones},
    station,
    wire::{ALL, split},
};
use crate::{OffloadSwitches, Tap};

#[test]
fn the_kernel_cuts_super_frames_to_the_same_segments() {
    in_namespaces(async || {
        new_namespace();
        let from = tap("tap0", OffloadSwitches::ALL_ON);
        let to = tap("tap1", OffloadSwitches::ALL_OFF);
        ip("link add br0 type bridge mcast_snooping 0");
        for link in ["tap0", "tap1"] {
            ip(&format!("link set {link} master br0 mtu 9000 addrgenmode none up"));
        }
        ip("link set br0 addrgenmode none up");

        let payload: Vec<u8> = (0..20_000u32).map(|at| (at ^ at >> 8) as u8).collect();
        let mut flows = Vec::new();
        for tcp in [true, false] {
            for v6 in [false, true] {
                let plain = Flow { tcp, v6, ..Flow::tcp4() };
                let options = if v6 { Vec::new() } else { vec![1; 8] };
                flows.push(plain.clone());
                flows.push(Flow { options, tcp_options: vec![1; 12], ..plain.clone() });
                flows.push(Flow {
                    dont_fragment: false,
                    flags: 0x19,
                    sequence: !0,
                    ..plain.clone()
                });
                flows.push(Flow { flags: 0xd8, identification: 0xffff, ..plain });
            }
        }
        for flow in flows {
            for size in [100, 1000, 1448, 7999] {
                // The kernel does not cut what a datagram may not be cut to.
                let len = if flow.tcp { payload.len() } else { payload.len().min(size * 60) };
                let (vnet, frame) = flow.super_frame(&payload[..len], size as u16);
                from.write(&[&vnet.to_bytes()[..], &frame].concat());
                for (index, (ours, part)) in split(vnet, &frame).into_iter().enumerate() {
                    let (told, kernels) = to.read_of(&frame[6..12]).await;
                    assert_eq!(told.gso, None);
                    let ours = complete(ours, part.partial);
                    let kernels = complete(kernels, told.checksum != Checksum::Unchecked);
                    assert_eq!(ours, kernels, "segment {index} of {size} bytes of {flow:?}");
                }
            }
        }
    });
}

#[test]
fn streams_and_datagrams_arrive_as_they_were_sent() {
    in_namespaces(async || {
        let left = Side::new(1);
        let (server, datagrams) = left.listen().await;
        let right = Side::new(2);
        let clients = right.datagrams().await;

        let mut there = Pump::default();
        let mut back = Pump::default();
        let transfer = async {
            for (listener, address) in &server {
                stream(listener, *address).await;
            }
            for (receiver, sender) in datagrams.iter().zip(&clients) {
                sent_at_once(receiver, sender).await;
                sent_one_by_one(receiver, sender).await;
            }
        };
        tokio::select! {
            () = transfer => {}
            () = there.run(&right.tap, &left.tap, 1) => unreachable!("it runs for ever"),
            () = back.run(&left.tap, &right.tap, 2) => unreachable!("it runs for ever"),
        }
        assert!(there.answered >= 2 && back.answered >= 2, "{there:?} {back:?}");
        for seen in [there.split, there.coalesced] {
            assert!(seen.iter().all(|&count| count > 0), "no super-frame of some kind: {there:?}");
        }
    });
}

/// Eight megabytes from right to left, and a word back.
async fn stream(listener: &TcpListener, address: SocketAddr) {
    let sent: Vec<u8> =
        (0..8 << 20u32).map(|at: u32| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let client = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&sent).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut word = Vec::new();
        stream.read_to_end(&mut word).await.unwrap();
        assert_eq!(word, b"seen");
    };
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).await.unwrap();
        assert!(received == sent, "{} bytes of {} or others", received.len(), sent.len());
        stream.write_all(b"seen").await.unwrap();
    };
    tokio::join!(client, server);
}

/// Datagrams that the kernel was given as one, and gives to the TAP as one.
async fn sent_at_once(receiver: &UdpSocket, sender: &UdpSocket) {
    sender.connect(receiver.local_addr().unwrap()).await.unwrap();
    setsockopt(sender, sockopt::UdpGsoSegment, &1000).unwrap();
    let sent: Vec<u8> = (0..20_300u32).map(|at| (at >> 4) as u8).collect();
    assert_eq!(sender.send(&sent).await.unwrap(), sent.len());
    for datagram in sent.chunks(1000) {
        assert_eq!(receive(receiver).await, datagram);
    }
    setsockopt(sender, sockopt::UdpGsoSegment, &0).unwrap();
}

/// Datagrams that are put together here for the first time.
async fn sent_one_by_one(receiver: &UdpSocket, sender: &UdpSocket) {
    let sent: Vec<Vec<u8>> =
        (0..20).map(|index| vec![index; if index < 19 { 300 } else { 8 }]).collect();
    for datagram in &sent {
        assert_eq!(sender.try_send(datagram).unwrap(), datagram.len());
    }
    for datagram in &sent {
        assert_eq!(&receive(receiver).await, datagram);
    }
}

async fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut room = vec![0; 65536];
    let len = socket.recv(&mut room).await.unwrap();
    room.truncate(len);
    room
}

/// One host: a namespace with a TAP and its addresses.
struct Side {
    tap: Queue,
    addresses: [IpAddr; 2],
}

impl Side {
    /// Leaves the calling thread in the new namespace.
    fn new(number: u8) -> Self {
        new_namespace();
        let tap = tap("tap0", OffloadSwitches::ALL_ON);
        ip(&format!("link set tap0 address {} txqueuelen 2000", mac(number)));
        ip(&format!("addr add 10.9.0.{number}/24 dev tap0"));
        ip(&format!("addr add fd09::{number}/64 dev tap0 nodad"));
        ip("link set tap0 up");
        let v6 = format!("fd09::{number}").parse().unwrap();
        Self { tap, addresses: [IpAddr::from([10, 9, 0, number]), v6] }
    }

    async fn listen(&self) -> (Vec<(TcpListener, SocketAddr)>, Vec<UdpSocket>) {
        let mut streams = Vec::new();
        for address in self.addresses {
            let listener = TcpListener::bind((address, 0)).await.unwrap();
            let address = listener.local_addr().unwrap();
            streams.push((listener, address));
        }
        (streams, self.datagrams().await)
    }

    async fn datagrams(&self) -> Vec<UdpSocket> {
        let mut sockets = Vec::new();
        for address in self.addresses {
            sockets.push(UdpSocket::bind((address, 0)).await.unwrap());
        }
        sockets
    }
}

/// Moves frames from one TAP to another as two nodes would, and counts the super-frames by kind:
/// TCP over IPv4, over IPv6, UDP.
#[derive(Debug, Default)]
struct Pump {
    answered: usize,
    split: [usize; 3],
    coalesced: [usize; 3],
}

impl Pump {
    async fn run(&mut self, from: &Queue, to: &Queue, destination: u8) {
        let mut coalescer = Coalescer::new(ALL);
        let mut arena = Vec::new();
        let mut counter = 0;
        loop {
            let mut batch = vec![from.read().await];
            while let Some(more) = from.try_read() {
                batch.push(more);
            }
            arena.clear();
            let mut arrivals = Vec::new();
            for bytes in &batch {
                let vnet = VnetHeader::parse(bytes).unwrap();
                let frame = &bytes[VNET_LEN..];
                let headers = Headers::parse(frame).unwrap();
                if self.answer(frame, &headers, destination, from) {
                    continue;
                }
                self.split[kind(&vnet)] += usize::from(vnet.gso.is_some());
                let splitter = Splitter::new(frame, &headers, vnet).unwrap();
                for index in 0..splitter.segments() {
                    let start = arena.len();
                    arena.resize(start + splitter.segment_len(index), 0);
                    splitter.write(index, &mut arena[start..]);
                    let part = splitter.part(index);
                    arrivals.push(Arrival { key: (), counter, part, frame: start..arena.len() });
                    counter += 1;
                }
            }
            let mut write = |built: Built<'_, ()>| {
                self.coalesced[kind(&built.vnet)] += usize::from(built.packets > 1);
                let written = built.with_slices(|slices| (&to.0).write_vectored(slices)).unwrap();
                assert_eq!(written, built.len());
            };
            for arrival in arrivals {
                let headers = Headers::parse(&arena[arrival.frame.clone()]).unwrap();
                coalescer.push(&arena, arrival, &headers, &mut write).unwrap();
            }
            coalescer.flush(&arena, &mut write);
        }
    }

    fn answer(&mut self, frame: &[u8], headers: &Headers, destination: u8, tap: &Queue) -> bool {
        let mut room = [0; ANSWER_ROOM];
        let known = [
            IpAddr::from([10, 9, 0, destination]),
            format!("fd09::{destination}").parse().unwrap(),
        ];
        let lookup = |ip| known.contains(&ip).then(|| mac(destination));
        match answer(frame, headers, lookup, &mut room) {
            Answer::Reply(len) => {
                let reply = [&VnetHeader::default().to_bytes()[..], &room[..len]].concat();
                tap.write(&reply);
                self.answered += 1;
                true
            }
            Answer::Unknown | Answer::Quiet => true,
            Answer::Forward => false,
        }
    }
}

fn kind(vnet: &VnetHeader) -> usize {
    vnet.gso.map_or(0, |gso| gso.kind as usize)
}

/// A queue of a TAP, which does not block.
struct Queue(File);

impl Queue {
    async fn read(&self) -> Vec<u8> {
        loop {
            if let Some(frame) = self.try_read() {
                return frame;
            }
            yield_now().await;
        }
    }

    /// The next frame whose source is `mac`, without its vnet header: the kernel has things to say
    /// of its own.
    async fn read_of(&self, mac: &[u8]) -> (VnetHeader, Vec<u8>) {
        loop {
            let mut bytes = self.read().await;
            let vnet = VnetHeader::parse(&bytes).unwrap();
            let frame = bytes.split_off(VNET_LEN);
            if &frame[6..12] == mac {
                return (vnet, frame);
            }
        }
    }

    fn try_read(&self) -> Option<Vec<u8>> {
        let mut room = vec![0; 70_000];
        match (&self.0).read(&mut room) {
            Ok(len) => {
                room.truncate(len);
                Some(room)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("failed to read the TAP: {error}"),
        }
    }

    fn write(&self, bytes: &[u8]) {
        assert_eq!((&self.0).write(bytes).unwrap(), bytes.len());
    }
}

/// A packet with its checksum completed; what the sum of the pseudo-header is was checked by the
/// kernel that made it, or is being compared with it.
fn complete(mut bytes: Vec<u8>, partial: bool) -> Vec<u8> {
    if partial {
        let l4 = Headers::parse(&bytes).unwrap().l4().unwrap();
        let field = l4.offset + l4.checksum_offset();
        let checksum = match !ones(&bytes[l4.offset..]) {
            0 => 0xffff,
            checksum => checksum,
        };
        bytes[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    bytes
}

/// Runs `test` on a thread of its own, which may go from namespace to namespace, with a deadline.
fn in_namespaces<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().build().unwrap();
            runtime.block_on(async {
                timeout(Duration::from_secs(60), test()).await.expect("done within a minute");
            });
        });
        if let Err(panic) = running.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn new_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("run the tests as root");
}

fn tap(name: &str, switches: OffloadSwitches) -> Queue {
    let (_, mut queues) = Tap::ensure(name, 1, switches).unwrap().into_parts();
    Queue(queues.remove(0))
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

fn mac(last: u8) -> MacAddr {
    station([2, 9, 0, 0, 0, last]).unwrap()
}
