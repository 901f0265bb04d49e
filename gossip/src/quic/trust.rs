use std::{collections::BTreeSet, sync::Arc, time::Duration};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use time::OffsetDateTime;
use tokio::sync::watch;
use weft_model::{ClusterId, NodeId};

use super::{clock::Clock, refusal::Refusal};
use crate::identity::{
    Certificate, Identity, PublicKey, Subject, Token, TokenId, TokenStore, Validity,
};

/// Who the other end of a connection has proved to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerIdentity {
    pub node: NodeId,
    /// The name in its certificate.
    pub name: Option<String>,
    /// The key with which it signs.
    pub public_key: PublicKey,
    pub validity: Validity,
}

/// What one member believes of others: decides which certificates it accepts.
#[derive(Clone, Debug)]
pub(super) struct Trust {
    cluster: ClusterId,
    node: NodeId,
    anchor: Anchor,
    clock: Clock,
    revoked: watch::Receiver<BTreeSet<NodeId>>,
    tokens: Option<Arc<TokenStore>>,
}

impl Trust {
    pub(super) fn new(
        identity: &Identity,
        clock: Clock,
        revoked: watch::Receiver<BTreeSet<NodeId>>,
        tokens: Option<Arc<TokenStore>>,
    ) -> Self {
        Self {
            cluster: identity.cluster(),
            node: identity.node(),
            anchor: Anchor::new(identity.ca()),
            clock,
            revoked,
            tokens,
        }
    }

    /// Judges a certificate that claims to be a member's.
    pub(super) fn judge_member(&self, certificate: &Certificate) -> Result<(), Refusal> {
        let node = self.anchor.judge(self.cluster, certificate, self.clock.now())?;
        if node == self.node {
            return Err(Refusal::OwnIdentity(node));
        }
        self.refuse_revoked(node)
    }

    fn judge_joiner(
        &self,
        token: TokenId,
        proof: &[u8; 32],
        key: &PublicKey,
    ) -> Result<(), Refusal> {
        let tokens = self.tokens.as_ref().ok_or(Refusal::NotIssuer)?;
        tokens.tokens().judge(token, key, proof, self.clock.now())?;
        self.refuse_revoked(key.node_id())
    }

    fn refuse_revoked(&self, node: NodeId) -> Result<(), Refusal> {
        match self.revoked.borrow().contains(&node) {
            true => Err(Refusal::Revoked(node)),
            false => Ok(()),
        }
    }

    fn judge_client(&self, end_entity: &CertificateDer<'_>) -> Result<(), Refusal> {
        let certificate = Certificate::from_der(end_entity)?;
        match certificate.subject() {
            Subject::Joiner { token, proof } => {
                self.judge_joiner(*token, proof, &certificate.public_key())
            }
            Subject::Node { .. } | Subject::Authority => self.judge_member(&certificate),
        }
    }
}

/// What a joiner believes: the token it was given, and nothing else.
#[derive(Debug)]
pub(super) struct TokenTrust {
    pub(super) token: Token,
    pub(super) now: OffsetDateTime,
}

impl TokenTrust {
    fn judge(&self, chain: &[&CertificateDer<'_>]) -> Result<(), Refusal> {
        let (leaf, others) = chain.split_first().ok_or(Refusal::NotOfThisKind)?;
        let leaf = Certificate::from_der(leaf)?;
        // Said before the missing authority: it is the plainer reason of the two.
        if let Subject::Node { cluster, .. } = *leaf.subject()
            && cluster != self.token.cluster
        {
            return Err(Refusal::WrongCluster { theirs: cluster, ours: self.token.cluster });
        }
        let authority = others
            .iter()
            .filter_map(|der| Certificate::from_der(der).ok())
            .find(|ca| self.accepts(ca))
            .ok_or(Refusal::WrongAuthority { ours: self.token.authority })?;
        Anchor::new(&authority).judge(self.token.cluster, &leaf, self.now).map(drop)
    }

    /// Whether `ca` is the authority that the token names.
    pub(super) fn accepts(&self, ca: &Certificate) -> bool {
        *ca.subject() == Subject::Authority && ca.public_key().fingerprint() == self.token.authority
    }
}

/// The cluster's authority, as one that signs nodes' certificates.
#[derive(Clone, Debug)]
pub(super) struct Anchor {
    roots: Arc<RootCertStore>,
    fingerprint: [u8; 32],
}

impl Anchor {
    pub(super) fn new(ca: &Certificate) -> Self {
        let mut roots = RootCertStore::empty();
        // A certificate that is no trust anchor leaves the store empty: nothing is then accepted.
        let _ = roots.add(ca.der().clone());
        Self { roots: Arc::new(roots), fingerprint: ca.public_key().fingerprint() }
    }

