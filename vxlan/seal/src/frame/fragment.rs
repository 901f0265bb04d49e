use super::{
    checksum::{complete, sum},
    headers::{
        DONT_FRAGMENT, ETHERNET_LEN, Headers, IPV4_LEN, MORE_FRAGMENTS, Malformed, Network,
        OFFSET_MASK,
    },
    split::{put, word},
};

/// A plain IPv4 frame as fragments (RFC 791 §3.2), where the sender allows it and the path to the
/// peer takes no more: what a router does, and this is one.
///
/// ```
/// use weft_seal::frame::{Fragments, Headers, Malformed};
///
/// # fn seal(frame: &mut [u8], partial: bool, mtu: usize, room: &mut [u8]) -> Result<(), Malformed> {
/// let fragments = Fragments::new(frame, &Headers::parse(frame)?, partial, mtu)?;
/// for index in 0..fragments.count() {
///     let len = fragments.write(index, room);
///     // room[..len] is the frame to seal, with `Part::default()`.
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Fragments<'a> {
    frame: &'a [u8],
    /// Offset of what is cut.
    payload: usize,
    end: usize,
    /// Payload of each fragment but the last, a multiple of eight.
    size: usize,
    /// The field with flags and offset, as the frame has it.
    position: u16,
}

impl<'a> Fragments<'a> {
    /// Cuts `frame`, of which `headers` were parsed, to packets of at most `mtu` bytes. If its
    /// checksum is `partial`, it is completed in `frame` first, because no fragment has all that it
    /// covers.
    ///
    /// # Errors
    /// Not IPv4 without VLAN tags that may be fragmented, or `mtu` has no room for eight bytes.
    pub fn new(
        frame: &'a mut [u8],
        headers: &Headers,
        partial: bool,
        mtu: usize,
    ) -> Result<Self, Malformed> {
        debug_assert_eq!(frame.len(), headers.len, "headers of another frame");
        let ip = match headers.network {
            Network::Ip(ip) if ip.source.is_ipv4() && headers.tags == 0 => ip,
            _ => return Err(Malformed::Unusual),
        };
        let position = word(frame, ip.offset + 6);
        let size = mtu.saturating_sub(ip.payload - ip.offset) & !7;
        if position & DONT_FRAGMENT != 0 || size == 0 {
            return Err(Malformed::Unusual);
        }
        if partial {
            let l4 = headers.l4().ok_or(Malformed::Unusual)?;
            let checksum = complete(sum(&frame[l4.offset..]));
            put(frame, l4.offset + l4.checksum_offset(), checksum);
        }
        Ok(Self { frame, payload: ip.payload, end: ip.end, size, position })
    }

    /// How many fragments there are; at least one.
    pub fn count(&self) -> usize {
        (self.end - self.payload).div_ceil(self.size).max(1)
    }

    /// Length in bytes of the frame that [`Self::write`] makes of fragment `index`.
    ///
    /// # Panics
    /// There is no such fragment.
    pub fn len(&self, index: usize) -> usize {
        assert!(index < self.count(), "fragment {index} of {}", self.count());
        let start = self.payload + index * self.size;
        self.payload + self.size.min(self.end - start)
    }

    /// Never true: there always is a fragment.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Writes fragment `index` to the begin of `room` and gives its length.
    ///
    /// # Panics
    /// There is no such fragment, or `room` is shorter than [`Self::len`].
    pub fn write(&self, index: usize, room: &mut [u8]) -> usize {
        let len = self.len(index);
        let start = self.payload + index * self.size;
        let (headers, payload) = room[..len].split_at_mut(self.payload);
        headers.copy_from_slice(&self.frame[..self.payload]);
        payload.copy_from_slice(&self.frame[start..start + payload.len()]);

        if index > 0 {
            clear_uncopied_options(&mut headers[ETHERNET_LEN + IPV4_LEN..]);
        }
        let offset = (self.position & OFFSET_MASK) + (index * self.size / 8) as u16;
        let more =
            if index + 1 < self.count() { MORE_FRAGMENTS } else { self.position & MORE_FRAGMENTS };
        put(headers, ETHERNET_LEN + 2, (len - ETHERNET_LEN) as u16);
        put(headers, ETHERNET_LEN + 6, more | (offset & OFFSET_MASK));
        put(headers, ETHERNET_LEN + 10, 0);
        let checksum = !sum(&headers[ETHERNET_LEN..]);
        put(headers, ETHERNET_LEN + 10, checksum);
        len
    }
}

/// Overwrites the options that only the first fragment has (RFC 791 §3.1) with "no operation".
fn clear_uncopied_options(mut options: &mut [u8]) {
    while let [kind, rest @ ..] = options {
        let len = match (*kind, rest.first()) {
            (END, _) => return,
            (NO_OPERATION, _) => 1,
            (_, Some(&len)) if len >= 2 && usize::from(len) <= rest.len() + 1 => usize::from(len),
            // Not to be understood: left for the receiver to refuse.
            _ => return,
        };
        let (option, after) = options.split_at_mut(len);
        if option[0] & COPIED == 0 {
            option.fill(NO_OPERATION);
        }
        options = after;
    }
}

const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const COPIED: u8 = 0x80;
