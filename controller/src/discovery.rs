//! Delta discovery over gRPC: one task per client carries what [`delta`] decides.
//!
//! A client that reads slowly holds up only its own task. Meanwhile changes do not queue: the next
//! push is the difference between what it was told and what is true then.

mod delta;

use std::sync::Arc;

use protocol::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use protocol::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use self::delta::{Client, Push, Reaction};
use crate::authenticate::{Authenticator, peer};
use crate::authorize::Caller;
use crate::directory::Directory;
use crate::metrics::{Metrics, TypeLabel};
use crate::model::Published;

/// Responses that wait for the connection, beyond what it buffers itself.
const WAITING_RESPONSES: usize = 2;

/// The service.
pub(crate) struct Discovery {
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) published: Published,
    pub(crate) metrics: Metrics,
    pub(crate) stop: CancellationToken,
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
        let (responses, stream) = mpsc::channel(WAITING_RESPONSES);
        let mut published = self.published.clone();
        let session = Session {
            caller,
            client: Client::new(directory(&mut published)),
            responses,
            metrics: self.metrics.clone(),
        };
        tokio::spawn(session.run(request.into_inner(), published, self.stop.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// One client's stream.
struct Session {
    caller: Caller,
    client: Client,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    metrics: Metrics,
}

/// The client is gone.
struct Gone;

impl Session {
    async fn run(
        mut self,
        requests: Streaming<DeltaDiscoveryRequest>,
        published: Published,
        stop: CancellationToken,
    ) {
        let (node, pod) = (self.caller.node.clone(), self.caller.pod_name.clone());
        tracing::info!(%node, pod, "a client of discovery connected");
        self.metrics.clients.inc();
        tokio::select! {
            _ = self.serve(requests, published) => {}
            () = stop.cancelled() => {
                // The client turns to another replica.
                let _ = self.responses.try_send(Err(Status::unavailable("the controller ends")));
            }
        }
        self.metrics.clients.dec();
        tracing::info!(%node, pod, "a client of discovery is gone");
    }

    async fn serve(
        &mut self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        mut published: Published,
    ) -> Result<(), Gone> {
        loop {
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.on_request(request).await?,
                    Ok(None) => return Err(Gone),
                    Err(status) => {
                        tracing::debug!(node = %self.caller.node, "the stream ended: {status}");
                        return Err(Gone);
                    }
                },
                changed = published.changed() => {
                    changed.map_err(|_| Gone)?;
                    let directory = directory(&mut published);
                    if let Some(push) = self.client.on_directory(directory) {
                        self.push(push).await?;
                    }
                }
            }
        }
    }

    async fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Gone> {
        match self.client.on_request(request) {
            Reaction::Push(push) => self.push(push).await?,
            Reaction::Nothing => {}
            Reaction::Rejected {
                resource_type,
                message,
            } => {
                let r#type = resource_type.label();
                self.metrics
                    .rejections
                    .get_or_create(&TypeLabel { r#type })
                    .inc();
                let (node, pod) = (&self.caller.node, &self.caller.pod_name);
                tracing::warn!(%node, pod, r#type, "the client rejected a response: {message}");
            }
            Reaction::UnknownType(type_url) => {
                let (node, pod) = (&self.caller.node, &self.caller.pod_name);
                tracing::warn!(%node, pod, type_url, "the client asks for an unknown type");
            }
        }
        Ok(())
    }

    async fn push(&mut self, push: Push) -> Result<(), Gone> {
        let label = TypeLabel {
            r#type: push.resource_type.label(),
        };
        for response in self.client.responses(push) {
            self.metrics.pushes.get_or_create(&label).inc();
            self.metrics
                .pushed_resources
                .get_or_create(&label)
                .inc_by(response.resources.len() as u64);
            self.responses.send(Ok(response)).await.map_err(|_| Gone)?;
        }
        Ok(())
    }
}

/// The newest; nobody is served before there is one.
fn directory(published: &mut Published) -> Directory {
    let model = published.borrow_and_update();
    model
        .as_ref()
        .map(|model| model.directory.clone())
        .unwrap_or_default()
}