    /// The node of `cluster` whose certificate this is.
    pub(super) fn judge(
        &self,
        cluster: ClusterId,
        certificate: &Certificate,
        now: OffsetDateTime,
    ) -> Result<NodeId, Refusal> {
        let node = match *certificate.subject() {
            Subject::Node { cluster: theirs, .. } if theirs != cluster => {
                return Err(Refusal::WrongCluster { theirs, ours: cluster });
            }
            Subject::Node { node, .. } => node,
            Subject::Joiner { .. } | Subject::Authority => return Err(Refusal::NotOfThisKind),
        };
        let actual = certificate.public_key().node_id();
        if node != actual {
            return Err(Refusal::ForeignKey { claimed: node, actual });
        }
        self.verify_signature(certificate)?;
        let validity = certificate.validity();
        match validity.contains(now) {
            true => Ok(node),
            false => Err(Refusal::Clock { holder: node, validity, now }),
        }
    }

    /// Checks the signature and the purposes at a time when the certificate was valid: its time
    /// is judged apart, with a message that shows both clocks.
    fn verify_signature(&self, certificate: &Certificate) -> Result<(), Refusal> {
        let begin = u64::try_from(certificate.validity().from.unix_timestamp()).unwrap_or(0);
        let refusal = || Refusal::WrongAuthority { ours: self.fingerprint };
        let parsed = ParsedCertificate::try_from(certificate.der()).map_err(|_| refusal())?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            &[],
            UnixTime::since_unix_epoch(Duration::from_secs(begin)),
            algorithms().all,
        )
        .map_err(|_| refusal())
    }
}

impl ClientCertVerifier for Trust {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.judge_client(end_entity).map_err(tls_error)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::InvalidCertificate(CertificateError::BadSignature))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// Both sides of the trust in servers differ in nothing but the judgement.
macro_rules! server_verifier {
    ($name:ident, |$self:ident, $end_entity:ident, $others:ident| $judge:expr) => {
        impl ServerCertVerifier for $name {
            fn verify_server_cert(
                &$self,
                $end_entity: &CertificateDer<'_>,
                $others: &[CertificateDer<'_>],
                _server_name: &ServerName<'_>,
                _ocsp_response: &[u8],
                _now: UnixTime,
            ) -> Result<ServerCertVerified, Error> {
                $judge.map_err(tls_error)?;
                Ok(ServerCertVerified::assertion())
            }

            fn verify_tls12_signature(
                &self,
                _message: &[u8],
                _cert: &CertificateDer<'_>,
                _dss: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, Error> {
                Err(Error::InvalidCertificate(CertificateError::BadSignature))
            }

            fn verify_tls13_signature(
                &self,
                message: &[u8],
                cert: &CertificateDer<'_>,
                dss: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, Error> {
                verify_tls13_signature(message, cert, dss, &algorithms())
            }

            fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
                vec![SignatureScheme::ED25519]
            }
        }
    };
}

server_verifier!(Trust, |self, end_entity, _others| {
    Certificate::from_der(end_entity)
        .map_err(Refusal::from)
        .and_then(|certificate| self.judge_member(&certificate))
});
server_verifier!(TokenTrust, |self, end_entity, others| {
    let chain: Vec<_> = std::iter::once(end_entity).chain(others).collect();
    self.judge(&chain)
});

fn tls_error(refusal: Refusal) -> Error {
    Error::Other(OtherError(Arc::new(refusal)))
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}
