use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use weft_model::NodeId;

use crate::key::{Content, HEADER, LANES, META, Meta, OVERHEAD, TAG};

/// Bytes of the smallest probe, sealed: as large as a reply, so that no reply is larger than what
/// asked for it.
pub const SMALL: u16 = (OVERHEAD + REPLY) as u16;

/// Bytes that relaying a sealed packet adds to it.
pub const fn relay_overhead() -> u16 {
    RELAY_OVERHEAD
}

pub(super) const RELAY_OVERHEAD: u16 = (OVERHEAD + NODE) as u16;

/// Asks a peer for a [`Reply`].
///
/// | bytes | 0-3 | 4-5 | 6 | 7 | 8 and on | rest |
/// |---|---|---|---|---|---|---|
/// | | id, LE | size, LE | lanes | 0 | epoch of each lane, LE | 0 |
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Probe {
    /// Says which probe a reply is for.
    pub id: u32,
    /// Bytes of the whole sealed packet, at least [`SMALL`].
    pub size: u16,
    /// Of the prober's data lanes, lane 0 first, at most [`LANES`]: the epoch each one seals in at
    /// present. For [`Opener::catch_up`](crate::key::Opener::catch_up).
    pub epochs: Vec<u16>,
}

impl Probe {
    /// The packet, ready to be sealed: room for its header, description, body, room for its tag.
    pub fn packet(&self) -> Vec<u8> {
        let body = usize::from(self.size.max(SMALL)) - OVERHEAD;
        let (mut packet, body) = blank(Content::Probe, 0, body);
        let body = &mut packet[body..];
        body[0..4].copy_from_slice(&self.id.to_le_bytes());
        body[4..6].copy_from_slice(&self.size.to_le_bytes());
        let lanes = self.epochs.len().min(usize::from(LANES));
        body[6] = lanes as u8;
        for (room, epoch) in body[PROBE..].chunks_exact_mut(2).zip(&self.epochs[..lanes]) {
            room.copy_from_slice(&epoch.to_le_bytes());
        }
        packet
    }

    /// Reads the body of an opened [`Content::Probe`].
    ///
    /// # Errors
    ///
    /// If the peer sent what this build does not understand.
    pub fn decode(body: &[u8]) -> Result<Self, InvalidMessage> {
        let len = body.len();
        let short = InvalidMessage::Short { what: "probe", len };
        let ([i0, i1, i2, i3, s0, s1, lanes, _], rest) =
            body.split_first_chunk::<PROBE>().ok_or(short)?;
        if *lanes > LANES {
            return Err(InvalidMessage::Lanes(*lanes));
        }
        let epochs = rest.get(..2 * usize::from(*lanes)).ok_or(short)?;

        Ok(Self {
            id: u32::from_le_bytes([*i0, *i1, *i2, *i3]),
            size: u16::from_le_bytes([*s0, *s1]),
            epochs: epochs.chunks_exact(2).map(|e| u16::from_le_bytes([e[0], e[1]])).collect(),
        })
    }
}

/// Answers a [`Probe`]. It goes back the way the probe came: from the same socket to the address
/// that the probe came from, or through the same relay; sealed under the same root.
///
/// | bytes | 0-3 | 4-5 | 6-7 | 8-23 |
/// |---|---|---|---|---|
/// | | id, LE | size, LE | port, LE | address |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reply {
    /// The probe's.
    pub id: u32,
    /// Bytes of the sealed probe as it arrived.
    pub size: u16,
    /// Where the probe came from; none if it was relayed. IPv4 is mapped (RFC 4291 section 2.5.5.2).
    pub observed: Option<SocketAddr>,
}

impl Reply {
    /// The packet, ready to be sealed.
    pub fn packet(&self) -> Vec<u8> {
        let (mut packet, body) = blank(Content::ProbeReply, 0, REPLY);
        let body = &mut packet[body..];
        let (address, port) = match self.observed {
            Some(observed) => (mapped(observed.ip()), observed.port()),
            None => (Ipv6Addr::UNSPECIFIED, 0),
        };
        body[0..4].copy_from_slice(&self.id.to_le_bytes());
        body[4..6].copy_from_slice(&self.size.to_le_bytes());
        body[6..8].copy_from_slice(&port.to_le_bytes());
        body[8..24].copy_from_slice(&address.octets());
        packet
    }

