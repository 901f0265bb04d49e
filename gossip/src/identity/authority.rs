use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose,
};
use time::OffsetDateTime;
use weft_model::{ClusterId, Label};

use super::{
    certificate::{Certificate, Validity, uri_name},
    key::{PrivateKey, PublicKey},
};

/// The cluster's certificate authority, on a node that holds its key.
#[derive(Debug)]
pub struct Authority {
    cluster: ClusterId,
    key: PrivateKey,
    certificate: Certificate,
}

impl Authority {
    /// Makes the authority of a new cluster.
    pub fn generate(cluster: ClusterId, now: OffsetDateTime) -> Self {
        let key = PrivateKey::generate();
        let mut params = parameters(
            format!("weft cluster {cluster}"),
            Validity::starting(now, AUTHORITY_VALIDITY),
        );
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let made = params.self_signed(&key).expect("a signature by a key in memory succeeds");
        let certificate =
            Certificate::from_der(made.der()).expect("a certificate of ours is of our form");
        Self { cluster, key, certificate }
    }

    /// Puts together what is on disk; the key must be that of the certificate.
    pub(super) fn new(cluster: ClusterId, key: PrivateKey, certificate: Certificate) -> Self {
        Self { cluster, key, certificate }
    }

    /// Certifies that the holder of `key` is the node called `name`.
    ///
    /// The caller has made sure that whoever asks holds the key: in TLS 1.3 the handshake's
    /// CertificateVerify proves it (RFC 8446 §4.4.3).
    pub fn issue(&self, key: &PublicKey, name: &Label, validity: Validity) -> Certificate {
        let mut params = parameters(name.to_string(), validity);
        let uri = format!("spiffe://{}/node/{}", self.cluster, key.node_id());
        params.subject_alt_names = vec![uri_name(&uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;

        let issuer = Issuer::from_ca_cert_der(self.certificate.der(), &self.key)
            .expect("an authority's certificate is of our form");
        let made = params.signed_by(key, &issuer).expect("a signature by a key in memory succeeds");
        Certificate::from_der(made.der()).expect("a certificate of ours is of our form")
    }

    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    pub(super) fn key(&self) -> &PrivateKey {
        &self.key
    }
}

/// How long a node's certificate is valid unless the operator says otherwise.
pub const NODE_VALIDITY: Duration = Duration::from_secs(30 * 86_400);

const AUTHORITY_VALIDITY: Duration = Duration::from_secs(10 * 365 * 86_400);

fn parameters(common_name: String, validity: Validity) -> CertificateParams {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    params.not_before = validity.from;
    params.not_after = validity.until;
    params
}
