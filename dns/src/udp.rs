//! Queries by UDP on one socket.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::UdpSocket, time};

use crate::{
    answer::Transport,
    server::{Service, Step},
};

/// Answers what arrives at `socket` until the service is cancelled.
pub(crate) async fn serve(socket: Arc<UdpSocket>, service: Service) {
    let stop = service.cancel.clone();
    let mut stopped = std::pin::pin!(stop.cancelled());
    let mut buffer = vec![0; MAX_QUERY];
    loop {
        let received = tokio::select! {
            () = &mut stopped => return,
            received = socket.recv_from(&mut buffer) => received,
        };
        match received {
            Ok((len, from)) => take(&buffer[..len], from, &socket, &service),
            Err(error) => {
                tracing::warn!(%error, "failed to receive DNS queries");
                time::sleep(PAUSE_AFTER_ERROR).await;
            }
        }
        // What has piled up is taken without going through the scheduler each time.
        for _ in 0..BATCH {
            match socket.try_recv_from(&mut buffer) {
                Ok((len, from)) => take(&buffer[..len], from, &socket, &service),
                Err(_) => break,
            }
        }
    }
}

fn take(packet: &[u8], from: SocketAddr, socket: &Arc<UdpSocket>, service: &Service) {
    match service.take(packet, from.ip(), Transport::Udp) {
        Step::Send(message) => send(socket, &message, from, service),
        Step::Nothing => {}
        Step::Wait(pending) => {
            let (service, socket) = (service.clone(), socket.clone());
            let (tasks, stop) = (service.tasks.clone(), service.cancel.clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    reply = service.forward(pending) => send(&socket, &reply, from, &service),
                }
            });
        }
    }
}

/// Sends without waiting: a full socket buffer loses the answer, as any UDP packet may be lost.
fn send(socket: &UdpSocket, message: &[u8], to: SocketAddr, service: &Service) {
    let sent: io::Result<usize> = socket.try_send_to(message, to);
    if let Err(error) = sent {
        tracing::trace!(%to, %error, "lost a DNS answer");
        service.counters().dropped.increment();
    }
}

/// Longer queries are cut off, and so malformed.
const MAX_QUERY: usize = 4096;
const BATCH: usize = 64;
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);
