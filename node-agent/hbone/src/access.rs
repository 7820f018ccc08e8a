//! The access log (tracing target `access`) and the metrics of one connection.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::copy::{CopyError, Transferred};
use crate::directory::{Service, Workload};
use crate::identity::SpiffeId;
use crate::metrics::{ConnectionLabels, Metrics, Reporter};

/// What is known about a connection, for log and metrics.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) reporter: Reporter,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) source_workload: Option<Arc<Workload>>,
    pub(crate) destination_workload: Option<Arc<Workload>>,
    pub(crate) source_identity: Option<SpiffeId>,
    pub(crate) destination_identity: Option<SpiffeId>,
    pub(crate) service: Option<Arc<Service>>,
    pub(crate) mutual_tls: bool,
}

/// A connection that is open.
pub(crate) struct Open<'a> {
    metrics: &'a Metrics,
    facts: Facts,
    labels: ConnectionLabels,
    start: Instant,
}

impl Facts {
    fn labels(&self, response_flags: &'static str) -> ConnectionLabels {
        let name = |workload: &Option<Arc<Workload>>| {
            workload
                .as_ref()
                .map_or_else(unknown, |workload| workload.workload_name.clone())
        };
        let namespace = |workload: &Option<Arc<Workload>>, identity: &Option<SpiffeId>| {
            let known = workload.as_ref().map(|workload| workload.namespace.clone());
            known
                .or(identity.as_ref().map(|id| id.namespace().to_owned()))
                .unwrap_or_else(unknown)
        };
        let principal = |identity: &Option<SpiffeId>| {
            identity.as_ref().map_or_else(unknown, ToString::to_string)
        };
        ConnectionLabels {
            reporter: self.reporter,
            source_workload: name(&self.source_workload),
            source_workload_namespace: namespace(&self.source_workload, &self.source_identity),
            source_principal: principal(&self.source_identity),
            destination_workload: name(&self.destination_workload),
            destination_workload_namespace: namespace(
                &self.destination_workload,
                &self.destination_identity,
            ),
            destination_principal: principal(&self.destination_identity),
            destination_service: self
                .service
                .as_ref()
                .map_or_else(unknown, |service| service.hostname.clone()),
            request_protocol: "tcp",
            response_flags,
            connection_security_policy: if self.mutual_tls {
                "mutual_tls"
            } else {
                "unknown"
            },
        }
    }

    fn direction(&self) -> &'static str {
        match self.reporter {
            Reporter::source => "outbound",
            Reporter::destination => "inbound",
        }
    }

    /// The connection was refused or could not be made.
    pub(crate) fn failed(&self, metrics: &Metrics, flags: &'static str, error: &dyn Display) {
        metrics.failed(&self.labels(flags));
        tracing::warn!(
            target: "access",
            src.addr = %self.source,
            src.identity = self.source_identity.as_ref().map(tracing::field::display),
            dst.addr = %self.destination,
            dst.identity = self.destination_identity.as_ref().map(tracing::field::display),
            direction = self.direction(),
            error = %error,
            "connection failed"
        );
    }

    /// The connection is made.
    pub(crate) fn opened(self, metrics: &Metrics) -> Open<'_> {
        let labels = self.labels("-");
        metrics.opened(&labels);
        Open {
            metrics,
            facts: self,
            labels,
            start: Instant::now(),
        }
    }
}

impl Open<'_> {
    /// The connection has ended. `transferred.sent` came from its client.
    pub(crate) fn closed(self, transferred: Transferred, result: &Result<(), CopyError>) {
        self.metrics
            .closed(&self.labels, transferred.sent, transferred.received);
        let facts = &self.facts;
        tracing::info!(
            target: "access",
            src.addr = %facts.source,
            src.workload = facts.source_workload.as_ref().map(|workload| workload.name.as_str()),
            src.identity = facts.source_identity.as_ref().map(tracing::field::display),
            dst.addr = %facts.destination,
            dst.workload = facts.destination_workload.as_ref().map(|workload| workload.name.as_str()),
            dst.service = facts.service.as_ref().map(|service| service.hostname.as_str()),
            dst.identity = facts.destination_identity.as_ref().map(tracing::field::display),
            direction = facts.direction(),
            mtls = facts.mutual_tls,
            bytes_sent = transferred.sent,
            bytes_recv = transferred.received,
            duration = ?self.start.elapsed(),
            error = result.as_ref().err().map(tracing::field::display),
            "connection complete"
        );
    }
}

fn unknown() -> String {
    "unknown".to_owned()
}
