//! Metrics and readiness, for everybody on the network.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::UNIX_EPOCH;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hbone::Shared;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::status::Status;

/// `/metrics`.
pub(crate) fn metrics(registry: Registry) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .route("/stats/prometheus", get(scrape))
        .with_state(Arc::new(registry))
}

async fn scrape(State(registry): State<Arc<Registry>>) -> impl IntoResponse {
    let mut body = String::new();
    match text::encode(&mut body, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], body).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// `/healthz/ready`.
pub(crate) fn readiness(status: Arc<Status>) -> Router {
    Router::new()
        .route("/healthz/ready", get(ready))
        .with_state(status)
}

async fn ready(State(status): State<Arc<Status>>) -> (StatusCode, String) {
    let missing = status.missing();
    if missing.is_empty() {
        return (StatusCode::OK, "ready\n".to_owned());
    }
    let missing = missing.join("\n") + "\n";
    (StatusCode::INTERNAL_SERVER_ERROR, missing)
}

/// How the proxy itself is.
#[derive(Debug)]
pub(crate) struct OwnMetrics {
    pub(crate) shared: Arc<Shared>,
    pub(crate) status: Arc<Status>,
}

impl Collector for OwnMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let ready = i64::from(self.status.missing().is_empty());
        let discovery = i64::from(self.status.discovery.load(Ordering::Relaxed));
        let tunnels = i64::try_from(self.shared.tunnels()).unwrap_or(i64::MAX);
        for (name, help, value) in [
            ("ambit_proxy_ready", "Whether the proxy is ready", ready),
            (
                "ambit_proxy_discovery_connected",
                "Whether the controller is connected",
                discovery,
            ),
            (
                "ambit_proxy_tunnels",
                "Open connections to other proxies",
                tunnels,
            ),
        ] {
            let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(gauge)?;
        }
        let mut expiry = encoder.encode_descriptor(
            "ambit_proxy_certificate_expiry_timestamp_seconds",
            "When the certificate of an identity ends, in seconds since 1970",
            None,
            MetricType::Gauge,
        )?;
        for (identity, state) in &*self.shared.certificates.states() {
            let Some(certificate) = &state.certificate else {
                continue;
            };
            let end = certificate.not_after.duration_since(UNIX_EPOCH);
            let end = i64::try_from(end.unwrap_or_default().as_secs()).unwrap_or(i64::MAX);
            let labels = [("identity", identity.to_string())];
            ConstGauge::new(end).encode(expiry.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
