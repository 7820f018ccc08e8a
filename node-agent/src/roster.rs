//! The proxies that are connected, what each was told and what it answered, and which of them the
//! kernel should use. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use datapath::input::Ports;
use datapath::netns::Netns;
use protocol::node::{Configure, Listener, Report, WorkloadState};
use tokio::sync::watch;

use crate::failure::Complaint;

/// Tells connections apart; a later one is larger.
pub(crate) type SessionId = u64;

/// A proxy's pod, checked against the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) pod_name: String,
    pub(crate) pod_uid: String,
    pub(crate) version: String,
}

/// What a connection brings.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// A proxy said hello and is who it claims to be.
    Attached(Session),
    /// It answered.
    Reported(SessionId, Report),
    /// The connection is closed.
    Detached(SessionId),
    /// Someone said hello who is not this node's proxy.
    Rejected(Complaint),
}

/// A proxy that said hello.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) identity: Identity,
    pub(crate) netns: Netns,
    configure: watch::Sender<Option<Arc<Configure>>>,
    connected: bool,
    report: Option<Report>,
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

/// Every proxy that is connected, and the one the kernel uses.
#[derive(Debug)]
pub(crate) struct Roster {
    /// In the order of their hellos. The last to be used stays here after its connection is closed:
    /// a proxy that starts again in the same pod finds its devices in place.
    sessions: Vec<Session>,
    current: Option<SessionId>,
    rejection: Option<Complaint>,
    generation: u64,
}

impl Session {
    pub(crate) fn new(
        id: SessionId,
        identity: Identity,
        netns: Netns,
        configure: watch::Sender<Option<Arc<Configure>>>,
    ) -> Self {
        Self {
            id,
            identity,
            netns,
            configure,
            connected: true,
            report: None,
            listeners_since: 0,
            workloads_since: BTreeMap::new(),
        }
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
    fn tell(&mut self, wanted: &Configure, generation: u64) -> bool {
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

impl Roster {
    /// Nobody. Generations begin after `first`: an answer to an earlier agent must be older than
    /// every question of this one.
    pub(crate) fn new(first: u64) -> Self {
        Self {
            sessions: Vec::new(),
            current: None,
            rejection: None,
            generation: first,
        }
    }

    /// Takes note of what a connection brought.
    pub(crate) fn take(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Attached(session) => {
                self.rejection = None;
                self.sessions.push(session);
            }
            SessionEvent::Reported(id, report) => {
                if let Some(session) = self.session_mut(id) {
                    session.report = Some(report);
                }
            }
            SessionEvent::Detached(id) => {
                if let Some(session) = self.session_mut(id) {
                    session.connected = false;
                }
                let current = self.current;
                self.sessions
                    .retain(|session| session.connected || Some(session.id) == current);
            }
            SessionEvent::Rejected(why) => self.rejection = Some(why),
        }
    }

    /// Why the last one who said hello was turned away, until another is let in.
    pub(crate) fn rejection(&self) -> Option<&Complaint> {
        self.rejection.as_ref()
    }

    /// Chooses the proxy that the kernel is to use: the newest that is prepared; until then the one in
    /// use while it lives; else the newest.
    pub(crate) fn choose(&mut self, ports: Ports, enrolled: &BTreeSet<String>) -> Option<&Session> {
        let prepared = |session: &&Session| {
            session.is_serving(ports)
                && enrolled
                    .iter()
                    .all(|uid| session.workload(uid) == Progress::Ready)
        };
        let newest = |wanted: &dyn Fn(&&Session) -> bool| {
            self.sessions
                .iter()
                .rev()
                .find(wanted)
                .map(|session| session.id)
        };
        let chosen = newest(&prepared)
            .or_else(|| newest(&|session| session.connected && Some(session.id) == self.current))
            .or_else(|| newest(&|session| session.connected))
            .or_else(|| newest(&|_| true));
        self.current = chosen;
        self.sessions
            .retain(|session| session.connected || Some(session.id) == chosen);
        self.current()
    }

    /// The proxy that the kernel uses.
    pub(crate) fn current(&self) -> Option<&Session> {
        self.sessions
            .iter()
            .find(|session| Some(session.id) == self.current)
    }

    /// Lets go of the current proxy's namespace if nobody speaks for it any more.
    pub(crate) fn forget_dead(&mut self) {
        self.sessions.retain(|session| session.connected);
    }

    /// Whether the current proxy is connected.
    pub(crate) fn current_is_connected(&self) -> bool {
        self.current().is_some_and(|session| session.connected)
    }

    /// Tells every connected proxy what to do: always everything.
    pub(crate) fn tell(&mut self, wanted: &Configure) {
        let next = self.generation + 1;
        let mut told = false;
        for session in &mut self.sessions {
            told |= session.tell(wanted, next);
        }
        if told {
            self.generation = next;
        }
    }

    fn session_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }
}

/// The listeners of these ports.
pub(crate) fn listeners(ports: Ports) -> Vec<Listener> {
    use protocol::node::ListenerKind::{Inbound, InboundPlaintext, Outbound};
    [
        (Outbound, ports.outbound),
        (Inbound, ports.inbound),
        (InboundPlaintext, ports.inbound_plaintext),
    ]
    .map(|(kind, port)| Listener {
        kind: kind.into(),
        port: port.into(),
    })
    .into()
}

#[cfg(test)]
mod tests {
    use protocol::node::{ListenerReport, Workload, WorkloadReport};

    use super::*;

    const PORTS: Ports = Ports {
        outbound: 15001,
        inbound: 15008,
        inbound_plaintext: 15006,
    };

    type Told = watch::Receiver<Option<Arc<Configure>>>;

