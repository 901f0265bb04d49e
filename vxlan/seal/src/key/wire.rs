use std::fmt;

use weft_model::{NetworkId, Suite};

/// Bytes of the header in clear, all of them authenticated.
pub const HEADER: usize = 16;

/// Bytes of the sealed description in front of the body.
pub const META: usize = 8;

/// Bytes of the AEAD tag behind the body.
pub const TAG: usize = 16;

/// Bytes that a sealed packet has beyond its body; also the size of the smallest packet.
pub const OVERHEAD: usize = HEADER + META + TAG;

/// The format that this build speaks: the high nibble of the first byte.
pub const VERSION: u8 = 1;

/// How many data lanes a node may have.
pub const LANES: u8 = 8;

/// One sender of a session: a worker, or the control thread. Each has keys and a counter of its
/// own.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Lane(u8);

impl Lane {
    /// Probes, their replies and relayed packets.
    pub const CONTROL: Self = Self(255);

    /// The byte on the wire.
    pub fn number(self) -> u8 {
        self.0
    }

    /// All lanes that a session can have, the control lane last.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..LANES).map(Self).chain([Self::CONTROL])
    }
}

impl TryFrom<u8> for Lane {
    type Error = InvalidLane;

    fn try_from(number: u8) -> Result<Self, InvalidLane> {
        match number {
            0..LANES | 255 => Ok(Self(number)),
            _ => Err(InvalidLane(number)),
        }
    }
}

/// A number that no lane has.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("there is no lane {0}: data lanes are 0 to 7, the control lane is 255")]
pub struct InvalidLane(u8);

/// What a packet says in clear: how to find its key. Every bit of it is authenticated.
///
/// | bytes | 0 | 1 | 2-3 | 4-7 | 8-15 |
/// |---|---|---|---|---|---|
/// | | version (high nibble), suite (low) | lane | epoch, LE | tag, LE | counter, LE |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    pub suite: Suite,
    pub lane: Lane,
    /// Generation of the lane's key.
    pub epoch: u16,
    /// Names the session at the receiver: [`Root::inbound_tag`](super::Root::inbound_tag) there.
    pub tag: u32,
    /// Counts the packets of the lane over all epochs.
    pub counter: u64,
}

impl Header {
    /// Writes the header to the front of a packet.
    #[inline]
    pub fn encode(&self, room: &mut [u8; HEADER]) {
        room[0] = VERSION << 4 | code(self.suite);
        room[1] = self.lane.0;
        room[2..4].copy_from_slice(&self.epoch.to_le_bytes());
        room[4..8].copy_from_slice(&self.tag.to_le_bytes());
        room[8..16].copy_from_slice(&self.counter.to_le_bytes());
    }

    /// Reads the header of a whole received packet. Nothing of it is authenticated yet.
    ///
    /// # Errors
    ///
    /// If `packet` is too short for an empty body, or of another version, suite or lane than this
    /// build knows.
    #[inline]
    pub fn decode(packet: &[u8]) -> Result<Self, Malformed> {
        let (Some(header), true) = (packet.first_chunk::<HEADER>(), packet.len() >= OVERHEAD)
        else {
            return Err(Malformed::Short { len: packet.len() });
        };
        let [kind, lane, e0, e1, t0, t1, t2, t3, counter @ ..] = *header;
        if kind >> 4 != VERSION {
            return Err(Malformed::Version(kind >> 4));
        }

        Ok(Self {
            suite: suite(kind & 0x0f).ok_or(Malformed::Suite(kind & 0x0f))?,
            lane: Lane::try_from(lane).map_err(|InvalidLane(lane)| Malformed::Lane(lane))?,
            epoch: u16::from_le_bytes([e0, e1]),
            tag: u32::from_le_bytes([t0, t1, t2, t3]),
            counter: u64::from_le_bytes(counter),
        })
    }
}

/// What the body of a packet is. Sealed with it.
///
/// | bytes | 0 | 1 | 2 | 3 | 4-7 |
/// |---|---|---|---|---|---|
/// | | content | flags | index | 0 | network, LE |
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Meta {
    pub content: Content,
    pub flags: Flags,
    /// Of a segment: its place in its super-frame, from 0. Of a relayed payload: its kind.
    pub index: u8,
    /// The [`Meta::network_of`] the network that a frame belongs to; 0 for other contents.
    pub network: u32,
}

impl Meta {
    /// Describes a packet that belongs to no network.
    pub fn control(content: Content) -> Self {
        Self { content, flags: Flags::NONE, index: 0, network: 0 }
    }

    /// The number that stands for a network in packets: the first four bytes of its id, LE.
    pub fn network_of(id: NetworkId) -> u32 {
        let [a, b, c, d, ..] = *id.as_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    /// Writes the description in front of the body.
    #[inline]
    pub fn encode(&self, room: &mut [u8; META]) {
        let [n0, n1, n2, n3] = self.network.to_le_bytes();
        *room = [self.content as u8, self.flags.0, self.index, 0, n0, n1, n2, n3];
    }

    /// Splits an opened packet into its description and its body.
    ///
    /// # Errors
    ///
    /// If `opened` is too short, of an unknown content, or has bits set that must be zero: a peer
    /// sent what this build does not understand.
    #[inline]
    pub fn decode(opened: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let Some((meta, body)) = opened.split_first_chunk::<META>() else {
            return Err(Malformed::Short { len: opened.len() });
        };
        let [content, flags, index, reserved, network @ ..] = *meta;
        if flags & !Flags::KNOWN != 0 || reserved != 0 {
            return Err(Malformed::Reserved { flags, reserved });
        }

        let meta = Self {
            content: Content::try_from(content)?,
            flags: Flags(flags),
            index,
            network: u32::from_le_bytes(network),
        };
        Ok((meta, body))
    }
}

/// What a body is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Content {
    /// A whole Ethernet frame.
    Frame = 0,
    /// A whole Ethernet frame that was cut from a super-frame.
    Segment = 1,
    /// Asks for a reply, to know a path, its delay and its MTU.
    Probe = 16,
    ProbeReply = 17,
    /// Asks the receiver to pass a payload on to a third node.
    RelayThis = 18,
    /// A payload that the sender passes on from a third node.
    Relayed = 19,
    /// The sender has no direct path to the node that a payload was meant for.
    CannotRelay = 20,
}

