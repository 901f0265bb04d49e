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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::reference::{Flow, ones},
        *,
    };

    proptest! {
        #[test]
        fn fragments_are_the_datagram_again(
            len in 1usize..4000, mtu in 68usize..1500, options in 0usize..3, tcp: bool, partial: bool,
        ) {
            let flow = Flow { tcp, options: vec![1; options * 4], dont_fragment: false, ..Flow::udp4() };
            let payload: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let fragments = cut(&mut flow.packet(&payload, partial), partial, mtu).unwrap();
            for fragment in &fragments {
                prop_assert!(fragment.len() <= 14 + mtu);
                prop_assert_eq!(ones(&fragment[14..34 + options * 4]), 0xffff);
            }
            prop_assert_eq!(assemble(&fragments), flow.packet(&payload, false)[34 + options * 4..].to_vec());
        }
    }

    #[test]
    fn a_fragment_is_cut_to_smaller_ones_in_its_place() {
        let mut middle = Flow { dont_fragment: false, ..Flow::udp4() }.packet(&[1; 100], false);
        put(&mut middle, 20, MORE_FRAGMENTS | 50);
        let positions: Vec<_> = cut(&mut middle, false, 68)
            .unwrap()
            .iter()
            .map(|fragment| word(fragment, 20))
            .collect();
        assert_eq!(positions, [0x2000 | 50, 0x2000 | 56, 0x2000 | 62]);
    }

    #[test]
    fn only_the_first_has_options_that_are_not_copied() {
        let options = vec![7, 3, 4, 0x83, 3, 4, 1, 0];
        let flow = Flow { dont_fragment: false, options: options.clone(), ..Flow::udp4() };
        let fragments = cut(&mut flow.packet(&[1; 100], true), true, 68).unwrap();
        assert_eq!(fragments[0][34..42], options);
        for fragment in &fragments[1..] {
            assert_eq!(fragment[34..42], [1, 1, 1, 0x83, 3, 4, 1, 0]);
        }
    }

    #[test]
    fn what_must_stay_whole_is_refused() {
        let fixed = Flow::udp4();
        let tagged = Flow { tags: vec![[0x81, 0, 0, 1]], dont_fragment: false, ..Flow::udp4() };
        let v6 = Flow { v6: true, ..Flow::udp4() };
        for flow in [fixed, tagged, v6] {
            let refused = cut(&mut flow.packet(&[1; 100], true), true, 68);
            assert_eq!(refused, Err(Malformed::Unusual));
        }
        let free = Flow { dont_fragment: false, ..Flow::udp4() };
        assert_eq!(cut(&mut free.packet(&[1], false), false, 27), Err(Malformed::Unusual));
    }

    fn cut(frame: &mut [u8], partial: bool, mtu: usize) -> Result<Vec<Vec<u8>>, Malformed> {
        let headers = Headers::parse(frame).unwrap();
        let fragments = Fragments::new(frame, &headers, partial, mtu)?;
        let write = |index| {
            let mut room = vec![0; fragments.len(index)];
            assert_eq!(fragments.write(index, &mut room), room.len());
            room
        };
        Ok((0..fragments.count()).map(write).collect())
    }

    /// Puts the payload together by offsets, as a receiver does.
    fn assemble(fragments: &[Vec<u8>]) -> Vec<u8> {
        let mut whole = Vec::new();
        for (index, fragment) in fragments.iter().enumerate() {
            let header_len = usize::from(fragment[14] & 15) * 4;
            let position = word(fragment, 20);
            assert_eq!(usize::from(position & OFFSET_MASK) * 8, whole.len());
            assert_eq!(position & MORE_FRAGMENTS != 0, index + 1 < fragments.len());
            assert_eq!(usize::from(word(fragment, 16)), fragment.len() - 14);
            whole.extend(&fragment[14 + header_len..]);
        }
        whole
    }
}
