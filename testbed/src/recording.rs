use std::{fs, net::SocketAddr, path::Path};

use anyhow::Context as _;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use memchr::memmem::Finder;

/// A capture that has ended: its packets from their Ethernet headers on, in order.
#[derive(Debug)]
pub struct Recording {
    packets: Vec<Vec<u8>>,
}

/// A UDP datagram that was recorded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Datagram {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub payload: Vec<u8>,
}

impl Recording {
    pub(crate) fn read(file: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let packets = packets(&bytes).with_context(|| format!("{} is cut", file.display()))?;
        Ok(Self { packets })
    }

    pub fn packets(&self) -> &[Vec<u8>] {
        &self.packets
    }

    /// How many packets hold `bytes`.
    pub fn holding(&self, bytes: &[u8]) -> usize {
        let finder = Finder::new(bytes);
        self.packets.iter().filter(|packet| finder.find(packet).is_some()).count()
    }

    /// The UDP datagrams of which the source or the destination has `port`. A super-packet that
    /// the kernel made of several counts as one.
    pub fn datagrams(&self, port: u16) -> Vec<Datagram> {
        let datagrams = self.packets.iter().filter_map(|packet| datagram(packet));
        datagrams
            .filter(|datagram| {
                [datagram.source.port(), datagram.destination.port()].contains(&port)
            })
            .collect()
    }
}

/// The records of a capture file as tcpdump writes it: of this machine's byte order, with a header
/// of 24 bytes for the file and of 16 for each packet (pcap-savefile(5)).
fn packets(mut file: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut packets = Vec::new();
    file = file.get(24..)?;
    while !file.is_empty() {
        let (header, rest) = file.split_at_checked(16)?;
        let length = u32::from_ne_bytes(header.get(8..12)?.try_into().ok()?);
        let (packet, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
        packets.push(packet.to_vec());
        file = rest;
    }
    Some(packets)
}

fn datagram(packet: &[u8]) -> Option<Datagram> {
    let sliced = SlicedPacket::from_ethernet(packet).ok()?;
    let Some(TransportSlice::Udp(udp)) = &sliced.transport else { return None };
    let (source, destination) = match sliced.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            (header.source_addr().into(), header.destination_addr().into())
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            (header.source_addr().into(), header.destination_addr().into())
        }
        NetSlice::Arp(_) => return None,
    };
    Some(Datagram {
        source: SocketAddr::new(source, udp.source_port()),
        destination: SocketAddr::new(destination, udp.destination_port()),
        payload: udp.payload().to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    #[test]
    fn a_file_is_read_to_its_last_packet_and_a_cut_one_is_refused() {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([1; 6], [2; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(7, 8)
            .write(&mut frame, b"marker")
            .unwrap();
        let mut file = vec![0; 24];
        for _ in 0..2 {
            let length = u32::try_from(frame.len()).unwrap().to_ne_bytes();
            file.extend([[0; 4], [0; 4], length, length].concat());
            file.extend(&frame);
        }
        let recording = Recording { packets: packets(&file).unwrap() };
        assert_eq!((recording.holding(b"marker"), recording.holding(b"mark3r")), (2, 0));
        let datagrams = recording.datagrams(8);
        assert_eq!(datagrams.len(), 2);
        assert_eq!(datagrams[1].source.to_string(), "10.0.0.1:7");
        assert_eq!(datagrams[1].payload, b"marker");
        assert_eq!(recording.datagrams(9), []);
        assert!(packets(&file[..file.len() - 1]).is_none());
    }
}
