//! A certificate for every identity of this node: asked for, kept, renewed at half of its life.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use rand::Rng;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::access::with_causes;
use crate::identity::SpiffeId;
use crate::tls;

/// Who signs certificates.
pub trait CertificateSource: Send + Sync + 'static {
    /// Asks for a certificate; the chain in PEM, leaf first, the last element with all roots.
    fn sign(
        &self,
        identity: &SpiffeId,
        request_pem: String,
    ) -> impl Future<Output = Result<Vec<String>, String>> + Send;
}

/// A certificate that was not obtained, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Making the key or the request failed.
    #[error("make a certificate request for {0}")]
    Request(SpiffeId, #[source] rcgen::Error),
    /// The signer said no or is away.
    #[error("have the certificate of {0} signed: {1}")]
    Sign(SpiffeId, String),
    /// The answer is not a chain.
    #[error("the signed certificate of {0} cannot be used: {1}")]
    Chain(SpiffeId, String),
}

/// What there is to say about a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// Its serial number in hexadecimal digits.
    pub serial: String,
    /// From when it is valid.
    pub not_before: SystemTime,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

/// A certificate with its key, ready for use.
pub struct Certificate {
    identity: SpiffeId,
    key: PrivatePkcs8KeyDer<'static>,
    trusted: Arc<RootCertStore>,
    server: Arc<ServerConfig>,
    /// The chain, leaf first, without the roots.
    pub chain: Vec<Described>,
    /// The roots.
    pub roots: Vec<Described>,
    /// From when it is valid.
    pub not_before: SystemTime,
    /// Until when it is valid.
    pub not_after: SystemTime,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Certificate({}, until {:?})",
            self.identity, self.not_after
        )
    }
}

impl Certificate {
    /// The server's side of a handshake.
    #[must_use]
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// The client's side of a handshake with one peer.
    ///
    /// # Errors
    /// If rustls refuses the key.
    pub fn client(&self, expected: SpiffeId) -> Result<Arc<ClientConfig>, rustls::Error> {
        let key = PrivateKeyDer::Pkcs8(self.key.clone_key());
        let chain = self.chain.iter().map(|one| one.der.clone()).collect();
        tls::client_config(chain, key, self.trusted.clone(), expected)
    }

    /// How long from now until it is renewed: half of its life, with some jitter so that not all
    /// proxies ask at once.
    fn renew_in(&self, now: SystemTime, jitter: f64) -> Duration {
        let life = self
            .not_after
            .duration_since(self.not_before)
            .unwrap_or_default();
        let at = self.not_before + life.mul_f64(0.5 * (0.9 + 0.2 * jitter));
        at.duration_since(now)
            .unwrap_or_default()
            .max(Duration::from_secs(1))
    }
}

/// How far the certificate of an identity is.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The last good one.
    pub certificate: Option<Arc<Certificate>>,
    /// Why the last try failed.
    pub error: Option<String>,
}

impl State {
    /// The certificate, if it has not expired.
    #[must_use]
    pub fn valid(&self, now: SystemTime) -> Option<&Arc<Certificate>> {
        self.certificate
            .as_ref()
            .filter(|certificate| certificate.not_after > now)
    }
}

type States = BTreeMap<SpiffeId, State>;

/// The certificates of this node.
#[derive(Debug)]
pub struct Certificates {
    states: Arc<ArcSwap<States>>,
    changed: watch::Sender<u64>,
    tasks: Mutex<BTreeMap<SpiffeId, JoinHandle<()>>>,
}

impl Default for Certificates {
    fn default() -> Self {
        Self {
            states: Arc::new(ArcSwap::default()),
            changed: watch::Sender::new(0),
            tasks: Mutex::default(),
        }
    }
}

impl Certificates {
    /// The valid certificate of an identity.
    #[must_use]
    pub fn get(&self, identity: &SpiffeId) -> Option<Arc<Certificate>> {
        self.states
            .load()
            .get(identity)?
            .valid(SystemTime::now())
            .cloned()
    }

    /// How far every identity is.
    #[must_use]
    pub fn states(&self) -> Arc<States> {
        self.states.load_full()
    }

    /// Tells when something in [`Self::states`] changed.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// From now on holds certificates for these identities, and forgets all others.
    pub fn want<S: CertificateSource>(
        self: &Arc<Self>,
        wanted: &BTreeSet<SpiffeId>,
        source: &Arc<S>,
    ) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|identity, task| {
            let keep = wanted.contains(identity);
            if !keep {
                task.abort();
            }
            keep
        });
        self.update(|states| states.retain(|identity, _| wanted.contains(identity)));
        for identity in wanted {
            if !tasks.contains_key(identity) {
                self.update(|states| {
                    states.entry(identity.clone()).or_default();
                });
                let task = keep(Arc::downgrade(self), source.clone(), identity.clone());
                tasks.insert(identity.clone(), tokio::spawn(task));
            }
        }
    }

    fn update(&self, change: impl Fn(&mut States)) {
        self.states.rcu(|states| {
            let mut next = States::clone(states);
            change(&mut next);
            next
        });
        self.changed.send_modify(|version| *version += 1);
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        for task in self
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
        {
            task.abort();
        }
    }
}

