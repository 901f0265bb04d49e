//! Looks through a message of chitchat 0.11.2 for what would stop chitchat.
//!
//! chitchat trusts its peers: a key whose first character is not ASCII (listener.rs), a version
//! next to the largest number or one that goes backwards (state.rs) panics at every receiver, and
//! the blocks inside a delta (serialize.rs) may unpack to any length. Peers are authenticated, but
//! one faulty node must not take the cluster down.

use std::net::{IpAddr, SocketAddr};

use weft_model::NodeId;

/// Checks one message in chitchat's own encoding, and returns whom it mentions.
///
/// # Errors
///
/// The message would stop chitchat, or is none of its messages.
pub(crate) fn check(message: &[u8]) -> Result<Vec<Mention>, Harmful> {
    let mut reader = Reader(message);
    reader.take::<3>()?;
    match reader.byte()? {
        SYN => reader.digest(),
        SYN_ACK => {
            let mut mentions = reader.digest()?;
            mentions.extend(reader.delta()?);
            Ok(mentions)
        }
        ACK => reader.delta(),
        BAD_CLUSTER => Ok(Vec::new()),
        _ => Err(Harmful::Malformed),
    }
}

/// A node of which a message tells, and where it says that it is reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Mention {
    pub(crate) node: NodeId,
    /// Which of the node's incarnations says so: the newest is right.
    pub(crate) incarnation: u64,
    pub(crate) address: SocketAddr,
}

/// Why a message is kept from chitchat.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Harmful {
    #[error("key {0:?} is not printable ASCII, over which chitchat panics")]
    Key(String),
    #[error("version {0} is out of range or goes backwards, over which chitchat panics")]
    Version(u64),
    #[error("the delta unpacks to more than {MAX_DELTA_BYTES} bytes")]
    TooLong,
    #[error("it is no message of chitchat 0.11")]
    Malformed,
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn digest(&mut self) -> Result<Vec<Mention>, Harmful> {
        let mut mentions = Vec::new();
        for _ in 0..self.short()? {
            mentions.extend(self.mention()?);
            self.version()?;
            self.version()?;
            self.version()?;
        }
        Ok(mentions)
    }

    fn delta(&mut self) -> Result<Vec<Mention>, Harmful> {
        let unpacked = self.blocks()?;
        let mut operations = Reader(&unpacked);
        let (mut mentions, mut highest) = (Vec::new(), 0);
        while !operations.0.is_empty() {
            match operations.byte()? {
                NODE => {
                    mentions.extend(operations.mention()?);
                    operations.version()?;
                    operations.version()?;
                    highest = 0;
                }
                KEY_VALUE => {
                    let key = operations.text()?;
                    if key.is_empty() || !key.iter().all(u8::is_ascii_graphic) {
                        return Err(Harmful::Key(String::from_utf8_lossy(key).into_owned()));
                    }
                    operations.text()?;
                    highest = operations.version()?.max(highest);
                    operations.byte()?;
                }
                SET_MAX_VERSION => {
                    let version = operations.version()?;
                    if version < highest {
                        return Err(Harmful::Version(version));
                    }
                    highest = version;
                }
                _ => return Err(Harmful::Malformed),
            }
        }
        Ok(mentions)
    }

    fn blocks(&mut self) -> Result<Vec<u8>, Harmful> {
        let mut unpacked = Vec::new();
        loop {
            let compressed = match self.byte()? {
                END => return Ok(unpacked),
                COMPRESSED => true,
                PLAIN => false,
                _ => return Err(Harmful::Malformed),
            };
            let block = self.text()?;
            if compressed {
                let block = zstd::bulk::decompress(block, usize::from(u16::MAX));
                unpacked.extend(block.map_err(|_| Harmful::Malformed)?);
            } else {
                unpacked.extend_from_slice(block);
            }
            if unpacked.len() > MAX_DELTA_BYTES {
                return Err(Harmful::TooLong);
            }
        }
    }

    /// Whoever is not a node of ours is chitchat's business.
    fn mention(&mut self) -> Result<Option<Mention>, Harmful> {
        let name = self.text()?;
        let incarnation = u64::from_le_bytes(self.take()?);
        let ip = match self.byte()? {
            4 => IpAddr::from(self.take::<4>()?),
            6 => IpAddr::from(self.take::<16>()?),
            _ => return Err(Harmful::Malformed),
        };
        let address = SocketAddr::new(ip, self.short()?);
        let node = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
        Ok(node.map(|node| Mention { node, incarnation, address }))
    }

    fn version(&mut self) -> Result<u64, Harmful> {
        match u64::from_le_bytes(self.take()?) {
            version if version < MAX_VERSION => Ok(version),
            version => Err(Harmful::Version(version)),
        }
    }

    fn text(&mut self) -> Result<&'a [u8], Harmful> {
        let length = usize::from(self.short()?);
        let (text, rest) = self.0.split_at_checked(length).ok_or(Harmful::Malformed)?;
        self.0 = rest;
        Ok(text)
    }

    fn short(&mut self) -> Result<u16, Harmful> {
        self.take().map(u16::from_le_bytes)
    }

    fn byte(&mut self) -> Result<u8, Harmful> {
        self.take().map(|[byte]| byte)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Harmful> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Harmful::Malformed)?;
        self.0 = rest;
        Ok(*bytes)
    }
}

/// Far above what a node reaches by counting, and far enough from where counting overflows.
const MAX_VERSION: u64 = 1 << 62;
const MAX_DELTA_BYTES: usize = 16 << 20;

