//! From the root secret to keys, by HKDF-Expand with SHA-256 (RFC 5869 section 2.3).
//!
//! The root secret is an exporter output (RFC 8446 section 7.5) and uniform already, so that
//! nothing is extracted from it.

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf;
use weft_model::Suite;
use zeroize::Zeroizing;

use super::wire::{HEADER, Lane, TAG, code};

/// What all keys of one lane and direction follow from, from one epoch on.
///
/// Boxed, so that moving it leaves no copy behind that nobody wipes.
pub(super) struct Chain(Box<Zeroizing<[u8; 32]>>);

impl Chain {
    pub(super) fn first(root: &hkdf::Prk, direction: Direction, lane: Lane) -> Self {
        let mut chain = Self::blank();
        expand(root, &[b"weft chain", &[direction as u8, lane.number()]], chain.0.as_mut_slice());
        chain
    }

    /// The chain of the epoch behind this one's: it tells nothing of this one.
    pub(super) fn next(&self) -> Self {
        let mut chain = Self::blank();
        expand(&self.secret(), &[b"weft next"], chain.0.as_mut_slice());
        chain
    }

    /// The key of this chain's epoch for one suite.
    pub(super) fn key(&self, suite: Suite) -> Key {
        let algorithm = match suite {
            Suite::Aes128Gcm => &aead::AES_128_GCM,
            Suite::Aes256Gcm => &aead::AES_256_GCM,
            Suite::Chacha20Poly1305 => &aead::CHACHA20_POLY1305,
        };
        let secret = self.secret();
        let mut key = Zeroizing::new([0; 32]);
        let key = &mut key[..algorithm.key_len()];
        expand(&secret, &[b"weft key", &[code(suite)]], key);
        let mut salt = Zeroizing::new([0; 4]);
        expand(&secret, &[b"weft salt", &[code(suite)]], salt.as_mut());

        let key = UnboundKey::new(algorithm, key).expect("the key has the length of its algorithm");
        Key { aead: LessSafeKey::new(key), salt }
    }

    fn blank() -> Self {
        Self(Box::new(Zeroizing::new([0; 32])))
    }

    fn secret(&self) -> hkdf::Prk {
        hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, self.0.as_slice())
    }
}

/// One epoch's key of one lane.
pub(super) struct Key {
    // Its memory is wiped when it is freed: `OPENSSL_free` does so.
    aead: LessSafeKey,
    salt: Zeroizing<[u8; 4]>,
}

impl Key {
    /// Seals everything between header and tag of `packet` in place and writes the tag.
    ///
    /// # Panics
    ///
    /// If `packet` is shorter than header and tag, or longer than an AEAD takes (2^36 bytes).
    #[inline]
    pub(super) fn seal(&self, counter: u64, packet: &mut [u8]) {
        let (header, rest) = packet.split_at_mut(HEADER);
        let (text, tag) = rest.split_at_mut(rest.len() - TAG);
        let sealed = self
            .aead
            .seal_in_place_separate_tag(self.nonce(counter), Aad::from(&*header), text)
            .expect("a packet is shorter than what an AEAD takes");
        tag.copy_from_slice(sealed.as_ref());
    }

    /// Opens `packet` in place and returns what is between header and tag. A packet that was not
    /// sealed under this key is destroyed.
    #[inline]
    pub(super) fn open<'a>(&self, counter: u64, packet: &'a mut [u8]) -> Option<&'a mut [u8]> {
        let (header, text) = packet.split_at_mut_checked(HEADER)?;
        self.aead.open_in_place(self.nonce(counter), Aad::from(&*header), text).ok()
    }

    #[inline]
    fn nonce(&self, counter: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(self.salt.as_ref());
        nonce[4..].copy_from_slice(&counter.to_be_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Who sends, of the two ends of the TLS session that the root comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(super) enum Direction {
    FromDialler = 0,
    FromAcceptor = 1,
}

/// The number that names the root in packets of one direction.
pub(super) fn tag(root: &hkdf::Prk, direction: Direction) -> u32 {
    let mut tag = [0; 4];
    expand(root, &[b"weft tag", &[direction as u8]], &mut tag);
    u32::from_le_bytes(tag)
}

/// A number that tells roots apart and tells nothing of their secret.
pub(super) fn identity(root: &hkdf::Prk) -> u64 {
    let mut id = [0; 8];
    expand(root, &[b"weft id"], &mut id);
    u64::from_be_bytes(id)
}

fn expand(secret: &hkdf::Prk, info: &[&[u8]], out: &mut [u8]) {
    secret
        .expand(info, Length(out.len()))
        .and_then(|material| material.fill(out))
        .expect("no more than 255 blocks are asked for");
}

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}
