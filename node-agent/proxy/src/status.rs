//! Whether the proxy is ready, and if not, what is missing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hbone::Shared;
use tokio::sync::watch;

/// Where the proxy is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It takes connections.
    Serving,
    /// It was told to end, and takes connections until another proxy does.
    Ending,
    /// It takes no more.
    Draining,
}

/// What the parts tell about themselves.
#[derive(Debug)]
pub(crate) struct Status {
    shared: Arc<Shared>,
    /// Whether the agent is connected and has said what to do.
    pub(crate) configured: AtomicBool,
    /// Whether every wanted listener is bound.
    pub(crate) listening: AtomicBool,
    /// Whether discovery is connected now.
    pub(crate) discovery: AtomicBool,
    /// Whether the node's new connections come to this proxy, as the agent said last.
    pub(crate) active: watch::Sender<bool>,
    pub(crate) phase: watch::Sender<Phase>,
}

impl Status {
    pub(crate) fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self {
            shared,
            configured: AtomicBool::new(false),
            listening: AtomicBool::new(false),
            discovery: AtomicBool::new(false),
            active: watch::Sender::new(false),
            phase: watch::Sender::new(Phase::Serving),
        })
    }

    /// What keeps the proxy from being ready.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let discovered = *self.shared.discovered().borrow();
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        [
            (is(&self.configured), "the node's agent is not connected"),
            (is(&self.listening), "not every listener is bound"),
            (discovered, "nothing was received from the controller yet"),
            (
                *self.active.borrow(),
                "the node's agent hands new connections to another proxy, or to none yet",
            ),
            (
                *self.phase.borrow() == Phase::Serving,
                "the proxy is ending",
            ),
        ]
        .into_iter()
        .filter_map(|(fine, missing)| (!fine).then_some(missing))
        .collect()
    }
}
