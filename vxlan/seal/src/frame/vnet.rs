use std::num::NonZeroU16;

/// Length of the header that a TAP with `IFF_VNET_HDR` puts before each frame, in bytes.
pub const VNET_LEN: usize = 10;

/// What the kernel says of a frame at a TAP, and wants to be told: `struct virtio_net_hdr` of
/// linux/virtio_net.h, in the byte order of the machine (the default of `TUNSETVNETLE`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct VnetHeader {
    pub checksum: Checksum,
    /// Set if the frame is a super-frame.
    pub gso: Option<Gso>,
    /// Length of all headers of a super-frame in bytes; a hint for the kernel, not to be trusted.
    pub header_len: u16,
}

/// How far the transport checksum of a frame is done.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Checksum {
    /// The frame has the checksums that its sender gave it; nobody has looked.
    #[default]
    Unchecked,
    /// The frame has its checksum, which was found right.
    Valid,
    /// The field at `start + offset` holds the sum of the pseudo-header only; the checksum covers
    /// all from `start` to the end. Both in bytes, `start` from the begin of the frame.
    Partial { start: u16, offset: u16 },
}

/// What kind of super-frame it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Gso {
    pub kind: GsoKind,
    /// Payload of each segment but the last, in bytes.
    pub size: NonZeroU16,
    /// The CWR flag is set and belongs to the first segment alone (RFC 3168 §6.1.2).
    pub ecn: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GsoKind {
    Tcp4,
    Tcp6,
    Udp,
}

impl VnetHeader {
    /// Reads the header at the begin of what was read from the TAP.
    ///
    /// # Errors
    /// Fewer than [`VNET_LEN`] bytes, or a super-frame of a kind that was never asked for.
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidVnet> {
        let Some(&[flags, kind, h0, h1, s0, s1, c0, c1, o0, o1]) = bytes.first_chunk::<VNET_LEN>()
        else {
            return Err(InvalidVnet::Short { len: bytes.len() });
        };
        let word = |a, b| u16::from_ne_bytes([a, b]);
        let checksum = match flags {
            flags if flags & NEEDS_CSUM != 0 => {
                Checksum::Partial { start: word(c0, c1), offset: word(o0, o1) }
            }
            flags if flags & DATA_VALID != 0 => Checksum::Valid,
            _ => Checksum::Unchecked,
        };
        let gso = match kind & !GSO_ECN {
            GSO_NONE => None,
            known => {
                let size = NonZeroU16::new(word(s0, s1)).ok_or(InvalidVnet::Size { kind })?;
                let ecn = kind & GSO_ECN != 0;
                let kind = match known {
                    GSO_TCPV4 => GsoKind::Tcp4,
                    GSO_TCPV6 => GsoKind::Tcp6,
                    GSO_UDP_L4 => GsoKind::Udp,
                    _ => return Err(InvalidVnet::Kind { kind }),
                };
                Some(Gso { kind, size, ecn })
            }
        };
        Ok(Self { checksum, gso, header_len: word(h0, h1) })
    }

    /// The header as the TAP takes it.
    pub fn to_bytes(self) -> [u8; VNET_LEN] {
        let (flags, start, offset) = match self.checksum {
            Checksum::Unchecked => (0, 0, 0),
            Checksum::Valid => (DATA_VALID, 0, 0),
            Checksum::Partial { start, offset } => (NEEDS_CSUM, start, offset),
        };
        let (kind, size) = self.gso.map_or((GSO_NONE, 0), |gso| {
            let kind = match gso.kind {
                GsoKind::Tcp4 => GSO_TCPV4,
                GsoKind::Tcp6 => GSO_TCPV6,
                GsoKind::Udp => GSO_UDP_L4,
            };
            (kind | if gso.ecn { GSO_ECN } else { 0 }, gso.size.get())
        });
        let mut bytes = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0];
        for (at, word) in [(2, self.header_len), (4, size), (6, start), (8, offset)] {
            bytes[at..at + 2].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// A TAP said something that its header cannot say.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidVnet {
    #[error("{len} bytes are too few for a vnet header of {VNET_LEN}")]
    Short { len: usize },
    #[error(
        "super-frame kind {kind:#04x} was not asked for: only TCP and UDP segmentation is offered to the kernel"
    )]
    Kind { kind: u8 },
    #[error("a super-frame of kind {kind:#04x} has a segment size of zero")]
    Size { kind: u8 },
}

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            partial in prop::option::of((any::<u16>(), any::<u16>())),
            gso in prop::option::of((0usize..3, 1u16.., any::<bool>())),
            header_len: u16,
        ) {
            let header = VnetHeader {
                checksum: partial.map_or(Checksum::Valid, |(start, offset)| Checksum::Partial { start, offset }),
                gso: gso.map(|(kind, size, ecn)| Gso {
                    kind: [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp][kind],
                    size: NonZeroU16::new(size).unwrap(),
                    ecn,
                }),
                header_len,
            };
            prop_assert_eq!(VnetHeader::parse(&header.to_bytes()), Ok(header));
        }
    }

    #[test]
    fn a_kind_that_was_not_asked_for_is_refused_by_name() {
        let ufo = [0, 3, 0, 0, 1, 1, 0, 0, 0, 0];
        assert_eq!(VnetHeader::parse(&ufo), Err(InvalidVnet::Kind { kind: 3 }));
        let sizeless = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(VnetHeader::parse(&sizeless), Err(InvalidVnet::Size { kind: 1 }));
        assert_eq!(VnetHeader::parse(&[0; 9]), Err(InvalidVnet::Short { len: 9 }));
    }
}
