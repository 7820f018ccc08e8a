//! The access log (tracing target `access`) and the counters of one connection.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::copy::{CopyError, Transferred};
use crate::directory::{Service, Workload};
use crate::identity::SpiffeId;
use crate::metrics::{Counters, End, Labels, Metrics, Reporter};

/// What is known about a connection.
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
    counters: Arc<Counters>,
    facts: Facts,
    start: Instant,
}

impl Facts {
    fn labels(&self, response_flags: &'static str) -> Labels {
        let service = self.service.as_ref();
        Labels {
            reporter: self.reporter,
            source: end(self.source_workload.as_ref(), self.source_identity.as_ref()),
            destination: end(
                self.destination_workload.as_ref(),
                self.destination_identity.as_ref(),
            ),
            service: service.map(|service| service.hostname.clone()),
            response_flags,
            mutual_tls: self.mutual_tls,
        }
    }

    fn direction(&self) -> &'static str {
        match self.reporter {
            Reporter::Source => "outbound",
            Reporter::Destination => "inbound",
        }
    }

    /// The connection was refused or could not be made.
    pub(crate) fn failed(&self, metrics: &Metrics, flags: &'static str, error: &dyn Error) {
        metrics.failed(self.labels(flags));
        tracing::warn!(
            target: "access",
            {
                src.addr = %self.source,
                src.workload = self.source_workload.as_ref().map(|workload| &*workload.name),
                src.identity = self.source_identity.as_ref().map(tracing::field::display),
                dst.addr = %self.destination,
                dst.workload = self.destination_workload.as_ref().map(|workload| &*workload.name),
                dst.service = self.service.as_ref().map(|service| &*service.hostname),
                dst.identity = self.destination_identity.as_ref().map(tracing::field::display),
                direction = self.direction(),
                error = %with_causes(error),
            },
            "connection failed"
        );
    }

    /// The connection is made.
    pub(crate) fn opened(self, metrics: &Metrics) -> Open<'_> {
        let counters = metrics.opened(self.labels("-"));
        Open {
            metrics,
            counters,
            facts: self,
            start: Instant::now(),
        }
    }
}

impl Open<'_> {
    /// The connection has ended. `transferred.sent` came from its client.
    pub(crate) fn closed(self, transferred: Transferred, result: &Result<(), CopyError>) {
        let Transferred { sent, received } = transferred;
        self.metrics.closed(&self.counters, sent, received);
        let facts = &self.facts;
        tracing::info!(
            target: "access",
            {
                src.addr = %facts.source,
                src.workload = facts.source_workload.as_ref().map(|workload| &*workload.name),
                src.identity = facts.source_identity.as_ref().map(tracing::field::display),
                dst.addr = %facts.destination,
                dst.workload = facts.destination_workload.as_ref().map(|workload| &*workload.name),
                dst.service = facts.service.as_ref().map(|service| &*service.hostname),
                dst.identity = facts.destination_identity.as_ref().map(tracing::field::display),
                direction = facts.direction(),
                mtls = facts.mutual_tls,
                bytes_sent = sent,
                bytes_recv = received,
                duration = ?self.start.elapsed(),
                error = result.as_ref().err().map(tracing::field::display),
            },
            "connection complete"
        );
    }
}

fn end(workload: Option<&Arc<Workload>>, identity: Option<&SpiffeId>) -> End {
    End {
        workload: workload.map(|workload| workload.workload_name.clone()),
        canonical_service: workload.map(|workload| workload.canonical_name.clone()),
        namespace: workload
            .map(|workload| workload.namespace.clone())
            .or_else(|| identity.map(|identity| identity.namespace().clone())),
        principal: identity.cloned(),
    }
}

/// An error with its causes, each once: some errors print their cause themselves.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
