use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD as BASE64};
use serde::{Deserialize, Serialize, de::DeserializeOwned, de::IgnoredAny};

use super::{Key, Record, record::ReadRecord};
use crate::frame;

/// The longest record, in bytes of JSON.
pub const MAX_RECORD_BYTES: usize = 256 * 1024;

/// The longest encoded value, in bytes.
///
/// chitchat 0.11.2 sends a value only if it fits one of its messages whole (65,507 bytes); one that
/// does not is never sent, and neither is any later write of its node. What remains of a message
/// after the rest of an answer is the limit here. Where a large cluster's digest takes the rest,
/// the value still travels in the third message of an exchange, which has no digest.
pub const MAX_VALUE_BYTES: usize = 60 * 1024;

/// Encodes `record` as this writer's write number `ver`.
///
/// # Errors
///
/// The record is of another kind or network than `key`, or too long.
pub(crate) fn encode(key: Key, record: &Record, ver: u64) -> Result<String, EncodeError> {
    if !record.fits(key) {
        return Err(EncodeError::Mismatch { key });
    }
    let too_long = |bytes, limit| EncodeError::TooLong { key, bytes, limit };
    let json = serde_json::to_string(record).expect("records have no keys but strings");
    if json.len() > MAX_RECORD_BYTES {
        return Err(too_long(json.len(), MAX_RECORD_BYTES));
    }
    let value = if json.len() < COMPRESS_FROM_BYTES {
        // Spliced, as `Envelope` prints it, rather than parsed and printed again.
        format!(r#"{{"v":{FORMAT},"ver":{ver},"record":{json}}}"#)
    } else {
        let z = BASE64.encode(frame::compress(json.as_bytes()));
        print(&Envelope { v: FORMAT, ver, z: Some(z) })
    };
    // As if `ver` had all its digits: a value that fits once fits under any number.
    let digits = ver.checked_ilog10().unwrap_or(0) as usize + 1;
    let bytes = value.len() - digits + MAX_VER_DIGITS;
    if bytes > MAX_VALUE_BYTES {
        return Err(too_long(bytes, MAX_VALUE_BYTES));
    }
    Ok(value)
}

/// Encodes that the writer's record is gone, as its write number `ver`.
pub(crate) fn withdrawal(ver: u64) -> String {
    print(&Envelope { v: FORMAT, ver, z: None })
}

/// Reads the write number alone. Works for values of newer formats too; zero for what is no
/// envelope at all.
pub(crate) fn peek_ver(value: &str) -> u64 {
    serde_json::from_str::<Header>(value).map_or(0, |header| header.ver)
}

/// Reads the value of `key`. Fields that this version does not know are ignored; the signature
/// (`sig`) is one of them.
pub(crate) fn decode(key: Key, value: &str) -> Content {
    match Record::read(key, Value(value)) {
        Ok(None) => Content::Withdrawn,
        Ok(Some(record)) if record.fits(key) => Content::Record(Box::new(record)),
        Ok(Some(_)) | Err(Undecodable) => Content::Undecodable,
    }
}

/// What a value says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Content {
    Record(Box<Record>),
    Withdrawn,
    /// Of a newer format, or broken.
    Undecodable,
    /// Under a key that this version does not know.
    Unknown,
}

/// A record that cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("the record for key {key} is of another kind or network: give the one that key names")]
    Mismatch { key: Key },
    #[error(
        "the record for key {key} takes {bytes} bytes, more than {limit}: split it or remove \
         labels, aliases or entries"
    )]
    TooLong { key: Key, bytes: usize, limit: usize },
}

#[derive(Serialize)]
struct Envelope {
    v: u32,
    ver: u64,
    /// The record's JSON, zstd, base64; instead of `record` where that is shorter.
    #[serde(skip_serializing_if = "Option::is_none")]
    z: Option<String>,
}

#[derive(Deserialize)]
struct Header {
    ver: u64,
}

#[derive(Deserialize)]
#[serde(bound = "T: DeserializeOwned")]
struct Body<T> {
    v: u32,
    #[serde(rename = "ver")]
    _ver: u64,
    #[serde(default)]
    record: Option<T>,
    #[serde(default)]
    z: Option<String>,
    #[serde(default, rename = "sig")]
    _sig: Option<IgnoredAny>,
}

struct Value<'a>(&'a str);

struct Undecodable;

impl ReadRecord for Value<'_> {
    type Error = Undecodable;

    fn read<T: DeserializeOwned>(self) -> Result<Option<T>, Undecodable> {
        let body: Body<T> = serde_json::from_str(self.0).map_err(|_| Undecodable)?;
        match body {
            Body { v: FORMAT, record, z: None, .. } => Ok(record),
            Body { v: FORMAT, record: None, z: Some(z), .. } => {
                let packed = BASE64.decode(z).map_err(|_| Undecodable)?;
                let json = frame::decompress(&packed, MAX_RECORD_BYTES).map_err(|_| Undecodable)?;
                serde_json::from_slice(&json).map(Some).map_err(|_| Undecodable)
            }
            Body { .. } => Err(Undecodable),
        }
    }
}

fn print(envelope: &Envelope) -> String {
    serde_json::to_string(envelope).expect("an envelope has no keys but strings")
}

const FORMAT: u32 = 1;
const MAX_VER_DIGITS: usize = 20;
const COMPRESS_FROM_BYTES: usize = 1024;

#[cfg(test)]
mod tests;
