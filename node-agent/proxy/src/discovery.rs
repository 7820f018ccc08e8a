//! Keeps the directory as the controller knows it, over connections that may break at any time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hbone::Shared;
use hbone::directory::Directory;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use prost_types::{Struct, Value, value::Kind};
use protocol::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use protocol::discovery::{DeltaDiscoveryResponse, Node};
use rand::Rng;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::args::Arguments;
use crate::controller::{Controller, ControllerError};
use crate::subscription::{Subscriptions, UnknownType};

/// Longest message that is taken, in bytes (the field's number).
const LONGEST_MESSAGE: usize = 200 << 20;
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(15);
/// A stream that lasted this long was a good one.
const GOOD_STREAM: Duration = Duration::from_secs(30);

/// A stream that ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Controller(#[from] ControllerError),
    #[error("discovery: {}: {}", .0.code(), .0.message())]
    Status(#[from] tonic::Status),
    #[error("discovery: the stream takes no more requests")]
    Requests,
    #[error("discovery")]
    Type(#[from] UnknownType),
}

/// Keeps the directory current.
pub(crate) struct Discovery {
    controller: Controller,
    node: Node,
    shared: Arc<Shared>,
    subscriptions: Subscriptions,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Metrics {
    connected: Gauge,
    messages: Counter,
    refused: Counter,
}

impl Discovery {
    pub(crate) fn new(
        controller: Controller,
        node: Node,
        shared: Arc<Shared>,
        registry: &mut Registry,
    ) -> Self {
        Self {
            controller,
            node,
            shared,
            subscriptions: Subscriptions::default(),
            metrics: Metrics::register(registry),
        }
    }

    /// Streams, again and again. While the controller is away, what was received last counts.
    pub(crate) async fn run(mut self) {
        let mut wait = FIRST_RETRY;
        loop {
            let start = Instant::now();
            let end = self.stream().await;
            self.metrics.connected.set(0);
            if start.elapsed() >= GOOD_STREAM {
                wait = FIRST_RETRY;
            }
            match end {
                Ok(()) => tracing::info!("the controller ended the discovery stream"),
                Err(error) => tracing::warn!("{:#}", anyhow::Error::from(error)),
            }
            // Not all proxies at once, when a controller comes back.
            let jitter = rand::rng().random_range(0.5..1.5);
            tokio::time::sleep(wait.mul_f64(jitter)).await;
            wait = (wait * 2).min(LAST_RETRY);
        }
    }

    async fn stream(&mut self) -> Result<(), StreamError> {
        let channel = self.controller.connect().await?;
        let (requests, outgoing) = mpsc::channel(16);
        for request in self.subscriptions.open(&self.node) {
            let sent = requests.send(request).await;
            sent.map_err(|_| StreamError::Requests)?;
        }
        let request = self
            .controller
            .request(ReceiverStream::new(outgoing))
            .await?;
        let mut responses = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(LONGEST_MESSAGE)
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        tracing::info!("discovery stream open");
        self.metrics.connected.set(1);
        while let Some(response) = responses.message().await? {
            let answer = self.receive(response)?;
            let sent = requests.send(answer).await;
            sent.map_err(|_| StreamError::Requests)?;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> Result<protocol::discovery::DeltaDiscoveryRequest, UnknownType> {
        self.metrics.messages.inc();
        let mut directory = Directory::clone(&self.shared.directory.load());
        let answer = self.subscriptions.receive(response, &mut directory)?;
        self.shared.directory.store(Arc::new(directory));
        self.shared.sweep();
        if let Some(detail) = &answer.error_detail {
            self.metrics.refused.inc();
            tracing::warn!(error = detail.message, "discovery: resources refused");
        }
        if self.subscriptions.complete() {
            self.shared.set_discovered();
        }
        Ok(answer)
    }
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let xds = registry.sub_registry_with_prefix("istio_xds");
        xds.register(
            "connected",
            "Whether a discovery stream is open",
            metrics.connected.clone(),
        );
        xds.register("message", "Discovery messages", metrics.messages.clone());
        xds.register(
            "refused",
            "Discovery messages with a resource that cannot be used",
            metrics.refused.clone(),
        );
        metrics
    }
}

/// Who asks, in the field's form: control planes know a node proxy by `ztunnel~`.
pub(crate) fn node(arguments: &Arguments) -> Node {
    let Arguments {
        pod_name,
        pod_namespace,
        pod_ip,
        node_name,
        cluster_id,
        ..
    } = arguments;
    let text = |text: &str| Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    let ip = pod_ip.to_string();
    let metadata = [
        ("NAME", pod_name.as_str()),
        ("NAMESPACE", pod_namespace),
        ("INSTANCE_IPS", &ip),
        ("NODE_NAME", node_name),
        ("CLUSTER_ID", cluster_id),
    ];
    let fields = metadata.map(|(name, value)| (name.to_owned(), text(value)));
    Node {
        id: format!(
            "ztunnel~{pod_ip}~{pod_name}.{pod_namespace}~{pod_namespace}.svc.cluster.local"
        ),
        cluster: cluster_id.clone(),
        metadata: Some(Struct {
            fields: BTreeMap::from(fields),
        }),
    }
}
