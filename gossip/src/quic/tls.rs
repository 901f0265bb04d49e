use std::{sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use quinn::{
    EndpointConfig, IdleTimeout, TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use quinn_proto::HashedConnectionIdGenerator;
use rustls::{
    ClientConfig, ServerConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption, danger::ServerCertVerifier},
    crypto::CryptoProvider,
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::sync::watch;

use super::{detour::DETOURED_BYTES, timing::Timing, trust::Trust};
use crate::identity::{Certificate, Identity, PrivateKey};

/// What members speak.
pub(super) const ALPN_MEMBER: &[u8] = b"weft/1";
/// What a joiner and an issuer speak.
pub(super) const ALPN_JOIN: &[u8] = b"weft-join/1";

/// The certificate that this node presents: a newer one is used from the next connection on.
#[derive(Debug)]
pub(super) struct Presented(pub(super) watch::Receiver<Arc<CertifiedKey>>);

impl ResolvesServerCert for Presented {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.borrow().clone())
    }
}

impl ResolvesClientCert for Presented {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.borrow().clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The chain and the key that a member presents.
pub(super) fn member_key(identity: &Identity) -> Arc<CertifiedKey> {
    certified(&[identity.certificate(), identity.ca()], identity.key())
}

pub(super) fn certified(chain: &[&Certificate], key: &PrivateKey) -> Arc<CertifiedKey> {
    let signer = rustls::crypto::aws_lc_rs::sign::any_eddsa_type(&key.pkcs8())
        .expect("an Ed25519 key signs");
    let chain = chain.iter().map(|certificate| certificate.der().clone()).collect();
    Arc::new(CertifiedKey::new(chain, signer))
}

pub(super) fn server_config(
    trust: Trust,
    presented: Presented,
    transport: TransportConfig,
) -> quinn::ServerConfig {
    let mut tls = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .with_client_cert_verifier(Arc::new(trust))
        .with_cert_resolver(Arc::new(presented));
    tls.alpn_protocols = vec![ALPN_MEMBER.to_vec(), ALPN_JOIN.to_vec()];
    // No resumption: every connection judges the other side's certificate anew.
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;

    let crypto = QuicServerConfig::try_from(tls).expect("the provider has AES-128-GCM");
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    // A peer behind a NAT comes from another port when the NAT has forgotten it (RFC 9000 §9).
    config.migration(true);
    config.transport_config(Arc::new(transport));
    config
}

pub(super) fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
    presented: Presented,
    alpn: &[u8],
    transport: TransportConfig,
) -> quinn::ClientConfig {
    let mut tls = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(presented));
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.resumption = Resumption::disabled();
    tls.enable_sni = false;

    let crypto = QuicClientConfig::try_from(tls).expect("the provider has AES-128-GCM");
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    config
}

/// An endpoint whose stateless resets outlive the process (RFC 9000 §10.3): after a restart,
/// peers learn within one round trip that their connections are gone.
pub(super) fn endpoint_config(key: &PrivateKey) -> EndpointConfig {
    let mut config = EndpointConfig::new(Arc::new(key.derive("weft stateless reset 1")));
    let tag = hmac::sign(&key.derive("weft connection id 1"), b"");
    let tag = u64::from_be_bytes(*tag.as_ref().first_chunk().expect("HMAC-SHA-256 has 32 bytes"));
    // Connection ids are tagged, so that a packet with a made-up one gets no answer.
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(tag)));
    // After a restart all peers are told at once. A reset is shorter than what it answers, and
    // only an id that this node has made gets one, so there is nothing to hold back.
    config.min_reset_interval(Duration::ZERO);
    config
}

/// How packets go directly from host to host.
pub(super) fn direct(timing: &Timing) -> TransportConfig {
    let idle =
        IdleTimeout::try_from(timing.silence).expect("seconds fit a variable-length integer");
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(timing.keep_alive))
        .initial_rtt(timing.initial_rtt)
        .max_concurrent_uni_streams(VarInt::from_u32(64))
        .max_concurrent_bidi_streams(VarInt::from_u32(4))
        .stream_receive_window(VarInt::from_u32(1 << 20))
        .receive_window(VarInt::from_u32(8 << 20))
        .send_window(8 << 20)
        .datagram_receive_buffer_size(Some(1 << 20))
        .datagram_send_buffer_size(1 << 20);
    config
}

/// How packets go by a detour: of one length, which fits whatever carries them.
pub(super) fn detoured(timing: &Timing) -> TransportConfig {
    let mut config = direct(timing);
    config
        .initial_mtu(DETOURED_BYTES)
        .min_mtu(DETOURED_BYTES)
        .mtu_discovery_config(None)
        .enable_segmentation_offload(false);
    config
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
