//! Opens connections to other proxies: dial from the pod's own address, TLS, HTTP/2.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use crate::identity::SpiffeId;
use crate::inbound;
use crate::local::LocalWorkload;
use crate::pool::Connection;
use crate::shared::Shared;
use crate::socket::{self, DialError};
use crate::tls::HandshakeFailure;
use crate::tunnel;

/// How long TLS and HTTP/2 may take once the socket is connected.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to another proxy that could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("there is no valid certificate of {0} yet")]
    NoCertificate(SpiffeId),
    #[error("the destination's proxy: {0}")]
    Dial(#[from] DialError),
    #[error("prepare TLS: {0}")]
    Config(#[from] rustls::Error),
    #[error("TLS to {0}: {1}")]
    Tls(SocketAddr, HandshakeFailure),
    #[error("HTTP/2 to {0}: {1}")]
    Http2(SocketAddr, #[source] h2::Error),
    #[error("TLS to {0}: not done in {HANDSHAKE_TIMEOUT:?}")]
    Timeout(SocketAddr),
}

/// The other end of a tunnel.
#[derive(Debug)]
pub(crate) struct Peer<'a> {
    pub(crate) uid: &'a Arc<str>,
    pub(crate) identity: &'a SpiffeId,
    /// The pod's address and its own port.
    pub(crate) endpoint: SocketAddr,
    /// A pod of this node.
    pub(crate) local: bool,
}

impl ConnectError {
    pub(crate) fn flags(&self) -> &'static str {
        match self {
            Self::NoCertificate(_) => "IDENTITY_ERROR",
            Self::Dial(_) => "CONNECT",
            Self::Config(_) | Self::Tls(..) | Self::Timeout(_) => "TLS_FAILURE",
            Self::Http2(..) => "H2_HANDSHAKE_FAILURE",
        }
    }
}

/// Connects `source`, a pod of this node that called from `from`, to the proxy of `peer`.
pub(crate) async fn connect(
    shared: &Arc<Shared>,
    source: &LocalWorkload,
    from: SocketAddr,
    address: SocketAddr,
    peer: &Peer<'_>,
) -> Result<Arc<Connection>, ConnectError> {
    let certificate = shared
        .certificates
        .get(&source.identity)
        .ok_or_else(|| ConnectError::NoCertificate(source.identity.clone()))?;
    let tls = TlsConnector::from(certificate.client(peer.identity.clone())?);
    if peer.local {
        // The way to this address leads to the pod itself, so the tunnel stays in this process.
        let (ours, theirs) = tokio::io::duplex(256 * 1024);
        let serve = inbound::serve_stream(shared.clone(), theirs, from, address);
        tokio::spawn(serve);
        return establish(tls, ours, address).await;
    }
    let stream = socket::dial(Some(from.ip()), address).await?;
    establish(tls, stream, address).await
}

async fn establish<S>(
    tls: TlsConnector,
    stream: S,
    address: SocketAddr,
) -> Result<Arc<Connection>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = async {
        // No name is sent; the peer is known by its identity.
        let name = ServerName::IpAddress(address.ip().into());
        let connected = tls.connect(name, stream).await;
        let stream =
            connected.map_err(|error| ConnectError::Tls(address, HandshakeFailure(error)))?;
        let opened = tunnel::connect(stream).await;
        opened.map_err(|error| ConnectError::Http2(address, error))
    };
    let (send, drive) = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_| ConnectError::Timeout(address))??;
    let connection = Connection::new(send);
    let ended = Arc::downgrade(&connection);
    tokio::spawn(async move {
        drive.await;
        if let Some(connection) = ended.upgrade() {
            connection.close();
        }
    });
    Ok(connection)
}
