//! Queries by TCP (RFC 7766): many on one connection, answered as they are ready.

use std::{io, net::IpAddr, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{self, Instant},
};

use crate::{
    answer::Transport,
    gate::Permit,
    server::{Service, Step},
};

/// Accepts connections on `listener` until the service is cancelled.
pub(crate) async fn serve(listener: TcpListener, service: Service) {
    loop {
        let accepted = tokio::select! {
            () = service.cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, from)) => {
                // Without a permit the stream is dropped, which closes it.
                if let Some(permit) = service.admit_connection(from.ip()) {
                    let connection = Connection::new(stream, from.ip(), service.clone(), permit);
                    service.tasks.spawn(connection.run());
                }
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept DNS connections");
                time::sleep(PAUSE_AFTER_ERROR).await;
            }
        }
    }
}

/// Puts the length in front of a message (RFC 1035 §4.2.2).
pub(crate) fn frame(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).expect("no DNS message is longer than 64 KiB");
    [len.to_be_bytes().as_slice(), message].concat()
}

/// One client's connection. One task reads and writes; what goes upstream has a task each.
struct Connection {
    stream: TcpStream,
    from: IpAddr,
    service: Service,
    _permit: Permit,
    /// What was read and not yet taken.
    input: BytesMut,
    /// The client has no more queries.
    ended: bool,
    /// Queries under way upstream.
    pending: usize,
    replies: mpsc::Receiver<Vec<u8>>,
    reply: mpsc::Sender<Vec<u8>>,
    /// When the connection is closed unless an answer was sent before or is awaited.
    deadline: Instant,
}

enum Wake {
    Read(io::Result<usize>),
    Reply(Vec<u8>),
    Stop,
}

impl Connection {
    fn new(stream: TcpStream, from: IpAddr, service: Service, permit: Permit) -> Self {
        let limits = service.tcp_limits();
        let (reply, replies) = mpsc::channel(limits.pipelined.max(1));
        let deadline = Instant::now() + limits.idle;
        Self {
            stream,
            from,
            service,
            _permit: permit,
            input: BytesMut::new(),
            ended: false,
            pending: 0,
            replies,
            reply,
            deadline,
        }
    }

    async fn run(mut self) {
        while !(self.ended && self.pending == 0) {
            let more = match self.wake().await {
                Wake::Stop => false,
                Wake::Read(read) => self.read(read).await,
                Wake::Reply(reply) => {
                    self.pending -= 1;
                    // A place is free again for a query that was read already.
                    self.send(&reply).await && self.take_queries().await
                }
            };
            if !more {
                return;
            }
        }
    }

    async fn wake(&mut self) -> Wake {
        let reads = !self.ended && self.pending < self.service.tcp_limits().pipelined;
        tokio::select! {
            () = self.service.cancel.cancelled() => Wake::Stop,
            // What is under way upstream has a deadline of its own.
            () = time::sleep_until(self.deadline), if self.pending == 0 => Wake::Stop,
            Some(reply) = self.replies.recv() => Wake::Reply(reply),
            read = self.stream.read_buf(&mut self.input), if reads => Wake::Read(read),
        }
    }

    /// Takes what a read brought; returns whether the connection goes on.
    async fn read(&mut self, read: io::Result<usize>) -> bool {
        match read {
            Ok(0) => self.ended = true,
            Ok(_) => {}
            Err(_) => return false,
        }
        self.take_queries().await
    }

    async fn take_queries(&mut self) -> bool {
        while self.pending < self.service.tcp_limits().pipelined {
            let Some(query) = next_frame(&mut self.input) else {
                return true;
            };
            let sent = match self.service.take(&query, self.from, Transport::Tcp) {
                Step::Send(message) => self.send(&message).await,
                // Whoever sends what is no query gets no second chance.
                Step::Nothing => false,
                Step::Wait(pending) => {
                    self.pending += 1;
                    let (service, reply) = (self.service.clone(), self.reply.clone());
                    self.service.tasks.spawn(async move {
                        let stop = service.cancel.clone();
                        tokio::select! {
                            () = stop.cancelled() => {}
                            // The connection may be gone by then.
                            message = service.forward(pending) => drop(reply.send(message).await),
                        }
                    });
                    true
                }
            };
            if !sent {
                return false;
            }
        }
        true
    }

    /// Sends one answer; returns whether the client took it in time.
    async fn send(&mut self, message: &[u8]) -> bool {
        let idle = self.service.tcp_limits().idle;
        let framed = frame(message);
        let sent = tokio::select! {
            () = self.service.cancel.cancelled() => return false,
            sent = time::timeout(idle, self.stream.write_all(&framed)) => sent,
        };
        self.deadline = Instant::now() + idle;
        matches!(sent, Ok(Ok(())))
    }
}

/// Takes the first whole message off `input`.
fn next_frame(input: &mut BytesMut) -> Option<Bytes> {
    let len = usize::from(u16::from_be_bytes(*input.first_chunk()?));
    if input.len() < LENGTH_LEN + len {
        return None;
    }
    input.advance(LENGTH_LEN);
    Some(input.split_to(len).freeze())
}

const LENGTH_LEN: usize = 2;
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);
