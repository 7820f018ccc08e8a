//! The directory, by delta xDS from the controller.
//!
//! ```text
//!  connect ─▶ subscribe to both types, naming what we have ─▶ ┌ response ─▶ absorb ─▶ swap directory ┐
//!     ▲                                                       └───────────── ACK or NACK ◀───────────┘
//!     └──────── backoff ◀─── closed; the directory stays as it is
//! ```

pub(crate) mod absorb;
mod intern;
mod parse;
mod policy;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hbone::{Shared, with_causes};
use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use protocol::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use protocol::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use rand::Rng;
use tokio::sync::mpsc;
use tokio::task::JoinError;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use absorb::{Held, Kind as Type};

use crate::args::Args;
use crate::control_plane::{CallError, ControlPlane, ControlPlaneError};
use crate::status::Status;

/// Largest message of the controller in bytes.
const LARGEST_MESSAGE: usize = 200 << 20;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(15);
/// From so many resources on a response is worked on beside the threads that carry traffic.
const BULKY: usize = 200;

/// A connection to the controller that ended.
#[derive(Debug, thiserror::Error)]
enum DiscoveryError {
    #[error(transparent)]
    ControlPlane(#[from] ControlPlaneError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the controller closed the stream")]
    Closed,
    #[error("work on a response")]
    Absorb(#[from] JoinError),
}

/// What fills the directory.
pub(crate) struct Discovery {
    pub(crate) control_plane: Arc<ControlPlane>,
    pub(crate) node: Node,
    pub(crate) shared: Arc<Shared>,
    pub(crate) status: Arc<Status>,
}

impl Discovery {
    /// Keeps the directory up to date for ever.
    pub(crate) async fn run(self) {
        let mut held = Held::new(self.shared.settings.trust_domain.clone());
        let mut wait = BACKOFF_FIRST;
        loop {
            let Err(error) = self.converse(&mut held).await;
            let was_connected = self.status.discovery.swap(false, Ordering::Relaxed);
            tracing::warn!(
                error = with_causes(&error),
                "no controller; the directory stays as it is"
            );
            wait = if was_connected {
                BACKOFF_FIRST
            } else {
                (wait * 2).min(BACKOFF_LAST)
            };
            // Not all proxies at once when a controller comes back.
            let jitter = rand::rng().random_range(0.5..1.5);
            tokio::time::sleep(wait.mul_f64(jitter)).await;
        }
    }

    async fn converse(&self, held: &mut Held) -> Result<std::convert::Infallible, DiscoveryError> {
        let channel = self.control_plane.channel().await?;
        let mut client = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(LARGEST_MESSAGE);
        let (requests, outgoing) = mpsc::channel(8);
        for kind in Type::ALL {
            let request = DeltaDiscoveryRequest {
                node: Some(self.node.clone()),
                type_url: kind.url().to_owned(),
                initial_resource_versions: held.versions(kind),
                ..DeltaDiscoveryRequest::default()
            };
            send(&requests, request).await?;
        }
        let outgoing = ReceiverStream::new(outgoing);
        let request = self.control_plane.request(outgoing).await?;
        let responses = client.delta_aggregated_resources(request).await;
        let mut responses: Streaming<DeltaDiscoveryResponse> =
            responses.map_err(CallError::from)?.into_inner();
        loop {
            let response = responses.message().await.map_err(CallError::from)?;
            let response = response.ok_or(DiscoveryError::Closed)?;
            if !self.status.discovery.swap(true, Ordering::Relaxed) {
                tracing::info!("discovery is connected");
            }
            let answer = self.absorb(held, response).await?;
            send(&requests, answer).await?;
        }
    }

    /// Takes a response in; gives what is to be answered.
    async fn absorb(
        &self,
        held: &mut Held,
        response: DeltaDiscoveryResponse,
    ) -> Result<DeltaDiscoveryRequest, DiscoveryError> {
        let (type_url, nonce) = (response.type_url.clone(), response.nonce.clone());
        let now = Instant::now();
        let rejected = if response.resources.len() < BULKY {
            let rejected = held.absorb(response, now);
            publish(&self.shared, held);
            rejected
        } else {
            let mut moved = std::mem::replace(held, Held::new(held.trust_domain().clone()));
            let shared = self.shared.clone();
            // To free what was known before takes as long as to take in what is known now.
            let work = tokio::task::spawn_blocking(move || {
                let rejected = moved.absorb(response, now);
                publish(&shared, &moved);
                (moved, rejected)
            });
            let (moved, rejected) = work.await?;
            *held = moved;
            rejected
        };
        for rejection in &rejected {
            tracing::warn!(%rejection, "a resource of the controller is rejected");
        }
        if held.is_complete() {
            self.shared.set_discovered();
        }
        Ok(DeltaDiscoveryRequest {
            type_url,
            response_nonce: nonce,
            error_detail: absorb::error_detail(&rejected),
            ..DeltaDiscoveryRequest::default()
        })
    }
}

/// Lets connections see what is known now.
fn publish(shared: &hbone::Shared, held: &Held) {
    shared.directory.store(Arc::new(held.directory().clone()));
    shared.sweep();
}

async fn send(
    requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    request: DeltaDiscoveryRequest,
) -> Result<(), DiscoveryError> {
    let sent = requests.send(request).await;
    sent.map_err(|_| DiscoveryError::Closed)
}

/// How the proxy introduces itself, in the form that control planes of the field know.
pub(crate) fn node(args: &Args) -> Node {
    let Args {
        pod_name,
        pod_namespace,
        pod_ip,
        node_name,
        cluster_id,
        ..
    } = args;
    let text = |value: &str| Value {
        kind: Some(Kind::StringValue(value.to_owned())),
    };
    let addresses = Value {
        kind: Some(Kind::ListValue(ListValue {
            values: vec![text(&pod_ip.to_string())],
        })),
    };
    let metadata = [
        ("NAME", text(pod_name)),
        ("NAMESPACE", text(pod_namespace)),
        ("NODE_NAME", text(node_name)),
        ("CLUSTER_ID", text(cluster_id)),
        ("INSTANCE_IPS", addresses),
    ];
    let domain = format!("{pod_namespace}.svc.cluster.local");
    Node {
        id: format!("ztunnel~{pod_ip}~{pod_name}.{pod_namespace}~{domain}"),
        cluster: cluster_id.clone(),
        metadata: Some(Struct {
            fields: metadata
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
        }),
    }
}