impl TryFrom<u8> for Content {
    type Error = Malformed;

    #[inline]
    fn try_from(code: u8) -> Result<Self, Malformed> {
        match code {
            0 => Ok(Self::Frame),
            1 => Ok(Self::Segment),
            16 => Ok(Self::Probe),
            17 => Ok(Self::ProbeReply),
            18 => Ok(Self::RelayThis),
            19 => Ok(Self::Relayed),
            20 => Ok(Self::CannotRelay),
            _ => Err(Malformed::Content(code)),
        }
    }
}

/// Properties of a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Flags(u8);

impl Flags {
    pub const NONE: Self = Self(0);

    /// The frame's L4 checksum field holds the sum of the pseudo-header only.
    pub const PARTIAL_CHECKSUM: Self = Self(1);

    /// The last segment of its super-frame.
    pub const LAST: Self = Self(2);

    const KNOWN: u8 = Self::PARTIAL_CHECKSUM.0 | Self::LAST.0;

    #[must_use]
    #[inline]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is set.
    #[inline]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Why bytes are no packet of this format.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Malformed {
    #[error("{len} bytes are too few for a sealed packet")]
    Short { len: usize },
    #[error("format version {0} is not known here: update this node")]
    Version(u8),
    #[error("cipher suite {0} is not known here")]
    Suite(u8),
    #[error("there is no lane {0}")]
    Lane(u8),
    #[error("content {0} is not known here: update this node")]
    Content(u8),
    #[error("flags {flags:#04x} and reserved byte {reserved:#04x} are not known here")]
    Reserved { flags: u8, reserved: u8 },
    #[error("the counter is beyond what any sender may reach")]
    Counter,
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::CONTROL => f.write_str("control"),
            Self(number) => write!(f, "{number}"),
        }
    }
}

/// The low nibble of the first byte; also part of what a key is derived from.
pub(super) fn code(suite: Suite) -> u8 {
    match suite {
        Suite::Aes128Gcm => 1,
        Suite::Aes256Gcm => 2,
        Suite::Chacha20Poly1305 => 3,
    }
}

fn suite(code: u8) -> Option<Suite> {
    Suite::ALL.into_iter().find(|&suite| self::code(suite) == code)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_has_its_fields_where_the_document_says() {
        let header = Header {
            suite: Suite::Chacha20Poly1305,
            lane: Lane::CONTROL,
            epoch: 0x0102,
            tag: 0x0304_0506,
            counter: 0x0708_090a_0b0c_0d0e,
        };
        let mut packet = [0; OVERHEAD];
        header.encode(packet.first_chunk_mut().unwrap());
        assert_eq!(
            hex::encode(&packet[..HEADER]),
            "13ff020106050403 0e0d0c0b0a090807".replace(' ', "")
        );
        assert_eq!(Header::decode(&packet), Ok(header));
    }

    #[test]
    fn a_meta_has_its_fields_where_the_document_says() {
        let network = NetworkId::from(*b"\x01\x02\x03\x04............");
        let meta = Meta {
            content: Content::Segment,
            flags: Flags::PARTIAL_CHECKSUM.with(Flags::LAST),
            index: 44,
            network: Meta::network_of(network),
        };
        let mut opened = [0; META + 2];
        meta.encode(opened.first_chunk_mut().unwrap());
        assert_eq!(hex::encode(&opened[..META]), "01032c0001020304");
        assert_eq!(Meta::decode(&opened), Ok((meta, &[0, 0][..])));
    }

    #[test]
    fn what_is_not_known_is_refused_by_its_name() {
        let mut packet = [0; OVERHEAD];
        packet[0] = 0x11;
        assert_eq!(Header::decode(&packet[..39]), Err(Malformed::Short { len: 39 }));
        for (at, value, reason) in [
            (0, 0x21, Malformed::Version(2)),
            (0, 0x10, Malformed::Suite(0)),
            (0, 0x14, Malformed::Suite(4)),
            (1, 8, Malformed::Lane(8)),
            (1, 254, Malformed::Lane(254)),
        ] {
            let mut packet = packet;
            packet[at] = value;
            assert_eq!(Header::decode(&packet), Err(reason));
        }
        for (at, value, reason) in [
            (0, 2, Malformed::Content(2)),
            (1, 4, Malformed::Reserved { flags: 4, reserved: 0 }),
            (3, 1, Malformed::Reserved { flags: 0, reserved: 1 }),
        ] {
            let mut opened = [0; META];
            opened[at] = value;
            assert_eq!(Meta::decode(&opened), Err(reason));
        }
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(mut packet in prop::collection::vec(any::<u8>(), 0..64), known in any::<bool>()) {
            if let (Some(first), true) = (packet.first_mut(), known) {
                *first = 0x11;
            }
            if let Ok(header) = Header::decode(&packet) {
                let mut again = [0; HEADER];
                header.encode(&mut again);
                prop_assert_eq!(&packet[..HEADER], again);
            }
            if let Ok((meta, body)) = Meta::decode(&packet) {
                let mut again = [0; META];
                meta.encode(&mut again);
                prop_assert_eq!(&packet[..META], again);
                prop_assert_eq!(&packet[META..], body);
            }
        }
    }
}
