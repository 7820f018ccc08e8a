//! Numbers for `/metrics`.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// All of them; a clone counts on the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) clients: Gauge,
    pub(crate) pushes: Family<TypeLabel, Counter>,
    pub(crate) pushed_resources: Family<TypeLabel, Counter>,
    pub(crate) rejections: Family<TypeLabel, Counter>,
    pub(crate) unauthenticated: Counter,
    pub(crate) certificates_signed: Counter,
    pub(crate) certificates_refused: Family<ReasonLabel, Counter>,
    pub(crate) leader: Gauge,
    pub(crate) node_writes: Counter,
    pub(crate) node_write_errors: Counter,
}

/// Short name of a resource type of discovery.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TypeLabel {
    pub(crate) r#type: &'static str,
}

/// A refusal's reason, from a fixed list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ReasonLabel {
    pub(crate) reason: &'static str,
}

impl Metrics {
    pub(crate) fn register(&self) -> Arc<Registry> {
        let mut registry = Registry::with_prefix("ambit_controller");
        registry.register(
            "discovery_clients",
            "Clients of discovery that are connected",
            self.clients.clone(),
        );
        registry.register(
            "discovery_pushes",
            "Responses sent to clients of discovery",
            self.pushes.clone(),
        );
        registry.register(
            "discovery_resources",
            "Resources sent to clients of discovery",
            self.pushed_resources.clone(),
        );
        registry.register(
            "discovery_rejections",
            "Responses that clients of discovery rejected",
            self.rejections.clone(),
        );
        registry.register(
            "unauthenticated_requests",
            "Requests without a token of a node proxy",
            self.unauthenticated.clone(),
        );
        registry.register(
            "certificates_signed",
            "Certificates signed for workloads",
            self.certificates_signed.clone(),
        );
        registry.register(
            "certificates_refused",
            "Requests for certificates that were refused",
            self.certificates_refused.clone(),
        );
        registry.register(
            "leader",
            "1 while this replica is the one that writes",
            self.leader.clone(),
        );
        registry.register(
            "ambientnode_writes",
            "Writes of AmbientNodes",
            self.node_writes.clone(),
        );
        registry.register(
            "ambientnode_write_errors",
            "Writes of AmbientNodes that failed",
            self.node_write_errors.clone(),
        );
        Arc::new(registry)
    }
}
