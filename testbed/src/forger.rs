use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;
use etherparse::PacketBuilder;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Datagram, Lab};

/// Sends UDP datagrams on the underlay in anybody's name. IPv4 only.
#[derive(Debug)]
pub struct Forger {
    socket: Socket,
}

impl Forger {
    /// On the underlay's router, which is no host of the lab.
    ///
    /// # Errors
    ///
    /// The kernel gives no raw socket.
    pub fn open(lab: &Lab) -> anyhow::Result<Self> {
        let raw = Protocol::from(RAW);
        let open = || Ok(Socket::new(Domain::IPV4, Type::RAW, Some(raw))?);
        Ok(Self { socket: crate::in_network_namespace(&lab.underlay_namespace(), open)? })
    }

    /// # Errors
    ///
    /// An address is none of IPv4, or the kernel refuses to send.
    pub fn send(&self, datagram: &Datagram) -> anyhow::Result<()> {
        let Datagram { source, destination, payload } = datagram;
        let (IpAddr::V4(from), IpAddr::V4(to)) = (source.ip(), destination.ip()) else {
            anyhow::bail!("{source} to {destination} is not IPv4")
        };
        let mut packet = Vec::new();
        PacketBuilder::ipv4(from.octets(), to.octets(), 64)
            .udp(source.port(), destination.port())
            .write(&mut packet, payload)?;
        let target: SocketAddr = SocketAddr::new(to.into(), 0);
        self.socket
            .send_to(&packet, &target.into())
            .with_context(|| format!("cannot send {} bytes to {destination}", packet.len()))?;
        Ok(())
    }
}

/// The protocol of a socket that takes whole IP packets (raw(7)).
const RAW: i32 = 255;
