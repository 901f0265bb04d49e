use bytes::Bytes;
use zstd::zstd_safe;

/// What a message between agents holds, told by its first byte.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    /// A message of chitchat's, compressed.
    Gossip,
    /// Records straight from their writer, compressed.
    Push,
    /// The receipt of a push.
    Receipt,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Gossip, Self::Push, Self::Receipt];

    fn code(self) -> u8 {
        match self {
            Self::Gossip => 1,
            Self::Push => 2,
            Self::Receipt => 3,
        }
    }
}

/// Puts `body` into a message.
pub(crate) fn seal(kind: Kind, body: &[u8]) -> Bytes {
    let packed = compress(body);
    let mut message = Vec::with_capacity(1 + packed.len());
    message.push(kind.code());
    message.extend_from_slice(&packed);
    message.into()
}

/// Tells the kind of a message and returns its packed body.
///
/// # Errors
///
/// The kind is not known.
pub(crate) fn kind_of(message: &Bytes) -> Result<(Kind, Bytes), FrameError> {
    let code = message.first().copied().ok_or(FrameError::Empty)?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.code() == code);
    Ok((kind.ok_or(FrameError::Kind(code))?, message.slice(1..)))
}

pub(crate) fn compress(body: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(body, LEVEL).expect("a buffer in memory takes what is compressed into it")
}

/// Unpacks one zstd frame, but never to more than `limit` bytes: the frame's own statement of its
/// length is checked before anything is allocated, and holds during decompression.
///
/// # Errors
///
/// It is no zstd frame, states no length, or states a longer one.
pub(crate) fn decompress(packed: &[u8], limit: usize) -> Result<Vec<u8>, FrameError> {
    let stated = zstd_safe::get_frame_content_size(packed)
        .map_err(|_| FrameError::Corrupt)?
        .ok_or(FrameError::Corrupt)?;
    let length = usize::try_from(stated).unwrap_or(usize::MAX);
    if length > limit {
        return Err(FrameError::TooLong { stated, limit });
    }
    zstd::bulk::decompress(packed, length).map_err(|_| FrameError::Corrupt)
}

/// A message that no agent of this version sends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("the message is empty")]
    Empty,
    #[error("messages of kind {0} are not known: is the sender's version newer?")]
    Kind(u8),
    #[error("the body is no zstd frame of known length")]
    Corrupt,
    #[error("the body would take {stated} bytes, more than {limit}")]
    TooLong { stated: u64, limit: usize },
}

/// zstd's fastest regular level: messages are small and many.
const LEVEL: i32 = 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_sealed_body_comes_out_unchanged(body in prop::collection::vec(any::<u8>(), 0..4096)) {
            for kind in Kind::ALL {
                let (read, packed) = kind_of(&seal(kind, &body)).unwrap();
                prop_assert_eq!(read, kind);
                prop_assert_eq!(&decompress(&packed, 4096).unwrap(), &body);
            }
        }

        #[test]
        fn no_bytes_break_the_frame_parser(message in prop::collection::vec(any::<u8>(), 0..512)) {
            if let Ok((_, packed)) = kind_of(&message.into())
                && let Ok(body) = decompress(&packed, 1 << 16)
            {
                prop_assert!(body.len() <= 1 << 16);
            }
        }

        #[test]
        fn a_damaged_frame_never_unpacks_beyond_the_limit(
            at in 0usize..40, bit in 0u8..8, length in 0usize..9000,
        ) {
            let mut packed = compress(&vec![7; length]);
            let at = at % packed.len();
            packed[at] ^= 1 << bit;
            if let Ok(body) = decompress(&packed, 10_000) {
                prop_assert!(body.len() <= 10_000);
            }
        }
    }

    #[test]
    fn a_decompression_bomb_is_refused_before_it_is_unpacked() {
        let bomb = compress(&vec![0; 64 << 20]);
        assert!(bomb.len() < 16 << 10, "{}", bomb.len());
        let refused = decompress(&bomb, 1 << 20);
        assert!(matches!(refused, Err(FrameError::TooLong { stated: 0x400_0000, .. })));
    }

    #[test]
    fn a_frame_that_hides_its_length_is_refused() {
        let mut stream = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        std::io::Write::write_all(&mut stream, &[0; 4096]).unwrap();
        let packed = stream.finish().unwrap();
        assert!(matches!(decompress(&packed, 1 << 20), Err(FrameError::Corrupt)));
    }
}
