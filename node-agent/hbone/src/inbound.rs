//! 15008: HBONE towards the pods of this node.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Method, Request, Response, StatusCode};
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::access::Facts;
use crate::authority;
use crate::copy::{self, Transferred};
use crate::identity::SpiffeId;
use crate::local::LocalWorkload;
use crate::metrics::{ADDRESS_FAMILY, Reporter};
use crate::policy::{self, Denied};
use crate::shared::{NotDiscovered, Shared};
use crate::socket::{self, DialError};
use crate::tls::{self, HandshakeFailure, PeerError};
use crate::tunnel::{self, ServerConnection};

/// Ports of the proxy itself, which nobody may be connected to.
const OWN_PORTS: [u16; 3] = [15001, 15006, 15008];

/// How long TLS and HTTP/2 may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a peer was not let in.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("no pod of this node that is in the mesh has this address")]
    UnknownDestination,
    #[error("there is no valid certificate of {0} yet")]
    NoCertificate(SpiffeId),
    #[error("TLS: {0}")]
    Tls(HandshakeFailure),
    #[error("the client presented no certificate")]
    NoClientCertificate,
    #[error(transparent)]
    Client(#[from] PeerError),
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    #[error("TLS and HTTP/2 were not done in {HANDSHAKE_TIMEOUT:?}")]
    Timeout,
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("the method is {0}, wanted is CONNECT")]
    Method(Method),
    #[error("the authority {0:?} is no address and port")]
    Authority(String),
    #[error("the authority {authority} is not an address of the destination pod {destination}")]
    Mismatch {
        authority: SocketAddr,
        destination: SocketAddr,
    },
    #[error("the pod is no longer in the mesh")]
    Unknown,
    #[error("port {0} is the proxy's own")]
    OwnPort(u16),
    #[error(transparent)]
    NotDiscovered(#[from] NotDiscovered),
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Dial(#[from] DialError),
}

impl HandshakeError {
    fn flags(&self) -> &'static str {
        match self {
            Self::UnknownDestination => "CONNECT",
            Self::NoCertificate(_) => "IDENTITY_ERROR",
            Self::Http2(_) => "H2_HANDSHAKE_FAILURE",
            Self::Tls(_) | Self::NoClientCertificate | Self::Client(_) | Self::Timeout => {
                "TLS_FAILURE"
            }
        }
    }
}

impl RequestError {
    /// The codes of the field.
    fn status(&self) -> StatusCode {
        match self {
            Self::Method(_)
            | Self::Authority(_)
            | Self::Mismatch { .. }
            | Self::Dial(DialError::Family(..)) => StatusCode::BAD_REQUEST,
            Self::Denied(_) => StatusCode::UNAUTHORIZED,
            Self::Unknown | Self::OwnPort(_) | Self::NotDiscovered(_) | Self::Dial(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }

    fn flags(&self) -> &'static str {
        match self {
            Self::Denied(_) => "DENY",
            Self::Dial(DialError::Family(..)) => ADDRESS_FAMILY,
            _ => "CONNECT",
        }
    }
}

/// Who is at both ends of a connection, as the handshake proved it.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) client: SpiffeId,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) workload: Arc<LocalWorkload>,
}

/// Serves one connection of another proxy to its end. `destination` is what the client connected to.
pub(crate) async fn serve_stream<S>(
    shared: Arc<Shared>,
    stream: S,
    source: SocketAddr,
    destination: SocketAddr,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let workload = shared.pod_at(destination.ip());
    // Boxed: what a handshake needs is not kept while the connection lives.
    let handshake = Box::pin(handshake(&shared, workload, stream, source, destination));
    let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await;
    match shaken.unwrap_or(Err(HandshakeError::Timeout)) {
        Ok((connection, ends)) => serve_requests(&shared, connection, Arc::new(ends)).await,
        Err(error) => {
            let facts = facts(&shared, source, destination);
            facts.failed(&shared.metrics, error.flags(), &error);
        }
    }
}

