//! 15006: a connection from outside the mesh to a pod of this node.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::access::Facts;
use crate::copy;
use crate::local::LocalWorkload;
use crate::metrics::Reporter;
use crate::policy::{self, Denied};
use crate::shared::{NotDiscovered, Shared};
use crate::socket::{self, DialError};

#[derive(Debug, thiserror::Error)]
enum PlaintextError {
    #[error("it did not come by redirection: its destination is the proxy itself")]
    NotRedirected,
    #[error("no pod of this node that is in the mesh has the destination address")]
    Unknown,
    #[error(transparent)]
    NotDiscovered(#[from] NotDiscovered),
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
    let workload = shared.pod_at(destination.ip());
    let mut facts = Facts {
        reporter: Reporter::Destination,
        source: peer,
        destination,
        source_workload: None,
        destination_workload: None,
        source_identity: None,
        destination_identity: workload.as_ref().map(|workload| workload.identity.clone()),
        service: None,
        mutual_tls: false,
    };
    match Box::pin(open(&shared, workload.as_deref(), &mut facts)).await {
        Ok(server) => {
            let log = facts.opened(&shared.metrics);
            let (transferred, result) = copy::sockets(stream, server).await;
            log.closed(transferred, &result);
        }
        Err(error) => {
            let denied = matches!(error, PlaintextError::Denied(_));
            let flags = if denied { "DENY" } else { "CONNECT" };
            facts.failed(&shared.metrics, flags, &error);
            socket::reset(stream);
        }
    }
}

async fn open(
    shared: &Shared,
    workload: Option<&LocalWorkload>,
    facts: &mut Facts,
) -> Result<TcpStream, PlaintextError> {
    let (source, destination) = (facts.source.ip(), facts.destination);
    if shared.is_own(destination.ip()) {
        return Err(PlaintextError::NotRedirected);
    }
    let workload = workload.ok_or(PlaintextError::Unknown)?;
    shared.wait_discovered().await?;
    let directory = shared.directory.load_full();
    facts.source_workload = directory.workload_at(source).cloned();
    facts.destination_workload = directory.workload(&workload.uid).cloned();
    let connection = policy::Connection {
        client: None,
        source,
        destination,
    };
    let known = facts.destination_workload.as_deref();
    policy::check(&directory, known, &workload.namespace, &connection)?;
    Ok(shared.dial_pod(source, workload, destination).await?)
}
