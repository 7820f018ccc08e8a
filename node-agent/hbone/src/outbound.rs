//! 15001: a connection of a pod of this node.

use std::net::SocketAddr;
use std::sync::Arc;

use rand::Rng;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::access::Facts;
use crate::copy;
use crate::directory::Workload;
use crate::identity::SpiffeId;
use crate::inbound;
use crate::local::LocalWorkload;
use crate::metrics::Reporter;
use crate::policy::{self, Denied};
use crate::pool::{Connection, Key, Lease};
use crate::shared::Shared;
use crate::socket::{self, DialError};
use crate::tunnel::{self, ConnectHeaders, TunnelError};
use crate::upstream::{self, HBONE_PORT, Refusal, Upstream};

/// Why a connection of a pod did not get to its destination.
#[derive(Debug, thiserror::Error)]
enum OutboundError {
    #[error("it did not come by redirection: its destination is the proxy itself")]
    NotRedirected,
    #[error("no pod of this node that is in the mesh has the source address")]
    UnknownSource,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("there is no valid certificate of {0} yet")]
    NoCertificate(SpiffeId),
    #[error("TLS to {0}: {1}")]
    Tls(SocketAddr, #[source] std::io::Error),
    #[error("TLS: {0}")]
    Config(#[from] rustls::Error),
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
}

impl OutboundError {
    fn flags(&self) -> &'static str {
        match self {
            Self::Denied(_) => "DENY",
            Self::Tls(..) | Self::Config(_) => "TLS_FAILURE",
            Self::NoCertificate(_) => "IDENTITY_ERROR",
            Self::Tunnel(TunnelError::Http2(_)) => "H2_HANDSHAKE_FAILURE",
            _ => "CONNECT",
        }
    }
}

/// A way that is open.
enum Opened {
    Socket(TcpStream),
    Tunnel(Lease, h2::SendStream<bytes::Bytes>, h2::RecvStream),
}

/// Serves one accepted connection to its end.
pub(crate) async fn serve(shared: Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    let Ok(destination) = stream.local_addr() else {
        return socket::reset(stream);
    };
    let source = shared.local.load().at(peer.ip()).cloned();
    let directory = shared.directory.load_full();
    let mut facts = Facts {
        reporter: Reporter::source,
        source: peer,
        destination,
        source_workload: directory.workload_at(peer.ip()).cloned(),
        destination_workload: None,
        source_identity: source.as_ref().map(|source| source.identity.clone()),
        destination_identity: None,
        service: None,
        mutual_tls: false,
    };
    match open(&shared, source, peer, destination, &mut facts).await {
        Ok(Opened::Socket(server)) => {
            let log = facts.opened(&shared.metrics);
            let (transferred, result) = copy::sockets(stream, server).await;
            log.closed(transferred, &result);
        }
        Ok(Opened::Tunnel(lease, send, receive)) => {
            let log = facts.opened(&shared.metrics);
            let (transferred, result) = copy::tunnel(stream, send, receive).await;
            drop(lease);
            log.closed(transferred, &result);
        }
        Err(error) => {
            facts.failed(&shared.metrics, error.flags(), &describe(&error));
            socket::reset(stream);
        }
    }
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

async fn open(
    shared: &Arc<Shared>,
    source: Option<Arc<LocalWorkload>>,
    peer: SocketAddr,
    destination: SocketAddr,
    facts: &mut Facts,
) -> Result<Opened, OutboundError> {
    if upstream::is_own(shared.settings.own_address, destination) {
        return Err(OutboundError::NotRedirected);
    }
    let source = source.ok_or(OutboundError::UnknownSource)?;
    let choice = {
        let (directory, local) = (shared.directory.load(), shared.local.load());
        upstream::choose(&directory, &local, &source, destination, |_| {
            rand::rng().random()
        })?
    };
    facts.service = choice.service;
    let mut last = None;
    for upstream in choice.upstreams {
        describe_upstream(facts, &upstream);
        match try_one(shared, &source, peer, &upstream).await {
            Ok(opened) => return Ok(opened),
            Err(error) => {
                tracing::debug!(endpoint = %upstream.endpoint(), error = %describe(&error), "endpoint");
                last = Some(error);
            }
        }
    }
    // The list of ways is never empty.
    Err(last.unwrap_or(OutboundError::UnknownSource))
}

fn describe_upstream(facts: &mut Facts, upstream: &Upstream) {
    facts.destination_workload = upstream.workload().cloned();
    (facts.destination_identity, facts.mutual_tls) = match upstream {
        Upstream::Hbone { workload, .. } => (Some(workload.identity.clone()), true),
        Upstream::Local { destination, .. } => (Some(destination.identity.clone()), false),
        Upstream::Plain { .. } => (None, false),
    };
}

async fn try_one(
    shared: &Arc<Shared>,
    source: &LocalWorkload,
    peer: SocketAddr,
    upstream: &Upstream,
) -> Result<Opened, OutboundError> {
    match upstream {
        Upstream::Plain { endpoint, .. } => Ok(Opened::Socket(
            socket::dial(Some(peer.ip()), *endpoint).await?,
        )),
        Upstream::Local {
            destination,
            workload,
            endpoint,
        } if !shared.local_by_tunnel() => {
            let connection = policy::Connection {
                client: Some(&source.identity),
                source: peer.ip(),
                destination: *endpoint,
            };
            let directory = shared.directory.load();
            policy::check(
                &directory,
                workload.as_deref(),
                &destination.namespace,
                &connection,
            )?;
            // A pod does not accept packets from its own address that come from outside.
            let from = (endpoint.ip() != peer.ip()).then_some(peer.ip());
            Ok(Opened::Socket(socket::dial(from, *endpoint).await?))
        }
        Upstream::Local {
            destination,
            workload,
            endpoint,
        } => {
            let (uid, identity) = (&destination.uid, &destination.identity);
            let to = Peer {
                uid,
                identity,
                endpoint: *endpoint,
                local: true,
            };
            tunnel(shared, source, peer, to, workload.as_deref()).await
        }
        Upstream::Hbone { workload, endpoint } => {
            let (uid, identity) = (&workload.uid, &workload.identity);
            let to = Peer {
                uid,
                identity,
                endpoint: *endpoint,
                local: false,
            };
            tunnel(shared, source, peer, to, Some(workload)).await
        }
    }
}

/// The other end of a tunnel.
struct Peer<'a> {
    uid: &'a Arc<str>,
    identity: &'a SpiffeId,
    endpoint: SocketAddr,
    local: bool,
}