fn facts(shared: &Shared, source: SocketAddr, destination: SocketAddr) -> Facts {
    let directory = shared.directory.load();
    let pod = shared.pod_at(destination.ip());
    Facts {
        reporter: Reporter::Destination,
        source,
        destination,
        source_workload: directory.workload_at(source.ip()).cloned(),
        destination_workload: pod
            .as_ref()
            .and_then(|pod| directory.workload(&pod.uid).cloned()),
        source_identity: None,
        destination_identity: pod.map(|pod| pod.identity.clone()),
        service: None,
        mutual_tls: true,
    }
}

async fn handshake<S>(
    shared: &Shared,
    workload: Option<Arc<LocalWorkload>>,
    stream: S,
    source: SocketAddr,
    destination: SocketAddr,
) -> Result<(ServerConnection<TlsStream<S>>, Ends), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let failed = |error| HandshakeError::Tls(HandshakeFailure(error));
    let workload = workload.ok_or(HandshakeError::UnknownDestination)?;
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream);
    let start = start.await.map_err(failed)?;
    // Names are not looked at: a pod's address says which certificate to present.
    let certificate = shared.certificates.get(&workload.identity);
    let certificate =
        certificate.ok_or_else(|| HandshakeError::NoCertificate(workload.identity.clone()))?;
    let stream = start.into_stream(certificate.server()).await;
    let stream = stream.map_err(failed)?;
    let presented = stream.get_ref().1.peer_certificates();
    let leaf = presented.and_then(<[_]>::first);
    let client = tls::identity_of(leaf.ok_or(HandshakeError::NoClientCertificate)?)?;
    let connection = tunnel::accept(stream).await?;
    let ends = Ends {
        client,
        source,
        destination,
        workload,
    };
    Ok((connection, ends))
}

/// Serves the requests of a peer that is known until it ends.
pub(crate) async fn serve_requests<S>(
    shared: &Arc<Shared>,
    mut connection: ServerConnection<S>,
    ends: Arc<Ends>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let keepalive = tunnel::keepalive(connection.ping_pong());
    tokio::pin!(keepalive);
    let mut draining = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    tokio::spawn(answer(shared.clone(), ends.clone(), request, respond));
                }
                Some(Err(error)) => {
                    return tracing::debug!(source = %ends.source, %error, "tunnel ended");
                }
                None => return,
            },
            () = &mut keepalive => {
                return tracing::warn!(
                    source = %ends.source,
                    "tunnel closed: its peer does not answer pings"
                );
            }
            () = shared.draining(), if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
        }
    }
}

/// Answers one CONNECT and carries its bytes.
async fn answer(
    shared: Arc<Shared>,
    ends: Arc<Ends>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let mut facts = facts(&shared, ends.source, ends.destination);
    facts.source_identity = Some(ends.client.clone());
    let server = match Box::pin(open(&shared, &request, &ends, &mut facts)).await {
        Ok(server) => server,
        Err(error) => {
            facts.failed(&shared.metrics, error.flags(), &error);
            return refuse(respond, error.status());
        }
    };
    let send = match respond.send_response(accepted(&shared, &ends.workload, &facts), false) {
        Ok(send) => send,
        // The client has gone while the pod was dialled; the pod is not to think it was heard.
        Err(error) => {
            facts.failed(&shared.metrics, "CONNECT", &error);
            return socket::reset(server);
        }
    };
    let log = facts.opened(&shared.metrics);
    let (transferred, result) = copy::tunnel(server, send, request.into_body()).await;
    // The socket is the server's: what was read from it went back to the client.
    let transferred = Transferred {
        sent: transferred.received,
        received: transferred.sent,
    };
    log.closed(transferred, &result);
}

