//! Readiness and metrics.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hbone::Shared;
use hbone::identity::SpiffeId;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

/// What readiness depends on.
#[derive(Clone, Debug)]
pub(crate) struct Readiness {
    /// The agent's configuration is there and its listeners are bound.
    pub(crate) serving: watch::Receiver<bool>,
    /// Discovery was complete once.
    pub(crate) discovered: watch::Receiver<bool>,
    /// The proxy is to end.
    pub(crate) ending: watch::Receiver<bool>,
}

/// `/healthz/ready` for kubelet.
pub(crate) fn readiness(readiness: Readiness) -> Router {
    Router::new()
        .route("/healthz/ready", get(ready))
        .with_state(readiness)
}

async fn ready(State(readiness): State<Readiness>) -> (StatusCode, String) {
    let missing: Vec<&str> = [
        (
            *readiness.serving.borrow(),
            "waiting for the node's agent to configure the listeners",
        ),
        (
            *readiness.discovered.borrow(),
            "waiting for discovery from the controller",
        ),
        (!*readiness.ending.borrow(), "draining"),
    ]
    .into_iter()
    .filter_map(|(ok, message)| (!ok).then_some(message))
    .collect();
    if missing.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::INTERNAL_SERVER_ERROR, missing.join("\n") + "\n")
    }
}

/// `/metrics` for Prometheus, also under the name of the field's proxies.
pub(crate) fn metrics(registry: Registry) -> Router {
    Router::new()
        .route("/metrics", get(print))
        .route("/stats/prometheus", get(print))
        .with_state(Arc::new(registry))
}

async fn print(State(registry): State<Arc<Registry>>) -> Response {
    let mut page = String::new();
    match text::encode(&mut page, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], page).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// How long the certificates of this node are still good for.
#[derive(Debug)]
pub(crate) struct CertificateExpiry(pub(crate) Arc<Shared>);

impl Collector for CertificateExpiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "ambit_certificate_expiry_timestamp_seconds",
            "When the last good certificate of an identity expires, in seconds since 1970",
            None,
            prometheus_client::metrics::MetricType::Gauge,
        )?;
        for (identity, state) in self.0.certificates.states().iter() {
            let expiry = state
                .certificate
                .as_ref()
                .map_or(UNIX_EPOCH, |found| found.not_after);
            let gauge = ConstGauge::new(seconds(expiry));
            let labels = [("identity", SpiffeId::to_string(identity))];
            gauge.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}
