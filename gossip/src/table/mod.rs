//! The tables: typed keys, records, and the one codec between them and the wire.

mod clock;
mod envelope;
mod key;
mod record;

pub(crate) use clock::WriteClock;
pub(crate) use envelope::{Content, decode, encode, peek_ver, withdrawal};
pub use envelope::{EncodeError, MAX_RECORD_BYTES, MAX_VALUE_BYTES};
pub use key::{Bucket, Key, UnknownKey};
pub use record::Record;
