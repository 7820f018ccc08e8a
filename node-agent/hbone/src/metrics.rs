//! Counters, under the names of the field.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Which side of a connection reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum Reporter {
    /// The client's node.
    source,
    /// The server's node.
    destination,
}

/// Labels of a connection. Their number is bounded by the number of pairs of workloads that talk.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ConnectionLabels {
    /// Which side reports.
    pub reporter: Reporter,
    /// The client's workload.
    pub source_workload: String,
    /// The client's namespace.
    pub source_workload_namespace: String,
    /// The client's identity.
    pub source_principal: String,
    /// The server's workload.
    pub destination_workload: String,
    /// The server's namespace.
    pub destination_workload_namespace: String,
    /// The server's identity.
    pub destination_principal: String,
    /// The service that was asked for.
    pub destination_service: String,
    /// Always `tcp`.
    pub request_protocol: &'static str,
    /// `-`, or why it failed.
    pub response_flags: &'static str,
    /// `mutual_tls` or `unknown`.
    pub connection_security_policy: &'static str,
}

/// Every metric of this crate.
#[derive(Debug, Default)]
pub struct Metrics {
    opened: Family<ConnectionLabels, Counter>,
    closed: Family<ConnectionLabels, Counter>,
    sent: Family<ConnectionLabels, Counter>,
    received: Family<ConnectionLabels, Counter>,
    failed: Family<ConnectionLabels, Counter>,
    open: Gauge,
}

impl Metrics {
    /// Makes them and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let tcp = registry.sub_registry_with_prefix("istio_tcp");
        tcp.register(
            "connections_opened",
            "Connections opened",
            metrics.opened.clone(),
        );
        tcp.register(
            "connections_closed",
            "Connections closed",
            metrics.closed.clone(),
        );
        tcp.register(
            "connections_failed",
            "Connections that failed",
            metrics.failed.clone(),
        );
        tcp.register("sent_bytes", "Bytes of responses", metrics.sent.clone());
        tcp.register(
            "received_bytes",
            "Bytes of requests",
            metrics.received.clone(),
        );
        tcp.register(
            "sockets_open",
            "Connections that are open now",
            metrics.open.clone(),
        );
        metrics
    }

    pub(crate) fn opened(&self, labels: &ConnectionLabels) {
        self.opened.get_or_create(labels).inc();
        self.open.inc();
    }

    /// `requested` went from client to server, `responded` back.
    pub(crate) fn closed(&self, labels: &ConnectionLabels, requested: u64, responded: u64) {
        self.closed.get_or_create(labels).inc();
        self.received.get_or_create(labels).inc_by(requested);
        self.sent.get_or_create(labels).inc_by(responded);
        self.open.dec();
    }

    pub(crate) fn failed(&self, labels: &ConnectionLabels) {
        self.failed.get_or_create(labels).inc();
    }
}
