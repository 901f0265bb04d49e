use std::{
    fmt, io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use tokio::sync::mpsc;
use weft_model::NodeId;

/// A way for QUIC to members that no packet reaches directly: something that carries opaque
/// datagrams of up to [`DETOURED_BYTES`] to and from a member by its node id, such as the sealed
/// data path by way of a third member.
///
/// Nothing is believed of what comes out of it but what TLS proves. Delivery is not promised: what
/// a full channel does not take is lost, as a packet may be.
#[derive(Debug)]
pub struct Detour {
    pub outbound: mpsc::Sender<(NodeId, Bytes)>,
    pub inbound: mpsc::Receiver<(NodeId, Bytes)>,
}

/// The longest datagram on a detour, in bytes: the least that QUIC needs (RFC 9000 §14).
pub const DETOURED_BYTES: u16 = 1200;

/// The address by which this process knows the way to `node` over the detour. No packet has it.
///
/// In 100::/8, which is set aside and never routed (RFC 6666 uses a small part of it, as a sink).
/// The address has room for all of the node id but its last byte, which the port carries.
pub(super) fn virtual_address(node: NodeId) -> SocketAddr {
    let id = node.as_bytes();
    let mut octets = [PREFIX; 16];
    octets[1..].copy_from_slice(&id[..15]);
    SocketAddr::new(Ipv6Addr::from(octets).into(), PORTS | u16::from(id[15]))
}

/// The node to which a virtual address leads; `None` for real ones.
pub(super) fn node_behind(address: SocketAddr) -> Option<NodeId> {
    let IpAddr::V6(ip) = address.ip() else { return None };
    let octets = ip.octets();
    let [high, low] = address.port().to_be_bytes();
    if octets[0] != PREFIX || u16::from_be_bytes([high, 0]) != PORTS {
        return None;
    }
    let mut id = [low; 16];
    id[..15].copy_from_slice(&octets[1..]);
    Some(NodeId::from(id))
}

/// One socket for quinn: the real one, and the detour under virtual addresses.
///
/// To quinn it is an IPv6 socket even where the real one is of IPv4, since virtual addresses are
/// of IPv6.
pub(super) struct DetourSocket {
    real: Arc<dyn AsyncUdpSocket>,
    real_is_v4: bool,
    outbound: mpsc::Sender<(NodeId, Bytes)>,
    inbound: Mutex<mpsc::Receiver<(NodeId, Bytes)>>,
    /// Whose turn it is: neither may starve the other.
    detour_first: AtomicBool,
}

impl DetourSocket {
    pub(super) fn new(real: Arc<dyn AsyncUdpSocket>, detour: Detour) -> io::Result<Self> {
        let real_is_v4 = real.local_addr()?.is_ipv4();
        let Detour { outbound, inbound } = detour;
        let inbound = Mutex::new(inbound);
        Ok(Self { real, real_is_v4, outbound, inbound, detour_first: AtomicBool::new(false) })
    }

    fn send_detoured(&self, node: NodeId, transmit: &Transmit<'_>) {
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for datagram in transmit.contents.chunks(segment) {
            // A detour that is full or gone loses packets.
            let _ = self.outbound.try_send((node, Bytes::copy_from_slice(datagram)));
        }
    }

    fn poll_detour(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut inbound = self.inbound.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        while count < bufs.len().min(meta.len()) {
            let Poll::Ready(Some((node, datagram))) = inbound.poll_recv(cx) else { break };
            let Some(room) = bufs[count].get_mut(..datagram.len()) else { continue };
            room.copy_from_slice(&datagram);
            let len = datagram.len();
            let addr = virtual_address(node);
            meta[count] = RecvMeta { addr, len, stride: len.max(1), ..RecvMeta::default() };
            count += 1;
        }
        if count == 0 { Poll::Pending } else { Poll::Ready(Ok(count)) }
    }

    fn poll_real(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = self.real.poll_recv(cx, bufs, meta);
        if let Poll::Ready(Ok(count)) = received {
            for meta in &mut meta[..count] {
                // Nobody outside speaks for the detour.
                if node_behind(meta.addr).is_some() {
                    meta.len = 0;
                }
                if let SocketAddr::V4(v4) = meta.addr {
                    meta.addr = SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port());
                }
            }
        }
        received
    }
}

impl AsyncUdpSocket for DetourSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        // The detour is always writable: what it does not take is lost.
        self.real.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if let Some(node) = node_behind(transmit.destination) {
            self.send_detoured(node, transmit);
            return Ok(());
        }
        if !self.real_is_v4 {
            return self.real.try_send(transmit);
        }
        let ip = transmit.destination.ip().to_canonical();
        let destination = SocketAddr::new(ip, transmit.destination.port());
        self.real.try_send(&Transmit { destination, ..transmit.clone() })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let detour_first = self.detour_first.fetch_xor(true, Ordering::Relaxed);
        let first = match detour_first {
            true => self.poll_detour(cx, bufs, meta),
            false => self.poll_real(cx, bufs, meta),
        };
        match (first, detour_first) {
            (Poll::Ready(ready), _) => Poll::Ready(ready),
            (Poll::Pending, true) => self.poll_real(cx, bufs, meta),
            (Poll::Pending, false) => self.poll_detour(cx, bufs, meta),
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        let address = self.real.local_addr()?;
        Ok(match address {
            SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            SocketAddr::V6(_) => address,
        })
    }

    fn max_transmit_segments(&self) -> usize {
        self.real.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.real.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.real.may_fragment()
    }
}

impl fmt::Debug for DetourSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DetourSocket").field("real", &self.real).finish_non_exhaustive()
    }
}

const PREFIX: u8 = 0x01;
/// The upper byte of a virtual address's port, which is never zero.
const PORTS: u16 = 0x0100;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_virtual_address_leads_back_to_its_node(id in any::<[u8; 16]>()) {
            let node = NodeId::from(id);
            prop_assert_eq!(node_behind(virtual_address(node)), Some(node));
        }

        #[test]
        fn no_unicast_address_in_use_is_virtual(
            ip in any::<u128>(), port in any::<u16>(), v4 in any::<u32>(),
        ) {
            let global = Ipv6Addr::from(ip >> 3 | 1 << 125);
            let unique = Ipv6Addr::from(ip >> 8 | 0xfd << 120);
            for ip in [global.into(), unique.into(), IpAddr::from(v4.to_be_bytes())] {
                prop_assert_eq!(node_behind(SocketAddr::new(ip, port)), None);
            }
        }
    }
}
