//! 15001: a connection of a pod of this node.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::access::{Facts, with_causes};
use crate::connect::{self, ConnectError, Peer};
use crate::copy;
use crate::local::LocalWorkload;
use crate::metrics::{ADDRESS_FAMILY, Reporter};
use crate::policy::{self, Denied};
use crate::pool::{Key, Lease};
use crate::shared::{NotDiscovered, Shared};
use crate::socket::{self, DialError};
use crate::tunnel::{self, ConnectHeaders, TunnelError};
use crate::upstream::{self, HBONE_PORT, Refusal, Upstream};

/// A pod that enters or leaves the mesh is announced and redirected at slightly different times:
/// for so long a proxy that refuses is asked again, with what is known by then.
const RETRY_FOR: Duration = Duration::from_secs(2);
const RETRY_EVERY: Duration = Duration::from_millis(100);

/// How often a stream is tried on connections that turn out to take none.
const STREAM_TRIES: usize = 3;

/// Why a connection of a pod did not get to its destination.
#[derive(Debug, thiserror::Error)]
enum OutboundError {
    #[error("it did not come by redirection: its destination is the proxy itself")]
    NotRedirected,
    #[error("no pod of this node that is in the mesh has the source address")]
    UnknownSource,
    #[error(transparent)]
    NotDiscovered(#[from] NotDiscovered),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("{0}")]
    Connect(Arc<ConnectError>),
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
}

impl OutboundError {
    fn flags(&self) -> &'static str {
        match self {
            Self::Denied(_) => "DENY",
            Self::Refused(Refusal::OtherFamily { .. }) => ADDRESS_FAMILY,
            Self::Connect(error) => error.flags(),
            _ => "CONNECT",
        }
    }

    fn is_worth_retrying(&self) -> bool {
        match self {
            Self::Connect(error) => match &**error {
                ConnectError::NoCertificate(_) => true,
                ConnectError::Dial(error) => error.is_refusal(),
                _ => false,
            },
            // Who has the address now is known, or may be announced in a moment.
            Self::Refused(Refusal::Gone(_)) | Self::Dial(DialError::Moved(_)) => true,
            _ => false,
        }
    }
}

/// A way that is open.
enum Opened {
    Socket(TcpStream),
    Tunnel(Lease, h2::SendStream<Bytes>, h2::RecvStream),
}

/// Serves one accepted connection to its end.
pub(crate) async fn serve(shared: Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    let Ok(destination) = stream.local_addr() else {
        return socket::reset(stream);
    };
    let source = shared.pod_at(peer.ip());
    let mut facts = facts(&shared, source.as_ref(), peer, destination);
    // Boxed: what opening needs is not kept while bytes are copied.
    let opened = Box::pin(open(&shared, source, &mut facts)).await;
    match opened {
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
            facts.failed(&shared.metrics, error.flags(), &error);
            socket::reset(stream);
        }
    }
}

fn facts(
    shared: &Shared,
    source: Option<&Arc<LocalWorkload>>,
    peer: SocketAddr,
    destination: SocketAddr,
) -> Facts {
    let directory = shared.directory.load();
    Facts {
        reporter: Reporter::Source,
        source: peer,
        destination,
        source_workload: source.and_then(|source| directory.workload(&source.uid).cloned()),
        destination_workload: None,
        source_identity: source.map(|source| source.identity.clone()),
        destination_identity: None,
        service: None,
        mutual_tls: false,
    }
}

async fn open(
    shared: &Arc<Shared>,
    source: Option<Arc<LocalWorkload>>,
    facts: &mut Facts,
) -> Result<Opened, OutboundError> {
    if shared.is_own(facts.destination.ip()) {
        return Err(OutboundError::NotRedirected);
    }
    let source = source.ok_or(OutboundError::UnknownSource)?;
    shared.wait_discovered().await?;
    let start = Instant::now();
    loop {
        match try_all(shared, &source, facts).await {
            Err(error) if error.is_worth_retrying() && start.elapsed() < RETRY_FOR => {
                tokio::time::sleep(RETRY_EVERY).await;
            }
            result => return result,
        }
    }
}

