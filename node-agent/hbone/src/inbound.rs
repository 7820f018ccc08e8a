//! 15008: HBONE towards the pods of this node.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use h2::server::SendResponse;
use http::{Method, Request, Response, StatusCode};
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::LazyConfigAcceptor;

use crate::access::Facts;
use crate::copy;
use crate::identity::SpiffeId;
use crate::local::LocalWorkload;
use crate::metrics::Reporter;
use crate::policy::{self, Denied};
use crate::shared::Shared;
use crate::socket::{self, DialError};
use crate::tls::{self, PeerError};
use crate::tunnel;

/// Ports of the proxy itself, which nobody may be connected to.
const OWN_PORTS: [u16; 3] = [15001, 15006, 15008];

/// Why a peer was not let in.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("no pod of this node that is in the mesh has this address")]
    UnknownDestination,
    #[error("there is no valid certificate of {0} yet")]
    NoCertificate(SpiffeId),
    #[error("TLS: {0}")]
    Tls(#[source] std::io::Error),
    #[error("the client presented no certificate")]
    NoClientCertificate,
    #[error(transparent)]
    Client(#[from] PeerError),
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("the method is {0}, wanted is CONNECT")]
    Method(Method),
    #[error("the authority {0:?} is no address and port")]
    Authority(String),
    #[error("the authority {authority} is not the address of the destination pod {destination}")]
    Mismatch {
        authority: SocketAddr,
        destination: SocketAddr,
    },
    #[error("the pod is no longer in the mesh")]
    Unknown,
    #[error("port {0} is the proxy's own")]
    OwnPort(u16),
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Dial(#[from] DialError),
}

impl RequestError {
    /// The codes of the field.
    fn status(&self) -> StatusCode {
        match self {
            Self::Method(_) | Self::Authority(_) | Self::Mismatch { .. } => StatusCode::BAD_REQUEST,
            Self::Denied(_) => StatusCode::UNAUTHORIZED,
            Self::Unknown | Self::OwnPort(_) | Self::Dial(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn flags(&self) -> &'static str {
        if matches!(self, Self::Denied(_)) {
            "DENY"
        } else {
            "CONNECT"
        }
    }
}

/// Who is at both ends of a connection.
#[derive(Clone, Debug)]
struct Ends {
    client: SpiffeId,
    source: SocketAddr,
    destination: SocketAddr,
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
    if let Err(error) = serve(&shared, stream, source, destination).await {
        tracing::warn!(
            target: "access",
            src.addr = %source,
            dst.addr = %destination,
            direction = "inbound",
            error = %error,
            "connection failed"
        );
    }
}

async fn serve<S>(
    shared: &Arc<Shared>,
    stream: S,
    source: SocketAddr,
    destination: SocketAddr,
) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let workload = shared
        .local
        .load()
        .at(destination.ip())
        .cloned()
        .ok_or(HandshakeError::UnknownDestination)?;
    let certificate = shared
        .certificates
        .get(&workload.identity)
        .ok_or_else(|| HandshakeError::NoCertificate(workload.identity.clone()))?;
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream)
        .await
        .map_err(HandshakeError::Tls)?;
    let stream = start
        .into_stream(certificate.server())
        .await
        .map_err(HandshakeError::Tls)?;
    let leaf = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first);
    let client = tls::identity_of(leaf.ok_or(HandshakeError::NoClientCertificate)?)?;
    let ends = Ends {
        client,
        source,
        destination,
    };
    let mut connection = tunnel::accept(stream).await?;
    let pings = connection.ping_pong();
    let keepalive = tunnel::keepalive(pings);
    tokio::pin!(keepalive);
    let mut draining = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let (shared, ends) = (shared.clone(), ends.clone());
                    tokio::spawn(async move { answer(&shared, request, respond, ends).await });
                }
                Some(Err(error)) if error.is_io() => return Ok(()),
                Some(Err(error)) => return Err(error.into()),
                None => return Ok(()),
            },
            () = &mut keepalive => {
                tracing::warn!(%source, "tunnel closed: its peer does not answer pings");
                return Ok(());
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
    shared: &Shared,
    request: Request<h2::RecvStream>,
    mut respond: SendResponse<Bytes>,
    ends: Ends,
) {
    let directory = shared.directory.load_full();
    let facts = Facts {
        reporter: Reporter::destination,
        source: ends.source,
        destination: ends.destination,
        source_workload: directory.workload_at(ends.source.ip()).cloned(),
        destination_workload: directory.workload_at(ends.destination.ip()).cloned(),
        source_identity: Some(ends.client.clone()),
        destination_identity: None,
        service: None,
        mutual_tls: true,
    };
    match open(shared, &request, &ends).await {
        Ok((server, workload)) => {
            let mut facts = facts;
            facts.destination_identity = Some(workload.identity.clone());
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::OK;
            let send = match respond.send_response(response, false) {
                Ok(send) => send,
                Err(error) => return facts.failed(&shared.metrics, "CONNECT", &error),
            };
            let log = facts.opened(&shared.metrics);
            let (transferred, result) = copy::tunnel(server, send, request.into_body()).await;
            // The socket is the server's: what was read from it went back to the client.
            let transferred = copy::Transferred {
                sent: transferred.received,
                received: transferred.sent,
            };
            log.closed(transferred, &result);
        }
        Err(error) => {
            facts.failed(&shared.metrics, error.flags(), &error);
            let mut response = Response::new(());
            *response.status_mut() = error.status();
            if let Err(error) = respond.send_response(response, true) {
                tracing::debug!(%error, "the refused client has gone");
            }
        }
    }
}

async fn open(
    shared: &Shared,
    request: &Request<h2::RecvStream>,
    ends: &Ends,
) -> Result<(tokio::net::TcpStream, Arc<LocalWorkload>), RequestError> {
    let to = destination_of(request, ends.destination)?;
    let workload = shared
        .local
        .load()
        .at(to.ip())
        .cloned()
        .ok_or(RequestError::Unknown)?;
    if OWN_PORTS.contains(&to.port()) {
        return Err(RequestError::OwnPort(to.port()));
    }
    let connection = policy::Connection {
        client: Some(&ends.client),
        source: ends.source.ip(),
        destination: to,
    };
    let directory = shared.directory.load_full();
    let known = directory.workload_at(to.ip()).map(|known| &**known);
    policy::check(&directory, known, &workload.namespace, &connection)?;
    let from = (to.ip() != ends.source.ip()).then_some(ends.source.ip());
    Ok((socket::dial(from, to).await?, workload))
}

fn destination_of<B>(
    request: &Request<B>,
    destination: SocketAddr,
) -> Result<SocketAddr, RequestError> {
    if request.method() != Method::CONNECT {
        return Err(RequestError::Method(request.method().clone()));
    }
    let text = request
        .uri()
        .authority()
        .map(ToString::to_string)
        .unwrap_or_default();
    let authority: SocketAddr = text
        .parse()
        .map_err(|_| RequestError::Authority(text.clone()))?;
    if authority.ip() != destination.ip() {
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
        destination_of(&request, destination).map_err(|error| error.status())
    }

    #[test]
    fn only_a_connect_to_the_pod_itself_is_taken() {
        assert_eq!(
            check(Method::CONNECT, "10.0.0.1:80"),
            Ok("10.0.0.1:80".parse().unwrap())
        );
        assert_eq!(
            check(Method::CONNECT, "10.0.0.2:80"),
            Err(StatusCode::BAD_REQUEST)
        );
        assert_eq!(
            check(Method::CONNECT, "web.shop:80"),
            Err(StatusCode::BAD_REQUEST)
        );
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