// Codes of message.rs, serialize.rs and delta.rs.
const SYN: u8 = 0;
const SYN_ACK: u8 = 1;
const ACK: u8 = 2;
const BAD_CLUSTER: u8 = 3;
const END: u8 = 0;
const COMPRESSED: u8 = 1;
const PLAIN: u8 = 2;
const NODE: u8 = 0;
const KEY_VALUE: u8 = 1;
const SET_MAX_VERSION: u8 = 2;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_break_the_guard(message in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = check(&message);
        }

        #[test]
        fn no_delta_breaks_the_guard(operations in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = check(&ack(&[&operations]));
        }

        #[test]
        fn whatever_chitchat_cannot_read_it_is_never_shown_unchecked(
            key in ".{0,4}", versions in prop::collection::vec(any::<u64>(), 0..4), max in any::<u64>(),
        ) {
            let mut operations = node();
            for version in &versions {
                operations.extend(key_value(&key, *version));
            }
            operations.extend(set_max(max));
            let harmless = !key.is_empty()
                && key.bytes().all(|b| b.is_ascii_graphic())
                || versions.is_empty();
            if check(&ack(&[&operations])).is_ok() {
                prop_assert!(harmless);
                prop_assert!(versions.iter().all(|version| *version <= max && max < MAX_VERSION));
            }
        }
    }

    #[test]
    fn an_ordinary_delta_passes() {
        let operations = [node(), key_value("node", 1), key_value("ep/a", 2), set_max(2)].concat();
        check(&ack(&[&operations])).unwrap();
        check(&ack(&[&operations[..9], &operations[9..]])).unwrap();
    }

    #[test]
    fn digests_and_deltas_tell_who_is_where() {
        let operations = [node(), key_value("node", 1), set_max(1)].concat();
        assert_eq!(check(&ack(&[&operations])).unwrap(), []);

        let mention = |n: u8, address: &str| Mention {
            node: NodeId::from([n; 16]),
            incarnation: 7,
            address: address.parse().unwrap(),
        };
        let (one, two) = (mention(1, "192.0.2.1:6790"), mention(2, "[2001:db8::2]:6791"));
        let operation = |who| [&[NODE], id(who).as_slice(), &[0; 16]].concat();
        let delta = ack(&[&[operation(&one), operation(&two)].concat()]);
        assert_eq!(check(&delta).unwrap(), [one, two]);

        let entry = |who| [id(who).as_slice(), &[0; 24]].concat();
        let digest = [&[2, 0], entry(&one).as_slice(), &entry(&two)].concat();
        let syn = [&[0, 0, 0, SYN], digest.as_slice()].concat();
        assert_eq!(check(&syn).unwrap(), [one, two]);
        let both = [&[0, 0, 0, SYN_ACK], digest.as_slice(), &delta[4..]].concat();
        assert_eq!(check(&both).unwrap(), [one, two, one, two]);
    }

    #[test]
    fn a_poisonous_key_is_refused() {
        let operations = [node(), key_value("é", 1)].concat();
        assert!(matches!(check(&ack(&[&operations])), Err(Harmful::Key(_))));
    }

    #[test]
    fn a_version_that_would_overflow_or_step_back_is_refused() {
        for operations in [
            [node(), key_value("a", u64::MAX)].concat(),
            [node(), key_value("a", 9), set_max(8)].concat(),
        ] {
            assert!(matches!(check(&ack(&[&operations])), Err(Harmful::Version(_))));
        }
    }

    #[test]
    fn blocks_that_unpack_without_end_are_refused() {
        let zeros = zstd::bulk::compress(&[0; 65_000], 1).unwrap();
        let mut message = vec![0, 0, 0, ACK];
        for _ in 0..1000 {
            message.push(COMPRESSED);
            message.extend(u16::try_from(zeros.len()).unwrap().to_le_bytes());
            message.extend(&zeros);
        }
        message.push(END);
        assert!(message.len() < 128 << 10);
        assert!(matches!(check(&message), Err(Harmful::TooLong)));
    }

    fn ack(blocks: &[&[u8]]) -> Vec<u8> {
        let mut message = vec![0, 0, 0, ACK];
        for block in blocks {
            message.push(PLAIN);
            message.extend(u16::try_from(block.len()).unwrap().to_le_bytes());
            message.extend(*block);
        }
        message.push(END);
        message
    }

    fn node() -> Vec<u8> {
        let mut operation = vec![NODE, 1, 0, b'x'];
        operation.extend([0; 8]);
        operation.extend([4, 10, 0, 0, 1, 0, 0]);
        operation.extend([0; 16]);
        operation
    }

    fn id(mention: &Mention) -> Vec<u8> {
        let name = mention.node.to_string();
        let mut id = u16::try_from(name.len()).unwrap().to_le_bytes().to_vec();
        id.extend(name.as_bytes());
        id.extend(mention.incarnation.to_le_bytes());
        match mention.address.ip() {
            IpAddr::V4(ip) => id.extend([&[4], ip.octets().as_slice()].concat()),
            IpAddr::V6(ip) => id.extend([&[6], ip.octets().as_slice()].concat()),
        }
        id.extend(mention.address.port().to_le_bytes());
        id
    }

    fn key_value(key: &str, version: u64) -> Vec<u8> {
        let mut operation = vec![KEY_VALUE];
        operation.extend(u16::try_from(key.len()).unwrap().to_le_bytes());
        operation.extend(key.as_bytes());
        operation.extend([0, 0]);
        operation.extend(version.to_le_bytes());
        operation.push(0);
        operation
    }

    fn set_max(version: u64) -> Vec<u8> {
        let mut operation = vec![SET_MAX_VERSION];
        operation.extend(version.to_le_bytes());
        operation
    }
}