    fn session(id: SessionId) -> (Session, Told) {
        let (configure, told) = watch::channel(None);
        let identity = Identity {
            pod_name: format!("proxy-{id}"),
            pod_uid: id.to_string(),
            version: "1".to_owned(),
        };
        (Session::new(id, identity, Netns::own(), configure), told)
    }

    fn configure(uids: &[&str]) -> Configure {
        Configure {
            listeners: listeners(PORTS),
            workloads: uids
                .iter()
                .map(|uid| Workload {
                    uid: (*uid).to_owned(),
                    ..Workload::default()
                })
                .collect(),
            ..Configure::default()
        }
    }

    /// A report that says that all is well, for the generation last told.
    fn all_well(told: &Told) -> Report {
        let told = told.borrow().clone().unwrap();
        Report {
            generation: told.generation,
            listeners: told
                .listeners
                .iter()
                .map(|listener| ListenerReport {
                    port: listener.port,
                    error: String::new(),
                })
                .collect(),
            workloads: told
                .workloads
                .iter()
                .map(|workload| WorkloadReport {
                    uid: workload.uid.clone(),
                    state: WorkloadState::Ready.into(),
                    message: String::new(),
                })
                .collect(),
        }
    }

    fn with_one(uids: &[&str]) -> (Roster, Told) {
        let mut roster = Roster::new(100);
        let (session, told) = session(1);
        roster.take(SessionEvent::Attached(session));
        roster.choose(PORTS, &BTreeSet::new());
        roster.tell(&configure(uids));
        (roster, told)
    }

    #[test]
    fn a_proxy_serves_once_it_says_that_every_port_is_bound() {
        let (mut roster, told) = with_one(&[]);
        assert!(!roster.current().unwrap().is_serving(PORTS));
        let mut report = all_well(&told);
        report.listeners[1].error = "address in use".to_owned();
        roster.take(SessionEvent::Reported(1, report));
        assert!(!roster.current().unwrap().is_serving(PORTS));
        roster.take(SessionEvent::Reported(1, all_well(&told)));
        assert!(roster.current().unwrap().is_serving(PORTS));
    }

    #[test]
    fn the_same_state_is_told_once() {
        let (mut roster, mut told) = with_one(&["a"]);
        let first = told.borrow_and_update().clone().unwrap();
        assert!(first.generation > 100);
        roster.tell(&configure(&["a"]));
        assert!(!told.has_changed().unwrap());
        roster.tell(&configure(&["a", "b"]));
        assert!(told.borrow_and_update().clone().unwrap().generation > first.generation);
    }

    #[test]
    fn an_answer_from_before_a_pod_came_back_does_not_count() {
        let (mut roster, told) = with_one(&["a"]);
        let old = all_well(&told);
        roster.take(SessionEvent::Reported(1, old.clone()));
        assert_eq!(roster.current().unwrap().workload("a"), Progress::Ready);
        roster.tell(&configure(&[]));
        roster.tell(&configure(&["a"]));
        assert_eq!(roster.current().unwrap().workload("a"), Progress::Waiting);
        roster.take(SessionEvent::Reported(1, old));
        assert_eq!(roster.current().unwrap().workload("a"), Progress::Waiting);
        roster.take(SessionEvent::Reported(1, all_well(&told)));
        assert_eq!(roster.current().unwrap().workload("a"), Progress::Ready);
    }

    #[test]
    fn an_answer_to_an_earlier_agent_does_not_count() {
        let (mut roster, told) = with_one(&["a"]);
        let mut report = all_well(&told);
        report.generation = 57;
        roster.take(SessionEvent::Reported(1, report));
        assert!(!roster.current().unwrap().has_answered());
        assert_eq!(roster.current().unwrap().workload("a"), Progress::Waiting);
    }

    #[test]
    fn a_new_proxy_is_used_when_it_is_prepared_and_not_before() {
        let (mut roster, told) = with_one(&["a"]);
        roster.take(SessionEvent::Reported(1, all_well(&told)));
        let (second, second_told) = session(2);
        roster.take(SessionEvent::Attached(second));
        let enrolled = BTreeSet::from(["a".to_owned()]);
        assert_eq!(roster.choose(PORTS, &enrolled).unwrap().id, 1);
        roster.tell(&configure(&["a"]));
        roster.take(SessionEvent::Reported(2, all_well(&second_told)));
        assert_eq!(roster.choose(PORTS, &enrolled).unwrap().id, 2);
        roster.take(SessionEvent::Detached(2));
        assert_eq!(roster.choose(PORTS, &enrolled).unwrap().id, 1);
    }

    #[test]
    fn a_proxy_that_died_keeps_its_place_until_another_comes() {
        let (mut roster, told) = with_one(&["a"]);
        roster.take(SessionEvent::Reported(1, all_well(&told)));
        roster.take(SessionEvent::Detached(1));
        let kept = roster.choose(PORTS, &BTreeSet::new()).unwrap();
        assert_eq!(kept.id, 1);
        assert!(!kept.is_serving(PORTS));
        assert_eq!(kept.workload("a"), Progress::Waiting);
        roster.take(SessionEvent::Attached(session(2).0));
        assert_eq!(roster.choose(PORTS, &BTreeSet::new()).unwrap().id, 2);
    }

    #[test]
    fn a_rejection_counts_until_a_proxy_is_let_in() {
        let mut roster = Roster::new(0);
        let rejected = Complaint {
            reason: crds::reasons::PROXY_REJECTED,
            message: "no such pod".to_owned(),
        };
        roster.take(SessionEvent::Rejected(rejected.clone()));
        assert_eq!(roster.rejection(), Some(&rejected));
        roster.take(SessionEvent::Attached(session(1).0));
        assert_eq!(roster.rejection(), None);
    }
}
