//! Delta discovery over gRPC: one task per client carries what [`delta`] decides.
//!
//! A client that reads slowly holds up only its own task. Meanwhile changes do not queue: the next
//! push is the difference between what it was told and what is true then. Of clients that are told
//! much at once a few have their turn and the others wait, so that a thousand that come back together
//! do not need the memory of a thousand.

mod delta;
mod session;
mod streams;

use std::sync::Arc;

use protocol::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use protocol::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use self::session::{Session, Turns};
use self::streams::Streams;
use crate::authenticate::{Authenticator, peer};
use crate::metrics::Metrics;
use crate::model::Published;

/// Responses that wait for the connection, beyond what it buffers itself.
const WAITING_RESPONSES: usize = 2;

/// The service.
pub(crate) struct Discovery {
    authenticator: Arc<Authenticator>,
    published: Published,
    turns: Turns,
    streams: Streams,
    metrics: Metrics,
    stop: CancellationToken,
}

impl Discovery {
    pub(crate) fn new(
        authenticator: Arc<Authenticator>,
        published: Published,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        Self {
            authenticator,
            published,
            turns: Turns::default(),
            streams: Streams::default(),
            metrics,
            stop,
        }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let caller = match self.authenticator.authenticate(request.metadata()).await {
            Ok(caller) => caller,
            Err(error) => {
                self.metrics.unauthenticated.inc();
                let from = peer(&request);
                tracing::warn!(from, "refused a client of discovery: {error}");
                return Err(error.into());
            }
        };
        let Some(open) = self.streams.open(&caller.node) else {
            let (node, pod) = (&caller.node, &caller.pod_name);
            tracing::warn!(%node, pod, "refused one more stream of discovery: the node has too many");
            return Err(Status::resource_exhausted(
                "this node has too many streams of discovery open",
            ));
        };
        let (responses, stream) = mpsc::channel(WAITING_RESPONSES);
        let session = Session::new(
            caller,
            self.published.clone(),
            responses,
            self.turns.clone(),
            self.metrics.clone(),
        );
        let served = session.run(request.into_inner(), self.stop.clone());
        tokio::spawn(async move {
            served.await;
            drop(open);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
