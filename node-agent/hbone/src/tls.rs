//! TLS 1.3 between proxies: ALPN h2, no SNI, both sides present an identity.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{IdentityError, SpiffeId, TrustDomain};

/// A certificate whose identity is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PeerError {
    /// Not DER of X.509.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// None or several URI names.
    #[error("the certificate has {0} URI names, wanted is exactly one SPIFFE identity")]
    Names(usize),
    /// The URI is no identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Somebody of another trust domain.
    #[error("{0} is not of this trust domain ({1})")]
    TrustDomain(SpiffeId, TrustDomain),
    /// Somebody else than expected.
    #[error("the peer is {0}, expected is {1}")]
    Another(SpiffeId, SpiffeId),
}

/// A handshake that failed. It says in words what our own checks found.
#[derive(Debug)]
pub(crate) struct HandshakeFailure(pub(crate) io::Error);

impl fmt::Display for HandshakeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cause = self.0.get_ref().and_then(|cause| cause.downcast_ref());
        match cause {
            Some(rustls::Error::InvalidCertificate(CertificateError::Other(found))) => {
                write!(f, "invalid peer certificate: {}", found.0)
            }
            _ => self.0.fmt(f),
        }
    }
}

impl std::error::Error for HandshakeFailure {}

/// The one identity that a certificate carries.
///
/// # Errors
/// If it carries none, several, or something else.
pub(crate) fn identity_of(certificate: &[u8]) -> Result<SpiffeId, PeerError> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|error| PeerError::Unreadable(error.to_string()))?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| PeerError::Unreadable(error.to_string()))?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris.as_slice() else {
        return Err(PeerError::Names(uris.len()));
    };
    Ok(uri.parse()?)
}

/// Cipher suites and key exchange: AES-128 first, it is the cheapest where AES is in hardware.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    Arc::new(provider)
}

/// The server's side for one workload.
///
/// # Errors
/// If the key does not fit the chain, or there are no roots.
pub(crate) fn server_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let chain_verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let verifier = Arc::new(AnyOfTrustDomain {
        chain: chain_verifier,
        trust_domain,
    });
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The client's side for one workload that expects exactly one other.
///
/// # Errors
/// If the key does not fit the chain.
pub(crate) fn client_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    expected: SpiffeId,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let algorithms = provider().signature_verification_algorithms;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExactlyOne {
            roots,
            expected,
            algorithms,
        }))
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn refused(error: PeerError) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

/// Accepts any client of the trust domain whose chain leads to a root.
#[derive(Debug)]
struct AnyOfTrustDomain {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: TrustDomain,
}

impl ClientCertVerifier for AnyOfTrustDomain {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Proxies hold one certificate an identity; hints would only make the handshake longer.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        let client = identity_of(leaf).map_err(refused)?;
        if *client.trust_domain() != self.trust_domain {
            return Err(refused(PeerError::TrustDomain(
                client,
                self.trust_domain.clone(),
            )));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Accepts one identity, whatever the server's name.
struct ExactlyOne {
    roots: Arc<RootCertStore>,
    expected: SpiffeId,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for ExactlyOne {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExactlyOne({})", self.expected)
    }
}

impl ServerCertVerifier for ExactlyOne {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        let server = identity_of(leaf).map_err(refused)?;
        if server != self.expected {
            return Err(refused(PeerError::Another(server, self.expected.clone())));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
