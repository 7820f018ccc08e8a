//! One client's stream: takes what it asks, sends what [`delta`](super::delta) decides.

use std::sync::Arc;
use std::time::Duration;

use protocol::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::delta::{Client, Push, Reaction};
use crate::authorize::Caller;
use crate::directory::Directory;
use crate::metrics::{Metrics, TypeLabel};
use crate::model::Published;

/// Clients that are told much at once: of each some responses are in memory, and while it joins all that it
/// says it has.
const TURNS: usize = 16;
/// Resources that a client is told of without waiting for its turn.
const FEW: usize = 200;
/// A client that has its turn and asks nothing for so long gives way to others, and asks later.
const ASKS_WITHIN: Duration = Duration::from_secs(5);
/// A client that has its turn and takes nothing for so long is not served any longer.
const TAKES_WITHIN: Duration = Duration::from_secs(20);

/// The turns of the clients that are told much at once.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    free: Arc<Semaphore>,
    asks_within: Duration,
    takes_within: Duration,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            free: Arc::new(Semaphore::new(TURNS)),
            asks_within: ASKS_WITHIN,
            takes_within: TAKES_WITHIN,
        }
    }
}

/// One client's stream.
pub(super) struct Session {
    caller: Caller,
    client: Client,
    published: Published,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    turns: Turns,
    /// While it is this client's.
    turn: Option<OwnedSemaphorePermit>,
    metrics: Metrics,
}

/// The client is gone, or has to go.
#[derive(Debug)]
struct Gone;

impl Session {
    pub(super) fn new(
        caller: Caller,
        published: Published,
        responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
        turns: Turns,
        metrics: Metrics,
    ) -> Self {
        Self {
            caller,
            client: Client::new(Directory::default()),
            published,
            responses,
            turns,
            turn: None,
            metrics,
        }
    }

    pub(super) async fn run(
        mut self,
        requests: impl Stream<Item = Result<DeltaDiscoveryRequest, Status>> + Unpin,
        stop: CancellationToken,
    ) {
        let (node, pod) = (self.caller.node.clone(), self.caller.pod_name.clone());
        tracing::info!(%node, pod, "a client of discovery connected");
        self.metrics.clients.inc();
        tokio::select! {
            _ = self.serve(requests) => {}
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
        mut requests: impl Stream<Item = Result<DeltaDiscoveryRequest, Status>> + Unpin,
    ) -> Result<(), Gone> {
        self.join(&mut requests).await?;
        loop {
            self.turn = None;
            tokio::select! {
                request = requests.next() => self.on_message(request).await?,
                changed = self.published.changed() => {
                    changed.map_err(|_| Gone)?;
                    self.on_change().await?;
                }
            }
        }
    }

    /// Until the client has asked for addresses and has them, or asks for nothing.
    async fn join(
        &mut self,
        requests: &mut (impl Stream<Item = Result<DeltaDiscoveryRequest, Status>> + Unpin),
    ) -> Result<(), Gone> {
        self.take_turn().await?;
        self.client = Client::new(self.newest());
        while !self.client.follows_addresses() {
            match timeout(self.turns.asks_within, requests.next()).await {
                Ok(request) => self.on_message(request).await?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    async fn on_message(
        &mut self,
        message: Option<Result<DeltaDiscoveryRequest, Status>>,
    ) -> Result<(), Gone> {
        match message {
            Some(Ok(request)) => self.on_request(request).await,
            Some(Err(status)) => {
                tracing::debug!(node = %self.caller.node, "the stream ended: {status}");
                Err(Gone)
            }
            None => Err(Gone),
        }
    }

    async fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Gone> {
        let (node, pod) = (&self.caller.node, &self.caller.pod_name);
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
                tracing::warn!(%node, pod, r#type, "the client rejected a response: {message}");
            }
            Reaction::UnknownType(type_url) => {
                tracing::warn!(%node, pod, type_url, "the client asks for an unknown type");
            }
        }
        Ok(())
    }

    async fn on_change(&mut self) -> Result<(), Gone> {
        let mut directory = self.newest();
        if self.client.is_behind_by(&directory) > FEW {
            self.take_turn().await?;
            directory = self.newest();
        }
        match self.client.on_directory(directory) {
            Some(push) => self.push(push).await,
            None => Ok(()),
        }
    }

    async fn push(&mut self, push: Push) -> Result<(), Gone> {
        if push.len() > FEW {
            self.take_turn().await?;
        }
        let label = TypeLabel {
            r#type: push.resource_type.label(),
        };
        let pushes = self.metrics.pushes.get_or_create_owned(&label);
        let resources = self.metrics.pushed_resources.get_or_create_owned(&label);
        for response in self.client.responses(push) {
            pushes.inc();
            resources.inc_by(response.resources.len() as u64);
            let sent = self.responses.send(Ok(response));
            if self.turn.is_none() {
                sent.await.map_err(|_| Gone)?;
                continue;
            }
            let Ok(sent) = timeout(self.turns.takes_within, sent).await else {
                let (node, pod) = (&self.caller.node, &self.caller.pod_name);
                tracing::warn!(
                    %node, pod,
                    "the client takes nothing of what it is told: it has to come again"
                );
                return Err(Gone);
            };
            sent.map_err(|_| Gone)?;
        }
        Ok(())
    }

    async fn take_turn(&mut self) -> Result<(), Gone> {
        if self.turn.is_none() {
            let turn = self.turns.free.clone().acquire_owned().await;
            self.turn = Some(turn.map_err(|_| Gone)?);
        }
        Ok(())
    }

    /// Nobody is served before there is one.
    fn newest(&mut self) -> Directory {
        let model = self.published.borrow_and_update();
        model
            .as_ref()
            .map(|model| model.directory.clone())
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
