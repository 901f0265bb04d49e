use std::sync::Arc;

/// Records on their way straight from their writer. The receiver takes them only from the writer
/// itself, as the carrier has authenticated it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Push {
    /// Asks for a receipt of this number; zero asks for none.
    pub(crate) receipt: u64,
    /// Keys and encoded values.
    pub(crate) records: Vec<(String, Arc<str>)>,
}

impl Push {
    /// Distributes records over as few pushes as fit their size limit. There is at least one.
    pub(crate) fn split(records: impl IntoIterator<Item = (String, Arc<str>)>) -> Vec<Self> {
        let mut pushes = vec![Self::default()];
        let mut length = 0;
        for (key, value) in records {
            length += RECORD_OVERHEAD + key.len() + value.len();
            if length > SPLIT_BYTES {
                length = RECORD_OVERHEAD + key.len() + value.len();
                pushes.push(Self::default());
            }
            let last = pushes.last_mut().expect("there is at least one");
            last.records.push((key, value));
        }
        pushes
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = vec![FORMAT];
        body.extend(self.receipt.to_be_bytes());
        for (key, value) in &self.records {
            body.extend(length_of(key).to_be_bytes());
            body.extend(key.as_bytes());
            body.extend(length_of(value).to_be_bytes());
            body.extend(value.as_bytes());
        }
        body
    }

    /// Reads what [`Push::encode`] wrote.
    ///
    /// # Errors
    ///
    /// The format is not known, or the body ends early or is no text.
    pub(crate) fn decode(body: &[u8]) -> Result<Self, PushError> {
        let mut rest = body;
        match take(&mut rest)? {
            [FORMAT] => {}
            [format] => return Err(PushError::Format(format)),
        }
        let receipt = u64::from_be_bytes(take(&mut rest)?);
        let mut records = Vec::new();
        while !rest.is_empty() {
            let key = text(&mut rest)?.to_owned();
            records.push((key, text(&mut rest)?.into()));
        }
        Ok(Self { receipt, records })
    }
}

/// A push that no agent of this version sends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PushError {
    #[error("pushes of format {0} are not known: is the sender's version newer?")]
    Format(u8),
    #[error("the push ends early")]
    Short,
    #[error("a record is not UTF-8 text")]
    Text,
}

/// The longest body of a push, in bytes: one record of any size fits.
pub(crate) const MAX_PUSH_BYTES: usize = 512 * 1024;

fn length_of(text: &str) -> u32 {
    u32::try_from(text.len()).expect("keys and values are far shorter than 4 GiB")
}

fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, PushError> {
    let length = u32::from_be_bytes(take(rest)?) as usize;
    let (text, after) = rest.split_at_checked(length).ok_or(PushError::Short)?;
    *rest = after;
    str::from_utf8(text).map_err(|_| PushError::Text)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], PushError> {
    let (bytes, after) = rest.split_first_chunk().ok_or(PushError::Short)?;
    *rest = after;
    Ok(*bytes)
}

const FORMAT: u8 = 1;
const RECORD_OVERHEAD: usize = 8;
const SPLIT_BYTES: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_push_reads_as_it_was_written(
            receipt in any::<u64>(),
            records in prop::collection::vec((".*", ".*"), 0..8),
        ) {
            let records = records.into_iter().map(|(key, value)| (key, value.into())).collect();
            let push = Push { receipt, records };
            prop_assert_eq!(Push::decode(&push.encode()).unwrap(), push);
        }

        #[test]
        fn no_bytes_break_the_push_parser(body in prop::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(push) = Push::decode(&body) {
                prop_assert_eq!(push.encode(), body);
            }
        }

        #[test]
        fn a_damaged_push_is_refused_or_reads_as_another(
            at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(),
        ) {
            let records = vec![("node".to_owned(), "{}".into()), ("a".to_owned(), "bc".into())];
            let mut body = Push { receipt: 3, records }.encode();
            let at = at.index(body.len());
            body[at] ^= 1 << bit;
            body.truncate(cut.index(body.len() + 1));
            if let Ok(push) = Push::decode(&body) {
                prop_assert_eq!(push.encode(), body);
            }
        }
    }

    #[test]
    fn every_part_of_a_split_fits_one_message() {
        let value: Arc<str> = "x".repeat(crate::MAX_VALUE_BYTES).into();
        let records = (0..40).map(|n| (format!("key{n}"), value.clone()));
        let pushes = Push::split(records);
        assert!(pushes.len() > 1);
        assert_eq!(pushes.iter().map(|push| push.records.len()).sum::<usize>(), 40);
        for push in pushes {
            assert!(push.encode().len() <= MAX_PUSH_BYTES);
        }
    }
}
