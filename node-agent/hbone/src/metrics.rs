//! Counters of connections, under the names of the field.
//!
//! A connection looks its labels up once; what it counts later are plain atomic numbers.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::identity::SpiffeId;

/// Label sets beyond this many are counted together: pairs of workloads come and go.
const MAX_SERIES: usize = 10_000;

/// Response flag of a connection whose two ends have no address family in common.
pub(crate) const ADDRESS_FAMILY: &str = "ADDRESS_FAMILY";

/// Which side of a connection reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reporter {
    /// The client's node.
    Source,
    /// The server's node.
    Destination,
}

/// One end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct End {
    pub(crate) workload: Option<Arc<str>>,
    pub(crate) canonical_service: Option<Arc<str>>,
    pub(crate) namespace: Option<Arc<str>>,
    pub(crate) principal: Option<SpiffeId>,
}

/// What the counters of a connection are kept by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Labels {
    pub(crate) reporter: Reporter,
    pub(crate) source: End,
    pub(crate) destination: End,
    pub(crate) service: Option<Arc<str>>,
    /// `-`, or why it failed.
    pub(crate) response_flags: &'static str,
    pub(crate) mutual_tls: bool,
}

/// The counters of one label set.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    opened: AtomicU64,
    closed: AtomicU64,
    failed: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
}

type CounterOf = fn(&Counters) -> &AtomicU64;

/// Every counter.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    series: RwLock<HashMap<Labels, Arc<Counters>>>,
    open: AtomicI64,
}

impl Metrics {
    /// Makes the counters and registers them.
    pub(crate) fn register(registry: &mut Registry) -> Arc<Self> {
        let metrics = Arc::new(Self::default());
        registry.register_collector(Box::new(metrics.clone()));
        metrics
    }

    /// A connection is open; the result is to be given to [`Self::closed`].
    pub(crate) fn opened(&self, labels: Labels) -> Arc<Counters> {
        let counters = self.counters(labels);
        counters.opened.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        counters
    }

    /// It has ended. `requested` went from client to server, `responded` back.
    pub(crate) fn closed(&self, counters: &Counters, requested: u64, responded: u64) {
        counters.closed.fetch_add(1, Ordering::Relaxed);
        counters.received.fetch_add(requested, Ordering::Relaxed);
        counters.sent.fetch_add(responded, Ordering::Relaxed);
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn failed(&self, labels: Labels) {
        let counters = self.counters(labels);
        counters.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Connections that are open now.
    pub(crate) fn open(&self) -> i64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Connections that have been opened.
    pub(crate) fn opened_so_far(&self) -> u64 {
        let series = self.series.read().unwrap_or_else(PoisonError::into_inner);
        let opened = series.values().map(|counters| &counters.opened);
        opened.map(|opened| opened.load(Ordering::Relaxed)).sum()
    }

    fn counters(&self, labels: Labels) -> Arc<Counters> {
        let series = self.series.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = series.get(&labels) {
            return found.clone();
        }
        let full = series.len() >= MAX_SERIES;
        drop(series);
        let labels = if full { labels.folded() } else { labels };
        let mut series = self.series.write().unwrap_or_else(PoisonError::into_inner);
        series.entry(labels).or_default().clone()
    }
}

impl Labels {
    /// What a connection is counted under when there are too many label sets.
    fn folded(self) -> Self {
        Self {
            source: End::default(),
            destination: End::default(),
            service: None,
            ..self
        }
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let series = self.series.read().unwrap_or_else(PoisonError::into_inner);
        let families: [(&str, &str, CounterOf); 5] = [
            ("connections_opened", "Connections opened", |c| &c.opened),
            ("connections_closed", "Connections closed", |c| &c.closed),
            ("connections_failed", "Connections refused or failed", |c| {
                &c.failed
            }),
            ("received_bytes", "Bytes of requests", |c| &c.received),
            ("sent_bytes", "Bytes of responses", |c| &c.sent),
        ];
        for (name, help, of) in families {
            let name = format!("istio_tcp_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for (labels, counters) in &*series {
                let value = of(counters).load(Ordering::Relaxed);
                if value > 0 {
                    ConstCounter::new(value).encode(family.encode_family(labels)?)?;
                }
            }
        }
        let help = "Connections that are open now";
        let gauge =
            encoder.encode_descriptor("istio_tcp_sockets_open", help, None, MetricType::Gauge)?;
        ConstGauge::new(self.open()).encode(gauge)
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let Self {
            reporter,
            source,
            destination,
            service,
            response_flags,
            mutual_tls,
        } = self;
        let reporter = match reporter {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        };
        let security = if *mutual_tls { "mutual_tls" } else { "unknown" };
        ("reporter", reporter).encode(encoder.encode_label())?;
        source.encode("source", encoder)?;
        destination.encode("destination", encoder)?;
        ("destination_service", known(service.as_ref())).encode(encoder.encode_label())?;
        ("request_protocol", "tcp").encode(encoder.encode_label())?;
        ("response_flags", *response_flags).encode(encoder.encode_label())?;
        ("connection_security_policy", security).encode(encoder.encode_label())
    }
}

impl End {
    fn encode(&self, side: &str, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let principal = self.principal.as_ref().map(ToString::to_string);
        for (name, value) in [
            ("workload", known(self.workload.as_ref())),
            ("canonical_service", known(self.canonical_service.as_ref())),
            ("workload_namespace", known(self.namespace.as_ref())),
            ("principal", principal.as_deref().unwrap_or("unknown")),
        ] {
            (format!("{side}_{name}"), value).encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

fn known(value: Option<&Arc<str>>) -> &str {
    value.map_or("unknown", |value| value)
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    fn labels(workload: &str) -> Labels {
        Labels {
            reporter: Reporter::Source,
            source: End {
                workload: Some(workload.into()),
                ..End::default()
            },
            destination: End::default(),
            service: Some("web.shop.svc.cluster.local".into()),
            response_flags: "-",
            mutual_tls: true,
        }
    }

    #[test]
    fn a_connection_is_counted_under_the_names_of_the_field() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let counters = metrics.opened(labels("a"));
        metrics.closed(&counters, 3, 5);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for (name, value) in [
            ("istio_tcp_connections_opened_total", 1),
            ("istio_tcp_connections_closed_total", 1),
            ("istio_tcp_received_bytes_total", 3),
            ("istio_tcp_sent_bytes_total", 5),
        ] {
            let line = text.lines().find(|line| line.starts_with(name));
            let line = line.unwrap_or_else(|| panic!("{name} in {text}"));
            assert!(line.ends_with(&format!(" {value}")), "{line}");
            assert!(
                line.contains("reporter=\"source\",source_workload=\"a\""),
                "{line}"
            );
        }
        assert!(!text.contains("connections_failed_total"), "{text}");
        assert!(text.contains("istio_tcp_sockets_open 0"), "{text}");
    }

    #[test]
    fn the_number_of_series_is_bounded() {
        let metrics = Metrics::default();
        for number in 0..MAX_SERIES + 100 {
            metrics.failed(labels(&format!("w{number}")));
        }
        assert!(metrics.series.read().unwrap().len() <= MAX_SERIES + 1);
    }
}