    /// Reads the body of an opened [`Content::ProbeReply`].
    ///
    /// # Errors
    ///
    /// If the peer sent what this build does not understand.
    pub fn decode(body: &[u8]) -> Result<Self, InvalidMessage> {
        let len = body.len();
        let ([i0, i1, i2, i3, s0, s1, p0, p1, address @ ..], _) = body
            .split_first_chunk::<REPLY>()
            .ok_or(InvalidMessage::Short { what: "probe reply", len })?;
        let address = IpAddr::from(*address).to_canonical();
        let port = u16::from_le_bytes([*p0, *p1]);

        Ok(Self {
            id: u32::from_le_bytes([*i0, *i1, *i2, *i3]),
            size: u16::from_le_bytes([*s0, *s1]),
            observed: (port != 0).then(|| SocketAddr::new(address, port)),
        })
    }
}

/// Something that one node passes on from a second to a third.
///
/// On the way to the relay ([`Content::RelayThis`]) `node` is the one that it is meant for; from
/// the relay on ([`Content::Relayed`]) it is the one that it comes from. The description's index
/// is the payload's kind.
///
/// | bytes | 0-15 | 16 and on |
/// |---|---|---|
/// | | node | payload |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Relayed<'a> {
    pub node: NodeId,
    pub kind: Payload,
    pub payload: &'a [u8],
}

/// What is relayed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Payload {
    /// A packet that the two ends sealed: the relay cannot open it.
    Packet = 0,
    /// A datagram of the agents' own sessions, which have an encryption of their own.
    Datagram = 1,
}

impl<'a> Relayed<'a> {
    /// The packet, ready to be sealed for the relay.
    pub fn packet(&self) -> Vec<u8> {
        let (mut packet, body) =
            blank(Content::RelayThis, self.kind as u8, NODE + self.payload.len());
        let body = &mut packet[body..];
        body[..NODE].copy_from_slice(self.node.as_bytes());
        body[NODE..][..self.payload.len()].copy_from_slice(self.payload);
        packet
    }

    /// Reads an opened [`Content::RelayThis`] or [`Content::Relayed`].
    ///
    /// # Errors
    ///
    /// If the peer sent what this build does not understand.
    pub fn decode(meta: &Meta, body: &'a [u8]) -> Result<Self, InvalidMessage> {
        let len = body.len();
        let (node, payload) = body
            .split_first_chunk::<NODE>()
            .ok_or(InvalidMessage::Short { what: "relayed payload", len })?;
        let kind = match meta.index {
            0 => Payload::Packet,
            1 => Payload::Datagram,
            other => return Err(InvalidMessage::Payload(other)),
        };
        Ok(Self { node: NodeId::from(*node), kind, payload })
    }

    /// What a relay does to a whole opened packet, so that it can be sealed again in the same
    /// buffer, for the other end: it says where the payload comes from. `packet` has room for a
    /// header and a tag around description and body, as it had when it arrived.
    ///
    /// # Errors
    ///
    /// If `packet` is too short to have a payload.
    pub fn forward(source: NodeId, packet: &mut [u8]) -> Result<(), InvalidMessage> {
        let len = packet.len();
        let short = InvalidMessage::Short { what: "relayed packet", len };
        let (meta, body) =
            packet.get_mut(HEADER..).and_then(<[u8]>::split_first_chunk_mut).ok_or(short)?;
        let [_, _, kind, ..]: [u8; META] = *meta;
        let node = body.first_chunk_mut::<NODE>().ok_or(short)?;
        *node = *source.as_bytes();
        Meta { index: kind, ..Meta::control(Content::Relayed) }.encode(meta);
        Ok(())
    }
}

