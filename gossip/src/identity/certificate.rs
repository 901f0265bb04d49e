use std::{fmt, time::Duration};

use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use weft_model::{ClusterId, NodeId};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

use super::{
    key::{PrivateKey, PublicKey},
    token::{Secret, TokenId},
};

/// A certificate that was read, but not yet verified against any authority.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Certificate {
    der: CertificateDer<'static>,
    subject: Subject,
    name: Option<String>,
    public_key: PublicKey,
    validity: Validity,
}

impl Certificate {
    /// Reads a DER certificate.
    ///
    /// # Errors
    /// Unless it has an Ed25519 key and is either an authority or has exactly one subject
    /// alternative name, of a form that weft gives out.
    pub fn from_der(der: &[u8]) -> Result<Self, InvalidCertificate> {
        let (rest, parsed) =
            X509Certificate::from_der(der).map_err(|_| InvalidCertificate::Encoding)?;
        if !rest.is_empty() {
            return Err(InvalidCertificate::Encoding);
        }
        let public_key = PublicKey::from_spki(parsed.public_key().raw)
            .map_err(|_| InvalidCertificate::KeyAlgorithm)?;
        let validity = Validity {
            from: parsed.validity().not_before.to_datetime(),
            until: parsed.validity().not_after.to_datetime(),
        };
        Ok(Self {
            subject: Subject::of(&parsed)?,
            name: common_name(&parsed),
            public_key,
            validity,
            der: CertificateDer::from(der).into_owned(),
        })
    }

    /// Reads the first certificate in `pem`.
    pub fn from_pem(pem: &[u8]) -> Result<Self, InvalidCertificate> {
        let der = CertificateDer::from_pem_slice(pem).map_err(|_| InvalidCertificate::Encoding)?;
        Self::from_der(&der)
    }

    /// Makes the certificate that a node without one presents when it asks to join: signed by
    /// itself, with the proof that it knows the secret of `token` and means this key.
    pub(crate) fn for_joining(key: &PrivateKey, token: TokenId, secret: &Secret) -> Self {
        let proof = secret.key().prove(&key.public_key());
        let uri = format!("weft-join://{token}/{}", hex::encode(proof));
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![uri_name(&uri)];
        let made = params.self_signed(key).expect("a signature by a key in memory succeeds");
        Self::from_der(made.der()).expect("a certificate of ours is of our form")
    }

    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// This certificate in PEM (RFC 7468 §5).
    pub fn to_pem(&self) -> String {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let body = STANDARD.encode(&self.der);
        let lines: Vec<&str> = body
            .as_bytes()
            .chunks(64)
            .map(|line| std::str::from_utf8(line).expect("base64 is ASCII"))
            .collect();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
    }

    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The common name: of a node's certificate the node's name.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    pub fn validity(&self) -> Validity {
        self.validity
    }
}

/// What a certificate says that its holder is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Subject {
    /// `spiffe://<cluster>/node/<node>`
    Node { cluster: ClusterId, node: NodeId },
    /// `weft-join://<token>/<proof>`, signed by its own key.
    Joiner { token: TokenId, proof: [u8; 32] },
    /// A certificate authority.
    Authority,
}

impl Subject {
    fn of(certificate: &X509Certificate<'_>) -> Result<Self, InvalidCertificate> {
        if certificate.is_ca() {
            return Ok(Self::Authority);
        }
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| InvalidCertificate::Encoding)?
            .map(|extension| extension.value.general_names.as_slice())
            .unwrap_or_default();
        match names {
            [GeneralName::URI(uri)] => Self::from_uri(uri)
                .ok_or_else(|| InvalidCertificate::Name(uri.chars().take(128).collect())),
            [] | [_] | [_, ..] => Err(InvalidCertificate::Names(names.len())),
        }
    }

    fn from_uri(uri: &str) -> Option<Self> {
        if let Some(path) = uri.strip_prefix("spiffe://") {
            let (cluster, node) = path.split_once("/node/")?;
            return Some(Self::Node { cluster: cluster.parse().ok()?, node: node.parse().ok()? });
        }
        let (token, proof) = uri.strip_prefix("weft-join://")?.split_once('/')?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(proof, &mut bytes).ok()?;
        Some(Self::Joiner { token: token.parse().ok()?, proof: bytes })
    }
}

/// The time in which a certificate is to be accepted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Validity {
    pub from: OffsetDateTime,
    pub until: OffsetDateTime,
}

impl Validity {
    /// `length` from `now` on, and [`BACKDATING`] before it.
    pub fn starting(now: OffsetDateTime, length: Duration) -> Self {
        Self { from: now - BACKDATING, until: now + length }
    }

    /// When to ask for a newer certificate: after two thirds of the time.
    pub fn renew_at(&self) -> OffsetDateTime {
        self.from + (self.until - self.from) * 2 / 3
    }

    /// The time that the issuer meant it to be valid, from its issue on.
    pub fn length(&self) -> Duration {
        let length = self.until - self.from - BACKDATING;
        length.try_into().unwrap_or_default()
    }

    pub fn contains(&self, now: OffsetDateTime) -> bool {
        (self.from..self.until).contains(&now)
    }
}

impl fmt::Display for Validity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "from {} until {}", instant(self.from), instant(self.until))
    }
}

/// A certificate that is none of weft's.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCertificate {
    #[error("not an X.509 certificate")]
    Encoding,
    #[error("its key is not an Ed25519 key")]
    KeyAlgorithm,
    #[error("it has {0} subject alternative names where one URI is expected")]
    Names(usize),
    #[error("its name {0:?} is neither a node's nor a joiner's")]
    Name(String),
}

/// What a clock may lag behind that of the issuer before a new certificate is refused.
pub const BACKDATING: Duration = Duration::from_secs(3600);

/// A point in time as messages show it, to the second.
pub(crate) fn instant(time: OffsetDateTime) -> String {
    let second = time.replace_nanosecond(0).unwrap_or(time);
    second.format(&Rfc3339).unwrap_or_else(|_| second.unix_timestamp().to_string())
}

pub(super) fn uri_name(uri: &str) -> rcgen::SanType {
    rcgen::SanType::URI(uri.try_into().expect("identifiers are ASCII"))
}

fn common_name(certificate: &X509Certificate<'_>) -> Option<String> {
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok().map(str::to_owned)
}
