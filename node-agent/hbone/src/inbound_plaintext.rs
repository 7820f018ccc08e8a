//! 15006: a connection from outside the mesh to a pod of this node.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::access::Facts;
use crate::copy;
use crate::metrics::Reporter;
use crate::policy::{self, Denied};
use crate::shared::Shared;
use crate::socket::{self, DialError};
use crate::upstream;

#[derive(Debug, thiserror::Error)]
enum PlaintextError {
    #[error("it did not come by redirection: its destination is the proxy itself")]
    NotRedirected,
    #[error("no pod of this node that is in the mesh has the destination address")]
    Unknown,
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Dial(#[from] DialError),
}

/// Serves one accepted connection to its end.
pub(crate) async fn serve(shared: Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    let Ok(destination) = stream.local_addr() else {
        return socket::reset(stream);
    };
    let workload = shared.local.load().at(destination.ip()).cloned();
    let directory = shared.directory.load_full();
    let facts = Facts {
        reporter: Reporter::destination,
        source: peer,
        destination,
        source_workload: directory.workload_at(peer.ip()).cloned(),
        destination_workload: directory.workload_at(destination.ip()).cloned(),
        source_identity: None,
        destination_identity: workload.as_ref().map(|workload| workload.identity.clone()),
        service: None,
        mutual_tls: false,
    };
    let namespace = workload.map(|workload| workload.namespace.clone());
    match open(&shared, namespace.as_deref(), peer, destination, &facts).await {
        Ok(server) => {
            let log = facts.opened(&shared.metrics);
            let (transferred, result) = copy::sockets(stream, server).await;
            log.closed(transferred, &result);
        }
        Err(error) => {
            let flags = if matches!(error, PlaintextError::Denied(_)) {
                "DENY"
            } else {
                "CONNECT"
            };
            facts.failed(&shared.metrics, flags, &error);
            socket::reset(stream);
        }
    }
}

async fn open(
    shared: &Shared,
    namespace: Option<&str>,
    peer: SocketAddr,
    destination: SocketAddr,
    facts: &Facts,
) -> Result<TcpStream, PlaintextError> {
    if upstream::is_own(shared.settings.own_address, destination) {
        return Err(PlaintextError::NotRedirected);
    }
    let namespace = namespace.ok_or(PlaintextError::Unknown)?;
    let connection = policy::Connection {
        client: None,
        source: peer.ip(),
        destination,
    };
    let directory = shared.directory.load_full();
    policy::check(
        &directory,
        facts.destination_workload.as_deref(),
        namespace,
        &connection,
    )?;
    let from = (destination.ip() != peer.ip()).then_some(peer.ip());
    Ok(socket::dial(from, destination).await?)
}
