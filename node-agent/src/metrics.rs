//! What the agent counts, and whether it is alive and ready.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use datapath::plan::Plan;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::report::Outcome;

/// A loop that has not turned for so long hangs: it turns every 20 s at least.
const HANGS_AFTER: Duration = Duration::from_secs(120);

/// Upper bounds of the time of a pass in seconds.
const PASS_SECONDS: [f64; 8] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Counters, gauges, and the signs of life.
pub(crate) struct Metrics {
    registry: Registry,
    passes: Counter,
    failed_passes: Counter,
    waiting_passes: Counter,
    pass_seconds: Histogram,
    changes: Counter,
    repairs: Counter,
    enrolled: Gauge,
    pending: Gauge,
    last_turn: Mutex<Instant>,
    knows_node: AtomicBool,
}

/// A pass that is under way.
pub(crate) struct PassTimer<'a> {
    metrics: &'a Metrics,
    started: Instant,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("ambit_agent");
        let metrics = Self {
            registry: Registry::default(),
            passes: Counter::default(),
            failed_passes: Counter::default(),
            waiting_passes: Counter::default(),
            pass_seconds: Histogram::new(PASS_SECONDS),
            changes: Counter::default(),
            repairs: Counter::default(),
            enrolled: Gauge::default(),
            pending: Gauge::default(),
            last_turn: Mutex::new(Instant::now()),
            knows_node: AtomicBool::new(false),
        };
        registry.register("passes", "Passes over the node", metrics.passes.clone());
        registry.register(
            "failed_passes",
            "Passes that did not reach what is wanted",
            metrics.failed_passes.clone(),
        );
        registry.register(
            "waiting_passes",
            "Passes that changed nothing because the proxy of a standing data path was awaited",
            metrics.waiting_passes.clone(),
        );
        registry.register(
            "pass_seconds",
            "Time of a pass",
            metrics.pass_seconds.clone(),
        );
        registry.register(
            "changes",
            "Steps taken in the kernel",
            metrics.changes.clone(),
        );
        registry.register(
            "repairs",
            "Steps taken because something else had changed the kernel",
            metrics.repairs.clone(),
        );
        registry.register(
            "enrolled_workloads",
            "Workloads whose traffic the mesh carries",
            metrics.enrolled.clone(),
        );
        registry.register(
            "pending_workloads",
            "Workloads of the spec that are not enrolled",
            metrics.pending.clone(),
        );
        registry.register_collector(Box::new(OpenDescriptors));
        Self {
            registry,
            ..metrics
        }
    }

    /// The loop has come round.
    pub(crate) fn turns(&self) {
        *self
            .last_turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether the node's AmbientNode has been read and acted upon.
    pub(crate) fn known(&self, known: bool) {
        self.knows_node.store(known, Ordering::Relaxed);
    }

    pub(crate) fn is_alive(&self) -> bool {
        let last = *self
            .last_turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        last.elapsed() < HANGS_AFTER
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.knows_node.load(Ordering::Relaxed)
    }

    /// A pass begins.
    pub(crate) fn pass(&self) -> PassTimer<'_> {
        PassTimer {
            metrics: self,
            started: Instant::now(),
        }
    }

    /// A pass waited for the proxy.
    pub(crate) fn waited(&self) {
        self.waiting_passes.inc();
    }

    #[cfg(test)]
    pub(crate) fn waits(&self) -> u64 {
        self.waiting_passes.get()
    }

    /// Steps are about to be taken.
    pub(crate) fn applies(&self, plan: &Plan, repairs: bool) {
        let steps = u64::try_from(plan.steps.len()).unwrap_or(u64::MAX);
        self.changes.inc_by(steps);
        if repairs {
            self.repairs.inc_by(steps);
        }
    }

    /// All of it, in the text format of OpenMetrics.
    pub(crate) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut written = String::new();
        text::encode(&mut written, &self.registry)?;
        Ok(written)
    }
}

impl PassTimer<'_> {
    /// The pass has ended with this.
    pub(crate) fn done(self, outcome: &Outcome) {
        let metrics = self.metrics;
        metrics.passes.inc();
        if outcome.failure.is_some() {
            metrics.failed_passes.inc();
        }
        metrics
            .pass_seconds
            .observe(self.started.elapsed().as_secs_f64());
        let enrolled = outcome
            .workloads
            .iter()
            .filter(|workload| workload.is_enrolled())
            .count();
        let all = outcome.workloads.len() + outcome.unusable.len();
        let gauge = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        metrics.enrolled.set(gauge(enrolled));
        metrics.pending.set(gauge(all - enrolled));
    }
}

/// Descriptors that this process holds, counted when somebody asks.
#[derive(Debug)]
struct OpenDescriptors;

impl Collector for OpenDescriptors {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let open = std::fs::read_dir("/proc/self/fd")
            .map(Iterator::count)
            .unwrap_or_default();
        let gauge = ConstGauge::new(i64::try_from(open).unwrap_or(i64::MAX));
        let encoder = encoder.encode_descriptor(
            "open_descriptors",
            "Descriptors that the agent holds",
            None,
            gauge.metric_type(),
        )?;
        gauge.encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::all_well;

    #[test]
    fn a_pass_is_counted_with_what_came_of_it() {
        let metrics = Metrics::new();
        metrics.pass().done(&all_well());
        let text = metrics.text().unwrap();
        for line in [
            "ambit_agent_passes_total 1",
            "ambit_agent_failed_passes_total 0",
            "ambit_agent_enrolled_workloads 1",
            "ambit_agent_pending_workloads 0",
            "ambit_agent_open_descriptors ",
        ] {
            let found = text.lines().any(|found| found.starts_with(line));
            assert!(found, "{line} is not in\n{text}");
        }
    }

    #[test]
    fn an_agent_is_ready_when_it_knows_its_node() {
        let metrics = Metrics::new();
        assert!(metrics.is_alive() && !metrics.is_ready());
        metrics.known(true);
        assert!(metrics.is_ready());
    }
}