async fn tunnel(
    shared: &Arc<Shared>,
    source: &LocalWorkload,
    peer: SocketAddr,
    to: Peer<'_>,
    workload: Option<&Workload>,
) -> Result<Opened, OutboundError> {
    let address = SocketAddr::new(to.endpoint.ip(), HBONE_PORT);
    let key = Key {
        source: source.uid.clone(),
        destination: to.uid.clone(),
        address,
    };
    let lease = shared
        .pool
        .lease(&key, async || {
            connect(shared, source, peer, address, &to).await
        })
        .await?;
    let headers = headers(shared, source, peer, workload);
    let mut send = match lease.send().ready().await {
        Ok(send) => send,
        Err(error) => {
            lease.close();
            return Err(TunnelError::Http2(error).into());
        }
    };
    match tunnel::open(&mut send, to.endpoint, headers).await {
        Ok((send, receive)) => Ok(Opened::Tunnel(lease, send, receive)),
        Err(error) => {
            if matches!(&error, TunnelError::Http2(error) if error.is_io() || error.is_go_away()) {
                lease.close();
            }
            Err(error.into())
        }
    }
}

async fn connect(
    shared: &Arc<Shared>,
    source: &LocalWorkload,
    peer: SocketAddr,
    address: SocketAddr,
    to: &Peer<'_>,
) -> Result<Arc<Connection>, OutboundError> {
    let certificate = shared
        .certificates
        .get(&source.identity)
        .ok_or_else(|| OutboundError::NoCertificate(source.identity.clone()))?;
    let connector = TlsConnector::from(certificate.client(to.identity.clone())?);
    // No name is sent; the peer is known by its identity.
    let name = ServerName::IpAddress(address.ip().into());
    if to.local {
        // The way to this address leads to the pod itself, so the tunnel stays in this process.
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        tokio::spawn(inbound::serve_stream(shared.clone(), theirs, peer, address));
        let stream = connector.connect(name, ours).await;
        return established(stream.map_err(|error| OutboundError::Tls(address, error))?).await;
    }
    let stream = socket::dial(Some(peer.ip()), address).await?;
    let stream = connector.connect(name, stream).await;
    established(stream.map_err(|error| OutboundError::Tls(address, error))?).await
}

async fn established<S>(stream: S) -> Result<Arc<Connection>, OutboundError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (send, drive) = tunnel::connect(stream).await.map_err(TunnelError::Http2)?;
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

fn headers(
    shared: &Shared,
    source: &LocalWorkload,
    peer: SocketAddr,
    workload: Option<&Workload>,
) -> ConnectHeaders {
    let mut random = rand::rng();
    let name = workload.map_or("", |workload| workload.canonical_name.as_str());
    tracing::trace!(destination = name, "CONNECT");
    ConnectHeaders {
        baggage: format!(
            "k8s.cluster.name={},k8s.namespace.name={},k8s.pod.name={}",
            shared.settings.cluster, source.namespace, source.name
        ),
        forwarded: format!("for=\"{peer}\""),
        traceparent: format!(
            "00-{:032x}-{:016x}-00",
            random.random::<u128>(),
            random.random::<u64>()
        ),
    }
}
