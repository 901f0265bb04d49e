//! Attributes of netfilter's netlink messages (`include/uapi/linux/netfilter/nfnetlink.h`).

/// A message, or a part of one, that is being written.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = (HEADER + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// A number, in network byte order as all of netfilter's.
    pub(crate) fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend(value.as_bytes());
        bytes.push(0);
        self.bytes(kind, &bytes);
    }

    pub(crate) fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend([0; HEADER]);
        write(self);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
    }
}

/// The attributes in `bytes`, as far as they are whole.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & KIND, value))
    })
}

/// The first attribute of a kind.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// The attribute that is at the end of a path of nests.
pub(crate) fn nested<'a>(bytes: &'a [u8], path: &[u16]) -> Option<&'a [u8]> {
    path.iter().try_fold(bytes, |bytes, kind| attribute(bytes, *kind))
}

pub(crate) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

pub(crate) fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

pub(crate) fn long(value: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(value.try_into().ok()?))
}

const HEADER: usize = 4;
/// `NLA_F_NESTED`, `NLA_TYPE_MASK` of `include/uapi/linux/netlink.h`.
const NESTED: u16 = 0x8000;
const KIND: u16 = 0x3fff;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_cut_off_is_not() {
        let mut writer = Writer::default();
        writer.text(1, "weft");
        writer.nest(2, |writer| {
            writer.number(1, 7);
            writer.bytes(9, &[1, 2, 3]);
        });
        writer.number(3, 8);
        let Writer(bytes) = writer;
        assert_eq!(text(attribute(&bytes, 1).unwrap()), "weft");
        assert_eq!(number(nested(&bytes, &[2, 1]).unwrap()), Some(7));
        assert_eq!(nested(&bytes, &[2, 9]), Some(&[1, 2, 3][..]));
        assert_eq!(attribute(&bytes, 3).and_then(number), Some(8));
        assert_eq!(nested(&bytes, &[3, 1]), None);
        for cut in 0..bytes.len() {
            assert_eq!(attribute(&bytes[..cut], 3), None);
        }
    }
}
