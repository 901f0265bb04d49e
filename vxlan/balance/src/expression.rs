//! Expressions of nftables rules (`include/uapi/linux/netfilter/nf_tables.h`), in the forms that
//! `nft` writes and can print.

use weft_model::{Family, Protocol};

use crate::wire::Writer;

/// A register of 16 bytes, or one of 4 inside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Register(u32);

impl Register {
    const VERDICT: Self = Self(0);
    pub(crate) const ONE: Self = Self(1);
    pub(crate) const TWO: Self = Self(2);

    /// The one that begins `bytes` further.
    pub(crate) fn after(self, bytes: u32) -> Self {
        Self(FIRST_WORD + (self.0 - 1) * 4 + bytes / 4)
    }
}

/// The expressions of one rule.
#[derive(Debug, Default)]
pub(crate) struct Expressions(pub(crate) Writer);

impl Expressions {
    /// Goes on for packets of that family and protocol.
    pub(crate) fn only(&mut self, family: Family, protocol: Protocol) -> &mut Self {
        let nfproto = match family {
            Family::V4 => NFPROTO_IPV4,
            Family::V6 => NFPROTO_IPV6,
        };
        let l4proto = number_of(protocol);
        self.meta(META_NFPROTO, Register::ONE).equals(Register::ONE, &[nfproto]);
        self.meta(META_L4PROTO, Register::ONE).equals(Register::ONE, &[l4proto])
    }

    pub(crate) fn source_address(&mut self, family: Family, to: Register) -> &mut Self {
        let (offset, length) = match family {
            Family::V4 => (12, 4),
            Family::V6 => (8, 16),
        };
        self.payload(BASE_NETWORK, offset, length, to)
    }

    /// A number below `modulus` that depends on the `length` bytes in `from`.
    pub(crate) fn hash(
        &mut self,
        (from, length): (Register, u32),
        to: Register,
        modulus: u32,
        seed: u32,
    ) -> &mut Self {
        self.push("hash", |data| {
            data.number(1, from.0);
            data.number(2, to.0);
            data.number(3, length);
            data.number(4, modulus);
            data.number(5, seed);
            data.number(7, HASH_JENKINS);
        })
    }

    /// Any number below `modulus`.
    pub(crate) fn random(&mut self, to: Register, modulus: u32) -> &mut Self {
        self.push("numgen", |data| {
            data.number(1, to.0);
            data.number(2, modulus);
            data.number(3, NUMGEN_RANDOM);
        })
    }

    /// Goes on if the key is in the set.
    pub(crate) fn contained(&mut self, set: &str, key: Register) -> &mut Self {
        self.push("lookup", |data| {
            data.text(1, set);
            data.number(2, key.0);
        })
    }

    /// Adds to a set, or sets what is in it back to the beginning of its time.
    pub(crate) fn remember(&mut self, set: &str, key: Register) -> &mut Self {
        self.push("dynset", |data| {
            data.text(1, set);
            data.number(3, DYNSET_UPDATE);
            data.number(4, key.0);
        })
    }

    /// Goes on in the chain that the map has for the key, if it has one.
    pub(crate) fn dispatched(&mut self, map: &str, key: Register) -> &mut Self {
        self.push("lookup", |data| {
            data.text(1, map);
            data.number(2, key.0);
            data.number(3, Register::VERDICT.0);
        })
    }

    /// Goes on in `chain`, and does not come back.
    pub(crate) fn goto(&mut self, chain: &str) -> &mut Self {
        self.push("immediate", |data| {
            data.number(1, Register::VERDICT.0);
            data.nest(2, |data| goto(data, chain));
        })
    }

    pub(crate) fn value(&mut self, to: Register, value: &[u8]) -> &mut Self {
        self.push("immediate", |data| {
            data.number(1, to.0);
            data.nest(2, |data| data.bytes(DATA_VALUE, value));
        })
    }

    /// Translates the destination, and is the rule's verdict.
    pub(crate) fn destination(
        &mut self,
        family: Family,
        address: Register,
        port: Option<Register>,
    ) -> &mut Self {
        let family = match family {
            Family::V4 => NFPROTO_IPV4,
            Family::V6 => NFPROTO_IPV6,
        };
        self.push("nat", |data| {
            data.number(1, NAT_DESTINATION);
            data.number(2, family.into());
            data.number(3, address.0);
            if let Some(port) = port {
                data.number(5, port.0);
            }
        })
    }

    fn meta(&mut self, key: u32, to: Register) -> &mut Self {
        self.push("meta", |data| {
            data.number(1, to.0);
            data.number(2, key);
        })
    }

    fn equals(&mut self, register: Register, value: &[u8]) -> &mut Self {
        self.push("cmp", |data| {
            data.number(1, register.0);
            data.number(2, CMP_EQUAL);
            data.nest(3, |data| data.bytes(DATA_VALUE, value));
        })
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, to: Register) -> &mut Self {
        self.push("payload", |data| {
            data.number(1, to.0);
            data.number(2, base);
            data.number(3, offset);
            data.number(4, length);
        })
    }

    fn push(&mut self, name: &str, data: impl FnOnce(&mut Writer)) -> &mut Self {
        self.0.nest(LIST_ELEMENT, |expression| {
            expression.text(1, name);
            expression.nest(2, data);
        });
        self
    }
}

/// Writes the verdict to go on in `chain` and not come back.
pub(crate) fn goto(data: &mut Writer, chain: &str) {
    data.nest(DATA_VERDICT, |verdict| {
        verdict.number(1, VERDICT_GOTO);
        verdict.text(2, chain);
    });
}

/// The protocol's number in IP headers.
pub(crate) fn number_of(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}

/// The protocol of that number.
pub(crate) fn protocol_of(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp].into_iter().find(|protocol| number_of(*protocol) == number)
}

pub(crate) const LIST_ELEMENT: u16 = 1;
pub(crate) const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
/// `NFT_GOTO`, which is -4.
const VERDICT_GOTO: u32 = 0xffff_fffc;
const FIRST_WORD: u32 = 8;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const BASE_NETWORK: u32 = 1;
const CMP_EQUAL: u32 = 0;
const HASH_JENKINS: u32 = 0;
const NUMGEN_RANDOM: u32 = 1;
const DYNSET_UPDATE: u32 = 1;
const NAT_DESTINATION: u32 = 1;
