use bytes::Bytes;

use crate::{
    frame::{self, FrameError, Kind},
    push::{MAX_PUSH_BYTES, Push, PushError},
};

/// A message from another agent.
#[derive(Debug)]
pub(crate) enum Message {
    /// For chitchat, still packed.
    Gossip(Bytes),
    Push(Push),
    /// The receipt of a push with this number.
    Receipt(u64),
}

impl Message {
    /// Reads what was received.
    ///
    /// # Errors
    ///
    /// No agent of this version sends that.
    pub(crate) fn read(received: &Bytes) -> Result<Self, MessageError> {
        let (kind, packed) = frame::kind_of(received)?;
        Ok(match kind {
            Kind::Gossip => Self::Gossip(packed),
            Kind::Push => Self::Push(Push::decode(&frame::decompress(&packed, MAX_PUSH_BYTES)?)?),
            Kind::Receipt => {
                let number = frame::decompress(&packed, size_of::<u64>())?;
                Self::Receipt(u64::from_be_bytes(
                    number.try_into().map_err(|_| MessageError::Receipt)?,
                ))
            }
        })
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Gossip(_) => Kind::Gossip,
            Self::Push(_) => Kind::Push,
            Self::Receipt(_) => Kind::Receipt,
        }
    }
}

/// A message that is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MessageError {
    #[error("the sender has this node's own identity")]
    Echo,
    #[error("the receipt has no number")]
    Receipt,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Push(#[from] PushError),
}