fn accepted(shared: &Shared, workload: &LocalWorkload, facts: &Facts) -> Response<()> {
    let known = facts.destination_workload.as_deref();
    let baggage = tunnel::baggage(&shared.settings.cluster, workload, known);
    let mut response = Response::new(());
    // A name that does not fit in a header is left out: it is only for telemetry.
    if let Ok(baggage) = baggage.try_into() {
        response.headers_mut().insert("baggage", baggage);
    }
    response
}

fn refuse(mut respond: SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Err(error) = respond.send_response(response, true) {
        tracing::debug!(%error, "the refused client has gone");
    }
}

async fn open(
    shared: &Shared,
    request: &Request<RecvStream>,
    ends: &Ends,
    facts: &mut Facts,
) -> Result<TcpStream, RequestError> {
    let to = destination_of(request, ends.destination, &ends.workload.addresses)?;
    facts.destination = to;
    // The address may have gone to another pod, which is not the one that the client knows.
    if !shared.is_at(&ends.workload, to.ip()) {
        return Err(RequestError::Unknown);
    }
    if OWN_PORTS.contains(&to.port()) {
        return Err(RequestError::OwnPort(to.port()));
    }
    shared.wait_discovered().await?;
    let connection = policy::Connection {
        client: Some(&ends.client),
        source: ends.source.ip(),
        destination: to,
    };
    let directory = shared.directory.load_full();
    let known = directory.workload(&ends.workload.uid).map(|known| &**known);
    policy::check(&directory, known, &ends.workload.namespace, &connection)?;
    let client = ends.source.ip();
    Ok(shared.dial_pod(client, &ends.workload, to).await?)
}

/// Where the client wants to go: to an address of the pod whose certificate it was shown.
fn destination_of<B>(
    request: &Request<B>,
    destination: SocketAddr,
    of_pod: &[IpAddr],
) -> Result<SocketAddr, RequestError> {
    if request.method() != Method::CONNECT {
        return Err(RequestError::Method(request.method().clone()));
    }
    let authority = request.uri().authority();
    let text = authority.map_or("", |authority| authority.as_str());
    let authority =
        authority::parse(text).ok_or_else(|| RequestError::Authority(text.to_owned()))?;
    if !of_pod.contains(&authority.ip()) {
        return Err(RequestError::Mismatch {
            authority,
            destination,
        });
    }
    Ok(authority)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(method: Method, uri: &str) -> Result<SocketAddr, StatusCode> {
        let request = Request::builder().method(method).uri(uri).body(()).unwrap();
        let destination = "10.0.0.1:15008".parse().unwrap();
        let of_pod = ["10.0.0.1", "fd00::1"].map(|ip| ip.parse().unwrap());
        destination_of(&request, destination, &of_pod).map_err(|error| error.status())
    }

    #[test]
    fn only_a_connect_to_the_pod_itself_is_taken() {
        for own in ["10.0.0.1:80", "[fd00::1]:80"] {
            assert_eq!(check(Method::CONNECT, own), Ok(own.parse().unwrap()));
        }
        for other in [
            "10.0.0.2:80",
            "[fd00::2]:80",
            "[::ffff:10.0.0.1]:80",
            "web.shop:80",
        ] {
            assert_eq!(
                check(Method::CONNECT, other),
                Err(StatusCode::BAD_REQUEST),
                "{other}"
            );
        }
        assert_eq!(
            check(Method::GET, "http://10.0.0.1:80/"),
            Err(StatusCode::BAD_REQUEST)
        );
    }

    #[test]
    fn refusals_have_the_codes_of_the_field() {
        assert_eq!(
            RequestError::Denied(Denied::NotAllowed).status(),
            StatusCode::UNAUTHORIZED
        );
        assert_eq!(
            RequestError::Unknown.status(),
            StatusCode::SERVICE_UNAVAILABLE
        );
        assert_eq!(
            RequestError::OwnPort(15008).status(),
            StatusCode::SERVICE_UNAVAILABLE
        );
    }
}