/// The packet, ready to be sealed, by which a relay says that it does not reach `node`. Its body
/// is read by [`NodeId::from`] of its first 16 bytes, as [`Relayed::decode`] does.
pub fn unrelayable(node: NodeId) -> Vec<u8> {
    let (mut packet, body) = blank(Content::CannotRelay, 0, NODE);
    packet[body..][..NODE].copy_from_slice(node.as_bytes());
    packet
}

/// What a peer's control packet does not say.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidMessage {
    #[error("{len} bytes are too few for a {what}")]
    Short { what: &'static str, len: usize },
    #[error("a node has at most {LANES} lanes, not {0}")]
    Lanes(u8),
    #[error("a relayed payload of kind {0} is not known here: update this node")]
    Payload(u8),
}

const NODE: usize = 16;
/// The part of a probe's body in front of the epochs.
const PROBE: usize = 8;
/// A reply's body, which a probe's is never shorter than.
const REPLY: usize = 24;

/// A packet with its description written and a body of `len` zeros, and where the body begins.
fn blank(content: Content, index: u8, len: usize) -> (Vec<u8>, usize) {
    let mut packet = vec![0; OVERHEAD + len];
    let meta = packet[HEADER..].first_chunk_mut().expect("a packet has room for its description");
    Meta { index, ..Meta::control(content) }.encode(meta);
    debug_assert_eq!(packet.len() - TAG, HEADER + META + len);
    (packet, HEADER + META)
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn opened(packet: &[u8]) -> (Meta, &[u8]) {
        Meta::decode(&packet[HEADER..packet.len() - TAG]).unwrap()
    }

    #[test]
    fn a_probe_has_the_size_that_it_says_and_is_never_smaller_than_its_reply() {
        let observed = Some("192.0.2.1:6791".parse().unwrap());
        let reply = Reply { id: 7, size: 1400, observed };
        for size in [0, SMALL, 1400, u16::MAX] {
            let probe = Probe { id: 7, size, epochs: (0..8).collect() };
            let packet = probe.packet();
            assert_eq!(packet.len(), usize::from(size.max(SMALL)));
            assert!(reply.packet().len() <= packet.len());
            let (meta, body) = opened(&packet);
            assert_eq!(meta, Meta::control(Content::Probe));
            assert_eq!(Probe::decode(body), Ok(probe));
        }
    }

    #[test]
    fn a_reply_says_what_was_observed() {
        for observed in [None, Some("192.0.2.1:6791"), Some("[2001:db8::1]:1")] {
            let observed = observed.map(|address| address.parse().unwrap());
            let reply = Reply { id: 0x0102_0304, size: 0x0506, observed };
            let packet = reply.packet();
            assert_eq!(packet.len(), usize::from(SMALL));
            let (meta, body) = opened(&packet);
            assert_eq!(meta, Meta::control(Content::ProbeReply));
            assert_eq!(Reply::decode(body), Ok(reply));
        }
    }

    #[test]
    fn a_relay_changes_the_name_and_leaves_the_payload() {
        let (from, to) = (NodeId::from([1; 16]), NodeId::from([2; 16]));
        for kind in [Payload::Packet, Payload::Datagram] {
            let mut packet = Relayed { node: to, kind, payload: b"sealed" }.packet();
            assert_eq!(packet.len(), 6 + usize::from(relay_overhead()));
            let (meta, body) = opened(&packet);
            assert_eq!(meta.content, Content::RelayThis);
            let sent = Relayed { node: to, kind, payload: b"sealed" };
            assert_eq!(Relayed::decode(&meta, body), Ok(sent));

            Relayed::forward(from, &mut packet).unwrap();
            let (meta, body) = opened(&packet);
            assert_eq!(meta.content, Content::Relayed);
            assert_eq!(Relayed::decode(&meta, body), Ok(Relayed { node: from, ..sent }));
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_a_reader_panic(mut body in prop::collection::vec(any::<u8>(), 0..80), index in 0u8..3) {
            let meta = Meta { index, ..Meta::control(Content::Relayed) };
            let _ = (Probe::decode(&body), Reply::decode(&body), Relayed::decode(&meta, &body));
            let _ = Relayed::forward(NodeId::from([1; 16]), &mut body);
        }
    }
}
