use std::ops::Range;

use super::{
    headers::{Headers, Malformed},
    slot::{Built, Candidate, MAX_HEADERS, Piece, Slot, partial, write_pseudo_header},
    split::Part,
    vnet::{VNET_LEN, VnetHeader},
};

/// Which super-frames the TAP takes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Accepts {
    pub tcp4: bool,
    pub tcp6: bool,
    pub udp: bool,
}

/// An opened packet.
#[derive(Clone, Debug)]
pub struct Arrival<K> {
    /// Tells apart what must never be put together and where the frame goes to: peer and network.
    pub key: K,
    /// The counter that it was sealed under.
    pub counter: u64,
    pub part: Part,
    /// Where its frame lies in the arena.
    pub frame: Range<usize>,
}

/// Puts opened packets together to super-frames again, as the kernel's GRO does.
///
/// It holds no packet but only where each lies in the *arena*, the one buffer that a batch was
/// received into and opened in place in; so the arena has to stay as it is from a [`Self::push`] to
/// the next [`Self::flush`], where it may be written to elsewhere meanwhile. Within a flow the order
/// of arrival is kept. Nothing that the wire says is believed: two packets come together only if
/// their headers show that one continues the other.
///
/// The value is made once per receiving thread (it has about 6 KiB) and allocates nothing.
///
/// ```
/// use weft_seal::frame::{Accepts, Arrival, Coalescer, Headers, Malformed, Part};
///
/// # fn receive(arena: &[u8], opened: Vec<(u64, Part, std::ops::Range<usize>)>) -> Result<(), Malformed> {
/// let mut coalescer = Coalescer::new(Accepts { tcp4: true, tcp6: true, udp: true });
/// let mut write = |built: weft_seal::frame::Built<'_, (u16, u16)>| {
///     built.with_slices(|slices| { /* writev to the TAP of built.key */ });
/// };
/// for (counter, part, frame) in opened {
///     let headers = Headers::parse(&arena[frame.clone()])?;
///     let arrival = Arrival { key: (3, 7), counter, part, frame };
///     coalescer.push(arena, arrival, &headers, &mut write)?;
/// }
/// coalescer.flush(arena, &mut write);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Coalescer<K> {
    accepts: Accepts,
    slots: [Slot<K>; SLOTS],
    clock: u64,
}

impl<K: Copy + Eq> Coalescer<K> {
    pub fn new(accepts: Accepts) -> Self {
        Self { accepts, slots: [const { Slot::empty() }; SLOTS], clock: 0 }
    }

    /// Changes which super-frames are made from now on: when the TAP refused a kind.
    pub fn accept(&mut self, accepts: Accepts) {
        self.accepts = accepts;
    }

    pub fn accepts(&self) -> Accepts {
        self.accepts
    }

    /// Takes one packet, whose `headers` were parsed from its frame, and calls `emit` with what
    /// thereby is complete: none, one or two frames.
    ///
    /// # Errors
    /// The packet claims to be what its headers are not; it is not taken.
    ///
    /// # Panics
    /// The frame lies outside of the arena, or `headers` are of another frame.
    pub fn push(
        &mut self,
        arena: &[u8],
        arrival: Arrival<K>,
        headers: &Headers,
        mut emit: impl FnMut(Built<'_, K>),
    ) -> Result<(), Malformed> {
        let Arrival { key, counter, part, frame } = arrival;
        let start = frame.start;
        let bytes = &arena[frame];
        assert_eq!(bytes.len(), headers.len, "headers of another frame");
        if bytes.len() > MAX_FRAME {
            return Err(Malformed::TooLong { len: bytes.len(), most: MAX_FRAME });
        }
        let Some(l4) = headers.l4() else {
            if part.partial || part.segment {
                return Err(Malformed::Unusual);
            }
            emit(Built {
                key,
                vnet: VnetHeader::default(),
                packets: 1,
                head: &VnetHeader::default().to_bytes(),
                arena,
                pieces: &[Piece::from(start..start + bytes.len())],
            });
            return Ok(());
        };

        let candidate = Candidate { key, counter, part, l4, frame: bytes, start };
        let fit = self.wants(&candidate);
        let slot = self.slots.iter_mut().find(|slot| slot.is_flow(key, &l4, bytes));
        if let Some(slot) = slot {
            let taken = fit && slot.append(&candidate);
            if (!taken || slot.is_complete())
                && let Some(built) = slot.take(arena)
            {
                emit(built);
            }
            if taken {
                return Ok(());
            }
        }
        if fit && candidate.may_begin() && !part.last {
            self.begin(arena, &candidate, &mut emit);
        } else {
            emit_alone(arena, &candidate, emit);
        }
        Ok(())
    }

    /// Calls `emit` with all that is not complete yet: at the end of each batch, before the arena
    /// is written to again.
    pub fn flush(&mut self, arena: &[u8], mut emit: impl FnMut(Built<'_, K>)) {
        while let Some(slot) = self.oldest() {
            if let Some(built) = slot.take(arena) {
                emit(built);
            }
        }
    }

    /// Whether the packet is one that could be put together with others.
    fn wants(&self, candidate: &Candidate<'_, K>) -> bool {
        let accepted = match (candidate.l4.tcp, candidate.l4.v6) {
            (None, _) => self.accepts.udp,
            (Some(_), false) => self.accepts.tcp4,
            (Some(_), true) => self.accepts.tcp6,
        };
        accepted && candidate.payload_len() > 0 && candidate.checksums_hold()
    }

    fn begin(
        &mut self,
        arena: &[u8],
        first: &Candidate<'_, K>,
        emit: &mut impl FnMut(Built<'_, K>),
    ) {
        if self.slots.iter().all(|slot| !slot.is_free())
            && let Some(built) = self.oldest().and_then(|slot| slot.take(arena))
        {
            emit(built);
        }
        self.clock += 1;
        let free = self.slots.iter_mut().find(|slot| slot.is_free());
        free.expect("one was freed").begin(first, self.clock);
    }

    fn oldest(&mut self) -> Option<&mut Slot<K>> {
        self.slots.iter_mut().filter(|slot| !slot.is_free()).min_by_key(|slot| slot.begun)
    }
}

/// Emits a packet as a frame of its own.
fn emit_alone<K: Copy>(
    arena: &[u8],
    packet: &Candidate<'_, K>,
    mut emit: impl FnMut(Built<'_, K>),
) {
    let Candidate { key, part, l4, frame, start, .. } = *packet;
    let mut head = [0; VNET_LEN + MAX_HEADERS];
    let (vnet, headers) = if part.partial {
        head[VNET_LEN..][..l4.payload].copy_from_slice(&frame[..l4.payload]);
        write_pseudo_header(&mut head[VNET_LEN..][..l4.payload], &l4, packet.payload_len());
        (partial(&l4, None), l4.payload)
    } else {
        (VnetHeader::default(), 0)
    };
    head[..VNET_LEN].copy_from_slice(&vnet.to_bytes());
    emit(Built {
        key,
        vnet,
        packets: 1,
        head: &head[..VNET_LEN + headers],
        arena,
        pieces: &[Piece::from(start + headers..start + frame.len())],
    });
}

/// How many flows are put together at a time.
const SLOTS: usize = 4;
/// Ethernet with two tags, and the longest packet of IPv6.
const MAX_FRAME: usize = 14 + 8 + 40 + 65_535;