/// Obtains and renews the certificate of one identity for as long as it is wanted.
async fn keep<S: CertificateSource>(all: Weak<Certificates>, source: Arc<S>, identity: SpiffeId) {
    let mut failures: u32 = 0;
    loop {
        let obtained = obtain(&*source, &identity).await;
        let Some(all) = all.upgrade() else { return };
        let jitter = rand::rng().random();
        let wait = match obtained {
            Ok(certificate) => {
                failures = 0;
                tracing::info!(%identity, "certificate obtained");
                let wait = certificate.renew_in(SystemTime::now(), jitter);
                let state = State {
                    certificate: Some(Arc::new(certificate)),
                    error: None,
                };
                all.update(|states| {
                    states.insert(identity.clone(), state.clone());
                });
                wait
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                let error = with_causes(&error);
                tracing::warn!(%identity, error, "no certificate; trying again");
                // The last good one stays until it expires.
                all.update(|states| {
                    states.entry(identity.clone()).or_default().error = Some(error.clone());
                });
                backoff(failures, jitter)
            }
        };
        drop(all);
        tokio::time::sleep(wait).await;
    }
}

/// 0.1 s, doubling up to 15 s, give or take a fifth.
fn backoff(failures: u32, jitter: f64) -> Duration {
    let seconds = (0.1 * f64::from(2_u32.pow(failures.clamp(1, 10) - 1))).min(15.0);
    Duration::from_secs_f64(seconds * (0.8 + 0.4 * jitter))
}

/// Asks for one certificate.
///
/// # Errors
/// If it cannot be obtained or is not what was asked for.
pub async fn obtain<S: CertificateSource>(
    source: &S,
    identity: &SpiffeId,
) -> Result<Certificate, CertificateError> {
    let request = |error| CertificateError::Request(identity.clone(), error);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(request)?;
    let pem = signing_request(identity, &key).map_err(request)?;
    let answer = source
        .sign(identity, pem)
        .await
        .map_err(|error| CertificateError::Sign(identity.clone(), error))?;
    accept(identity, &key, &answer)
        .map_err(|error| CertificateError::Chain(identity.clone(), error))
}

fn signing_request(identity: &SpiffeId, key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.serialize_request(key)?.pem()
}

/// Checks an answer and makes it ready for use.
pub(crate) fn accept(
    identity: &SpiffeId,
    key: &KeyPair,
    answer: &[String],
) -> Result<Certificate, String> {
    let (roots_pem, chain_pem) = answer.split_last().ok_or("the answer is empty")?;
    let chain = pem_certificates(&chain_pem.concat())?;
    let leaf = chain.first();
    let leaf = leaf.ok_or("the answer has no certificate before the roots")?;
    let signed = tls::identity_of(leaf).map_err(|error| error.to_string())?;
    if signed != *identity {
        return Err(format!("it was signed for {signed}"));
    }
    check_key(leaf, key)?;
    let chain_described = describe_all(&chain)?;
    let validity = chain_described
        .first()
        .map(|leaf| (leaf.not_before, leaf.not_after));
    let (not_before, not_after) = validity.ok_or("the answer has no certificate")?;
    let roots = describe_all(&pem_certificates(roots_pem)?)?;
    if roots.is_empty() {
        return Err("the answer has no root in its last element".to_owned());
    }
    let mut trusted = RootCertStore::empty();
    for root in &roots {
        let added = trusted.add(root.der.clone());
        added.map_err(|error| format!("a root: {error}"))?;
    }
    let trusted = Arc::new(trusted);
    let pkcs8 = PrivatePkcs8KeyDer::from(key.serialize_der());
    let server = tls::server_config(
        chain,
        PrivateKeyDer::Pkcs8(pkcs8.clone_key()),
        trusted.clone(),
        identity.trust_domain().clone(),
    )
    .map_err(|error| error.to_string())?;
    Ok(Certificate {
        identity: identity.clone(),
        key: pkcs8,
        trusted,
        server,
        chain: chain_described,
        roots,
        not_before,
        not_after,
    })
}

fn check_key(leaf: &[u8], key: &KeyPair) -> Result<(), String> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| error.to_string())?;
    if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err("it is for another key".to_owned());
    }
    Ok(())
}

fn describe_all(certificates: &[CertificateDer<'static>]) -> Result<Vec<Described>, String> {
    certificates.iter().map(describe).collect()
}

fn describe(certificate: &CertificateDer<'static>) -> Result<Described, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    let time = |stamp: i64| UNIX_EPOCH + Duration::from_secs(stamp.try_into().unwrap_or_default());
    let validity = parsed.validity();
    Ok(Described {
        der: certificate.clone(),
        serial: format!("{:x}", parsed.tbs_certificate.serial),
        not_before: time(validity.not_before.timestamp()),
        not_after: time(validity.not_after.timestamp()),
    })
}

fn pem_certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    found.map_err(|error| format!("not PEM: {error}"))
}

#[cfg(test)]
mod tests;
