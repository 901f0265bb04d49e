use std::fmt;

use aws_lc_rs::{
    hmac,
    signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use rustls_pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use sha2::{Digest, Sha256};
use weft_model::NodeId;
use zeroize::Zeroizing;

/// An Ed25519 key (RFC 8032) whose secret half is ours.
pub struct PrivateKey {
    pair: Ed25519KeyPair,
    pkcs8: Zeroizing<Vec<u8>>,
    public: PublicKey,
}

impl PrivateKey {
    /// A new key from the system's random source.
    pub fn generate() -> Self {
        let pkcs8 = Ed25519KeyPair::generate()
            .and_then(|pair| pair.to_pkcs8v1())
            .expect("the system's random source works");
        Self::from_pkcs8(pkcs8.as_ref()).expect("a key that was just made is a key")
    }

    /// Reads what [`Self::to_pem`] wrote.
    pub fn from_pem(pem: &[u8]) -> Result<Self, InvalidKey> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|_| InvalidKey)?;
        Self::from_pkcs8(der.secret_pkcs8_der())
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, InvalidKey> {
        let pair = Ed25519KeyPair::from_pkcs8(der).map_err(|_| InvalidKey)?;
        let public = pair.public_key().as_ref().try_into().map_err(|_| InvalidKey)?;
        Ok(Self { pair, pkcs8: Zeroizing::new(der.to_vec()), public: PublicKey(public) })
    }

    /// PKCS #8 in PEM (RFC 7468 §10).
    pub fn to_pem(&self) -> Zeroizing<String> {
        let body = Zeroizing::new(STANDARD.encode(&*self.pkcs8));
        Zeroizing::new(format!(
            "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
            *body
        ))
    }

    pub fn public_key(&self) -> PublicKey {
        self.public
    }

    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.pair.sign(message).as_ref().try_into().expect("an Ed25519 signature has 64 bytes")
    }

    /// A secret that only this key's holder can compute, and always the same for one `label`.
    pub(crate) fn derive(&self, label: &str) -> hmac::Key {
        let seed = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.pkcs8), label.as_bytes());
        hmac::Key::new(hmac::HMAC_SHA256, seed.as_ref())
    }

    pub(crate) fn pkcs8(&self) -> PrivatePkcs8KeyDer<'_> {
        PrivatePkcs8KeyDer::from(self.pkcs8.as_slice())
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({})", self.public.node_id().short())
    }
}

impl rcgen::PublicKeyData for PrivateKey {
    fn der_bytes(&self) -> &[u8] {
        self.public.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

impl rcgen::SigningKey for PrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(Self::sign(self, message).to_vec())
    }
}

/// An Ed25519 public key: what a node is known by.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Reads a DER SubjectPublicKeyInfo (RFC 8410 §4).
    pub fn from_spki(der: &[u8]) -> Result<Self, InvalidKey> {
        let key = der.strip_prefix(&SPKI_PREFIX).ok_or(InvalidKey)?;
        key.try_into().map(Self).map_err(|_| InvalidKey)
    }

    /// This key as DER SubjectPublicKeyInfo.
    pub fn spki(&self) -> [u8; 44] {
        let mut der = [0; 44];
        der[..12].copy_from_slice(&SPKI_PREFIX);
        der[12..].copy_from_slice(&self.0);
        der
    }

    /// SHA-256 over [`Self::spki`].
    pub fn fingerprint(&self) -> [u8; 32] {
        Sha256::digest(self.spki()).into()
    }

    /// The node that holds this key.
    pub fn node_id(&self) -> NodeId {
        let mut id = [0; 16];
        id.copy_from_slice(&self.fingerprint()[..16]);
        NodeId::from(id)
    }

    /// Whether the holder of this key has signed `message`.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl rcgen::PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

/// Bytes that are no Ed25519 key.
#[derive(Debug, thiserror::Error)]
#[error("not an Ed25519 key")]
pub struct InvalidKey;

/// SEQUENCE { SEQUENCE { OID 1.3.101.112 }, BIT STRING of 32 bytes }, without those bytes.
const SPKI_PREFIX: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

#[cfg(test)]
mod tests {
    use rcgen::PublicKeyData;

    use super::*;

    #[test]
    fn a_key_reads_what_it_writes_and_signs_alike() {
        let key = PrivateKey::generate();
        let again = PrivateKey::from_pem(key.to_pem().as_bytes()).unwrap();

        assert_eq!(again.public_key(), key.public_key());
        assert!(key.public_key().verify(b"message", &again.sign(b"message")));
        assert!(!key.public_key().verify(b"another", &again.sign(b"message")));
        assert!(PrivateKey::from_pem(b"garbage").is_err());
    }

    #[test]
    fn a_public_key_survives_its_encoding_in_certificates() {
        let key = PrivateKey::generate().public_key();
        assert_eq!(key.spki().to_vec(), key.subject_public_key_info());
        assert_eq!(PublicKey::from_spki(&key.spki()).unwrap(), key);
        assert!(PublicKey::from_spki(&key.spki()[..43]).is_err());
    }
}
