//! The certificate authority: pure, from PEM to certificates.

pub(crate) mod roots;
pub(crate) mod secret;

use std::time::{Duration, SystemTime};

use pem::Pem;
use rand::Rng;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::authorize::Permit;

/// How long a root made here holds.
const ROOT_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far clocks of nodes may be behind ours.
const CLOCK_SKEW: Duration = Duration::from_secs(120);
/// The shortest validity that makes sense to sign.
const MIN_VALIDITY: Duration = Duration::from_secs(60);

/// Signs. Holds the key.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    not_before: SystemTime,
    not_after: SystemTime,
    /// Between a leaf and its root.
    intermediates: Vec<CertificateDer<'static>>,
    /// All that are trusted; more than one while a root is replaced.
    roots: Vec<CertificateDer<'static>>,
}

/// The three parts of a CA Secret.
pub(crate) struct CaPem<'a> {
    pub(crate) certificate: &'a [u8],
    pub(crate) key: &'a [u8],
    /// Further roots.
    pub(crate) roots: Option<&'a [u8]>,
}

/// A CA that cannot sign.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    #[error("{part} is not a PEM certificate: {reason}")]
    Certificate { part: &'static str, reason: String },
    #[error("tls.key is not a PEM private key (PKCS#8, SEC1 or PKCS#1, not encrypted): {0}")]
    Key(String),
    #[error("the certificate in tls.crt is not a CA (basicConstraints CA:TRUE, keyCertSign)")]
    NotACa,
    #[error("tls.key does not belong to the certificate in tls.crt")]
    KeyMismatch,
    #[error("tls.crt is an intermediate CA and its root is missing; put the root into ca.crt")]
    NoRoot,
    #[error("the certificate in tls.crt is not valid now, only from {from} to {to}")]
    NotValidNow { from: String, to: String },
    #[error("a certificate could not be made: {0}")]
    Sign(#[from] rcgen::Error),
}

/// A request that is not signed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("the certificate request cannot be read or its signature is wrong: {0}")]
    Csr(rcgen::Error),
    #[error(transparent)]
    Ca(#[from] CaError),
}

/// PEM of a new root and its key.
pub(crate) struct NewRoot {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// A certificate for a server of the controller's own.
pub(crate) struct ServerIdentity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    /// When to make the next.
    pub(crate) renew_at: SystemTime,
}

/// A root of our own: ECDSA P-256, for leaves only.
pub(crate) fn new_root(trust_domain: &str, now: SystemTime) -> Result<NewRoot, CaError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    params
        .distinguished_name
        .push(DnType::CommonName, "Ambit root CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(random_serial());
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + ROOT_VALIDITY).into();
    let certificate = params.self_signed(&key)?;
    Ok(NewRoot {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

// === impl Ca ===

impl Ca {
    pub(crate) fn parse(pem: &CaPem<'_>, now: SystemTime) -> Result<Self, CaError> {
        let certificates = certificates("tls.crt", pem.certificate)?;
        let [own, rest @ ..] = certificates.as_slice() else {
            return Err(CaError::Certificate {
                part: "tls.crt",
                reason: "it is empty".to_owned(),
            });
        };
        let parsed = parse_certificate("tls.crt", own)?;
        let key = key_pair(pem.key)?;
        check(&parsed, &key)?;
        let more_roots = match pem.roots {
            Some(roots) => certificates_or_none("ca.crt", roots)?,
            None => Vec::new(),
        };
        let (mut roots, mut intermediates) = (Vec::new(), Vec::new());
        for certificate in [own].into_iter().chain(rest) {
            if is_self_signed(&parse_certificate("tls.crt", certificate)?) {
                push_new(&mut roots, certificate);
            } else {
                push_new(&mut intermediates, certificate);
            }
        }
        for certificate in &more_roots {
            parse_certificate("ca.crt", certificate)?;
            push_new(&mut roots, certificate);
        }
        if roots.is_empty() {
            return Err(CaError::NoRoot);
        }
        let ca = Self {
            not_before: time(parsed.validity().not_before.timestamp()),
            not_after: time(parsed.validity().not_after.timestamp()),
            issuer: Issuer::from_ca_cert_der(own, key)?,
            certificate: own.clone(),
            intermediates,
            roots,
        };
        ca.valid_at(now)?;
        Ok(ca)
    }

    /// The certificate of a workload for the key of the request. Nothing else of the request is
    /// taken over. The chain has the leaf first; its last element holds all roots.
    pub(crate) fn sign_workload(
        &self,
        permit: &Permit,
        csr: &str,
        validity: Duration,
        now: SystemTime,
    ) -> Result<Vec<String>, RequestError> {
        let mut request =
            CertificateSigningRequestParams::from_pem(csr).map_err(RequestError::Csr)?;
        let uri = permit.identity().to_string();
        let name = uri.try_into().map_err(CaError::Sign)?;
        request.params = self.leaf(vec![SanType::URI(name)], validity, now)?;
        let leaf = request.signed_by(&self.issuer).map_err(CaError::Sign)?;
        let mut chain = vec![leaf.pem()];
        chain.extend(self.intermediates.iter().map(encode));
        chain.push(self.roots_pem());
        Ok(chain)
    }

    /// A certificate of our own by these DNS names.
    pub(crate) fn sign_server(
        &self,
        names: &[String],
        validity: Duration,
        now: SystemTime,
    ) -> Result<ServerIdentity, CaError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let sans = names
            .iter()
            .map(|name| Ok(SanType::DnsName(name.as_str().try_into()?)))
            .collect::<Result<_, rcgen::Error>>()?;
        let leaf = self
            .leaf(sans, validity, now)?
            .signed_by(&key, &self.issuer)?;
        let lifetime = self.clamped(validity, now);
        Ok(ServerIdentity {
            chain: std::iter::once(leaf.der())
                .chain(&self.intermediates)
                .cloned()
                .collect(),
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            renew_at: now + lifetime / 2,
        })
    }

    /// PEM of all roots.
    pub(crate) fn roots_pem(&self) -> String {
        self.roots.iter().map(encode).collect()
    }

    /// Whether it signs with the same certificate and trusts the same roots.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        self.certificate == other.certificate
            && self.intermediates == other.intermediates
            && self.roots == other.roots
    }

    fn leaf(
        &self,
        sans: Vec<SanType>,
        validity: Duration,
        now: SystemTime,
    ) -> Result<CertificateParams, CaError> {
        self.valid_at(now)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = sans;
        params.serial_number = Some(random_serial());
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = (now - CLOCK_SKEW).max(self.not_before).into();
        params.not_after = (now + self.clamped(validity, now)).into();
        Ok(params)
    }

    /// No leaf outlives the CA.
    fn clamped(&self, validity: Duration, now: SystemTime) -> Duration {
        let left = self.not_after.duration_since(now).unwrap_or_default();
        validity.max(MIN_VALIDITY).min(left)
    }

    fn valid_at(&self, now: SystemTime) -> Result<(), CaError> {
        if (self.not_before..self.not_after).contains(&now) {
            return Ok(());
        }
        Err(CaError::NotValidNow {
            from: timestamp(self.not_before),
            to: timestamp(self.not_after),
        })
    }
}

/// The validity to sign for: what was asked, if it is sensible and not longer than `most`.
pub(crate) fn validity(asked_seconds: i64, most: Duration) -> Duration {
    match u64::try_from(asked_seconds) {
        Ok(seconds) if seconds > 0 => Duration::from_secs(seconds).min(most),
        _ => most,
    }
}

fn check(certificate: &X509Certificate<'_>, key: &KeyPair) -> Result<(), CaError> {
    let may_sign = certificate
        .key_usage()
        .ok()
        .flatten()
        .is_none_or(|usage| usage.value.key_cert_sign());
    if !certificate.is_ca() || !may_sign {
        return Err(CaError::NotACa);
    }
    let public_key = &certificate.public_key().subject_public_key.data;
    if public_key.as_ref() != key.public_key_raw() {
        return Err(CaError::KeyMismatch);
    }
    Ok(())
}

fn certificates(part: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let certificates = certificates_or_none(part, pem)?;
    if certificates.is_empty() {
        return Err(CaError::Certificate {
            part,
            reason: "it holds no BEGIN CERTIFICATE".to_owned(),
        });
    }
    Ok(certificates)
}

fn certificates_or_none(
    part: &'static str,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, CaError> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| CaError::Certificate {
            part,
            reason: error.to_string(),
        })
}