/// Tries the ways to a destination, the best first.
async fn try_all(
    shared: &Arc<Shared>,
    source: &LocalWorkload,
    facts: &mut Facts,
) -> Result<Opened, OutboundError> {
    let destination = facts.destination;
    let choice = {
        let (directory, local) = (shared.directory.load(), shared.local.load());
        let mut random = rand::rng();
        let now = Instant::now().into_std();
        let mut choice = upstream::choose(&directory, &local, source, destination, now, |_| {
            random.random()
        })?;
        if local.get(&source.uid).is_none() {
            // It has left the mesh, as what it connects to may have too: as those of its connections that do not come
            // to us any more.
            choice.leave_mesh();
        }
        choice
    };
    facts.service = choice.service;
    let mut upstreams = choice.upstreams.into_iter().peekable();
    loop {
        let Some(upstream) = upstreams.next() else {
            // Not reached: there is at least one way, and the last one's error is returned.
            return Err(OutboundError::UnknownSource);
        };
        describe_upstream(facts, &upstream, shared.local_by_tunnel());
        match try_one(shared, source, facts, &upstream).await {
            Err(error) if upstreams.peek().is_some() => {
                tracing::debug!(endpoint = %upstream.endpoint(), error = %with_causes(&error), "trying another endpoint");
            }
            result => return result,
        }
    }
}

fn describe_upstream(facts: &mut Facts, upstream: &Upstream, local_by_tunnel: bool) {
    facts.destination_workload = upstream.workload().cloned();
    (facts.destination_identity, facts.mutual_tls) = match upstream {
        Upstream::Hbone { identity, .. } => (Some(identity.clone()), true),
        Upstream::Local { destination, .. } => {
            (Some(destination.identity.clone()), local_by_tunnel)
        }
        Upstream::Plain { .. } => (None, false),
    };
}

async fn try_one(
    shared: &Arc<Shared>,
    source: &LocalWorkload,
    facts: &Facts,
    upstream: &Upstream,
) -> Result<Opened, OutboundError> {
    let peer = facts.source;
    match upstream {
        Upstream::Plain { endpoint, .. } => {
            let socket = socket::dial_pod(peer.ip(), *endpoint).await?;
            Ok(Opened::Socket(socket))
        }
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
            let directory = shared.directory.load_full();
            let (workload, namespace) = (workload.as_deref(), &destination.namespace);
            policy::check(&directory, workload, namespace, &connection)?;
            let dialled = shared.dial_pod(peer.ip(), destination, *endpoint);
            Ok(Opened::Socket(dialled.await?))
        }
        Upstream::Local {
            destination,
            endpoint,
            ..
        } => {
            let to = Peer {
                uid: &destination.uid,
                identity: &destination.identity,
                endpoint: *endpoint,
                local: true,
            };
            tunnel(shared, source, facts, to).await
        }
        Upstream::Hbone {
            workload,
            identity,
            endpoint,
        } => {
            let to = Peer {
                uid: &workload.uid,
                identity,
                endpoint: *endpoint,
                local: false,
            };
            tunnel(shared, source, facts, to).await
        }
    }
}

async fn tunnel(
    shared: &Arc<Shared>,
    source: &LocalWorkload,
    facts: &Facts,
    to: Peer<'_>,
) -> Result<Opened, OutboundError> {
    let address = SocketAddr::new(to.endpoint.ip(), HBONE_PORT);
    let key = Key {
        source: source.uid.clone(),
        destination: to.uid.clone(),
        identity: to.identity.clone(),
        address,
    };
    let mut tries = 0;
    loop {
        tries += 1;
        let connect = async || connect::connect(shared, source, facts.source, address, &to).await;
        let lease = shared.pool.lease(&key, connect).await;
        let lease = lease.map_err(OutboundError::Connect)?;
        match tunnel::open(lease.send(), to.endpoint, headers(shared, source, facts)).await {
            Ok((send, receive)) => return Ok(Opened::Tunnel(lease, send, receive)),
            Err(error) if error.is_of_connection() => {
                lease.close();
                // A connection that was open already may have been closing.
                if lease.fresh || tries == STREAM_TRIES {
                    return Err(error.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn headers(shared: &Shared, source: &LocalWorkload, facts: &Facts) -> ConnectHeaders {
    let mut random = rand::rng();
    let (peer, known) = (facts.source, facts.source_workload.as_deref());
    ConnectHeaders {
        baggage: tunnel::baggage(&shared.settings.cluster, source, known),
        forwarded: match &facts.service {
            Some(service) => format!("for=\"{peer}\";host={}", service.hostname),
            None => format!("for=\"{peer}\""),
        },
        traceparent: format!(
            "00-{:032x}-{:016x}-00",
            random.random::<u128>(),
            random.random::<u64>()
        ),
    }
}
