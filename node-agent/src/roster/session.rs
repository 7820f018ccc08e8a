//! One proxy that said hello: what it was told, and what it answered. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use datapath::Slot;
use datapath::input::Ports;
use datapath::netns::Netns;
use jiff::Timestamp;
use protocol::node::{Configure, Report, WorkloadState};
use tokio::sync::watch;

/// Tells connections apart; a later one is larger.
pub(crate) type SessionId = u64;

/// A proxy's pod, checked against the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) pod_name: String,
    pub(crate) pod_uid: String,
    pub(crate) version: String,
    /// When the pod was made.
    pub(crate) created: Timestamp,
    /// The pod was being deleted when it said hello.
    pub(crate) terminating: bool,
}

/// A proxy that said hello.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) identity: Identity,
    pub(crate) netns: Netns,
    /// The slot that an earlier agent had given it.
    pub(super) found: Option<Slot>,
    configure: watch::Sender<Option<Arc<Configure>>>,
    pub(super) connected: bool,
    pub(super) report: Option<Report>,
    /// Since which generation the listeners are what they are.
    listeners_since: u64,
    /// Since which generation each workload is what it is.
    workloads_since: BTreeMap<String, u64>,
}

/// What a proxy says about one thing that it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It has not said anything yet.
    Waiting,
    /// It is at it; what it waits for.
    Pending(String),
    /// It is done.
    Ready,
    /// It cannot; why.
    Failed(String),
}

impl Session {
    pub(crate) fn new(
        id: SessionId,
        identity: Identity,
        netns: Netns,
        found: Option<Slot>,
        configure: watch::Sender<Option<Arc<Configure>>>,
    ) -> Self {
        Self {
            id,
            identity,
            netns,
            found,
            configure,
            connected: true,
            report: None,
            listeners_since: 0,
            workloads_since: BTreeMap::new(),
        }
    }

    /// Whether it still talks to us.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected
    }

    /// Whether it was told to end. It takes connections until another does.
    pub(crate) fn is_ending(&self) -> bool {
        self.identity.terminating || self.report.as_ref().is_some_and(|report| report.ending)
    }

    /// Its age among proxies: that of its pod, or of its hello in one pod.
    pub(super) fn age(&self) -> (Timestamp, SessionId) {
        (self.identity.created, self.id)
    }

    /// Whether the proxy has answered what it was told last about its listeners.
    pub(crate) fn has_answered(&self) -> bool {
        self.report
            .as_ref()
            .is_some_and(|report| report.generation >= self.listeners_since)
    }

    /// Whether the proxy takes connections on all of these ports.
    pub(crate) fn is_serving(&self, ports: Ports) -> bool {
        let listeners = self.listeners(ports);
        self.connected && listeners.iter().all(|(_, state)| *state == Progress::Ready)
    }

    /// What it says about each port.
    pub(crate) fn listeners(&self, ports: Ports) -> Vec<(u16, Progress)> {
        [ports.outbound, ports.inbound, ports.inbound_plaintext]
            .map(|port| (port, self.listener(port)))
            .into()
    }

    fn listener(&self, port: u16) -> Progress {
        let report = self
            .report
            .as_ref()
            .filter(|report| report.generation >= self.listeners_since);
        let found = report.and_then(|report| {
            report
                .listeners
                .iter()
                .find(|listener| listener.port == u32::from(port))
        });
        match found {
            None => Progress::Waiting,
            Some(listener) if listener.error.is_empty() => Progress::Ready,
            Some(listener) => Progress::Failed(listener.error.clone()),
        }
    }

    /// What it says about a workload.
    pub(crate) fn workload(&self, uid: &str) -> Progress {
        let since = self.workloads_since.get(uid);
        let (Some(report), Some(since)) = (&self.report, since) else {
            return Progress::Waiting;
        };
        // An older answer may speak of a pod that was withdrawn and came back since.
        if !self.connected || report.generation < *since {
            return Progress::Waiting;
        }
        let found = report.workloads.iter().find(|workload| workload.uid == uid);
        match found {
            Some(workload) if workload.state() == WorkloadState::Ready => Progress::Ready,
            Some(workload) if workload.state() == WorkloadState::Failed => {
                Progress::Failed(workload.message.clone())
            }
            Some(workload) => Progress::Pending(workload.message.clone()),
            None => Progress::Waiting,
        }
    }

    /// Tells it what to do, unless it was told just that.
    pub(super) fn tell(&mut self, wanted: &Configure, generation: u64) -> bool {
        if !self.connected {
            return false;
        }
        let mut told = wanted.clone();
        let last = self.configure.borrow().clone();
        told.generation = last.as_ref().map_or(0, |last| last.generation);
        if last.as_deref() == Some(&told) {
            return false;
        }
        told.generation = generation;
        if last
            .as_ref()
            .is_none_or(|last| last.listeners != told.listeners)
        {
            self.listeners_since = generation;
        }
        let before = last.as_deref().map_or(&[][..], |last| &last.workloads);
        self.workloads_since = told
            .workloads
            .iter()
            .map(|workload| {
                let kept = before.contains(workload);
                let since = self.workloads_since.get(&workload.uid).copied();
                let since = since.filter(|_| kept).unwrap_or(generation);
                (workload.uid.clone(), since)
            })
            .collect();
        self.configure.send_replace(Some(Arc::new(told)));
        true
    }
}