fn parse_certificate<'a>(
    part: &'static str,
    der: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, CaError> {
    X509Certificate::from_der(der)
        .map(|(_, certificate)| certificate)
        .map_err(|error| CaError::Certificate {
            part,
            reason: error.to_string(),
        })
}

fn key_pair(pem: &[u8]) -> Result<KeyPair, CaError> {
    let key =
        PrivateKeyDer::from_pem_slice(pem).map_err(|error| CaError::Key(error.to_string()))?;
    KeyPair::try_from(&key).map_err(|error| CaError::Key(error.to_string()))
}

fn is_self_signed(certificate: &X509Certificate<'_>) -> bool {
    certificate.subject() == certificate.issuer()
}

fn push_new(all: &mut Vec<CertificateDer<'static>>, certificate: &CertificateDer<'static>) {
    if !all.contains(certificate) {
        all.push(certificate.clone());
    }
}

fn encode(der: &CertificateDer<'static>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&Pem::new("CERTIFICATE", der.as_ref()), config)
}

/// 159 bits: positive and at most 20 octets, as RFC 5280 wants.
fn random_serial() -> SerialNumber {
    let mut octets: [u8; 20] = rand::rng().random();
    octets[0] = octets[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&octets)
}

fn time(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 {
        SystemTime::UNIX_EPOCH - distance
    } else {
        SystemTime::UNIX_EPOCH + distance
    }
}

fn timestamp(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "?".to_owned(), |time| time.to_string())
}

#[cfg(test)]
mod tests;
