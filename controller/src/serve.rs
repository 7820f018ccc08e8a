//! The listener of discovery and certificates: TLS with a certificate of our own CA, then gRPC.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use protocol::certificate::istio_certificate_service_server::IstioCertificateServiceServer;
use protocol::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::ca::secret::CurrentCa;
use crate::ca::{Ca, CaError};
use crate::certificates::Certificates;
use crate::discovery::Discovery;
use crate::problems::{Problems, chain};

const PART: &str = "serving certificate";

/// How long a client may take to shake hands.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at once; more wait in the listener's queue.
const HANDSHAKES: usize = 256;
/// A reconnecting client names all it has: some 80 bytes for each of 50,000.
const MAX_DISCOVERY_REQUEST_BYTES: usize = 32 << 20;
/// What of a request a client may send before somebody reads it. A thousand that come back together wait with so much each.
const WINDOW: u32 = 64 << 10;
const MAX_CERTIFICATE_REQUEST_BYTES: usize = 256 << 10;
/// Silent clients are found by this.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// After a failure to make a certificate.
const RETRY: Duration = Duration::from_secs(30);
/// After a failure to accept, as when descriptors run out.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The listener cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("no serving certificate: {0}")]
    Certificate(#[from] ServingCertificateError),
    #[error("the TLS settings are not usable: {0}")]
    Tls(rustls::Error),
    #[error("gRPC ended: {0}")]
    Grpc(#[from] tonic::transport::Error),
}

/// A serving certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServingCertificateError {
    #[error(transparent)]
    Sign(#[from] CaError),
    #[error("its key cannot be used: {0}")]
    Key(rustls::Error),
}

/// The certificate that clients are shown; a handshake takes the newest.
#[derive(Debug)]
pub(crate) struct ServingCertificate {
    names: Vec<String>,
    validity: Duration,
    current: RwLock<Arc<CertifiedKey>>,
}

/// Serves until `stop`, then lets open requests end.
pub(crate) async fn serve(
    listener: TcpListener,
    certificate: Arc<ServingCertificate>,
    discovery: Discovery,
    certificates: Certificates,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let acceptor = TlsAcceptor::from(Arc::new(tls_config(certificate)?));
    let (accepted, connections) = mpsc::channel(1);
    tokio::spawn(accept(listener, acceptor, accepted, stop.clone()));
    let discovery = AggregatedDiscoveryServiceServer::new(discovery)
        .max_decoding_message_size(MAX_DISCOVERY_REQUEST_BYTES);
    let certificates = IstioCertificateServiceServer::new(certificates)
        .max_decoding_message_size(MAX_CERTIFICATE_REQUEST_BYTES);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .add_service(discovery)
        .add_service(certificates)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop.cancelled_owned())
        .await?;
    Ok(())
}

type Connection = Result<TlsStream<TcpStream>, std::io::Error>;

/// Hands over connections once they are secure. One that fails concerns nobody else.
async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    accepted: mpsc::Sender<Connection>,
    stop: CancellationToken,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(permit) = handshakes.clone().acquire_owned().await else {
            return;
        };
        let incoming = tokio::select! {
            incoming = listener.accept() => incoming,
            () = stop.cancelled() => return,
        };
        let (stream, peer) = match incoming {
            Ok(incoming) => incoming,
            Err(error) => {
                tracing::warn!("a connection was not accepted: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
        tokio::spawn(async move {
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream));
            match handshake.await {
                Ok(Ok(stream)) => {
                    drop(permit);
                    // The receiver is gone only when the program ends.
                    let _ = accepted.send(Ok(stream)).await;
                }
                Ok(Err(error)) => tracing::debug!(%peer, "a TLS handshake failed: {error}"),
                Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
            }
        });
    }
}

fn tls_config(certificate: Arc<ServingCertificate>) -> Result<ServerConfig, ServeError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(ServeError::Tls)?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

// === impl ServingCertificate ===

impl ServingCertificate {
    pub(crate) fn new(
        ca: &Ca,
        names: Vec<String>,
        validity: Duration,
    ) -> Result<(Arc<Self>, SystemTime), ServingCertificateError> {
        let (key, renew_at) = certified(ca, &names, validity)?;
        let certificate = Self {
            names,
            validity,
            current: RwLock::new(Arc::new(key)),
        };
        Ok((Arc::new(certificate), renew_at))
    }

    /// Makes a new one at half of its life and whenever the CA changes.
    pub(crate) async fn renew(
        self: Arc<Self>,
        mut ca: CurrentCa,
        mut renew_at: SystemTime,
        problems: Problems,
    ) {
        loop {
            let wait = renew_at
                .duration_since(SystemTime::now())
                .unwrap_or_default();
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                changed = ca.changed() => if changed.is_err() {
                    return;
                },
            }
            let current = ca.borrow_and_update().clone();
            match certified(&current, &self.names, self.validity) {
                Ok((key, next)) => {
                    problems.clear(PART);
                    tracing::info!("made a new serving certificate");
                    renew_at = next;
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
                }
                Err(error) => {
                    problems.report(PART, chain(&error));
                    renew_at = SystemTime::now() + RETRY;
                }
            }
        }
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        Some(current.clone())
    }
}

fn certified(
    ca: &Ca,
    names: &[String],
    validity: Duration,
) -> Result<(CertifiedKey, SystemTime), ServingCertificateError> {
    let identity = ca.sign_server(names, validity, SystemTime::now())?;
    let key = CertifiedKey::from_der(identity.chain, identity.key, &aws_lc_rs::default_provider())
        .map_err(ServingCertificateError::Key)?;
    Ok((key, identity.renew_at))
}

#[cfg(test)]
mod tests;
