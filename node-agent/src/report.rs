//! From what a pass saw and did to the status that users read. Pure; the time is handed in.

mod statement;

use crds::{
    AmbientNodeStatus, IptablesBackend, KernelStatus, ProxyStatus, Workload, WorkloadNote,
    conditions, reasons,
};
use datapath::FailureMode;
use datapath::attachment::Attachment;
use datapath::facts::Facts;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use self::statement::Statement;
use crate::desired::note;
use crate::failure::{Complaint, Failure, Part};
use crate::roster::{Identity, Progress};

/// Notes that fit into a status.
const MAX_NOTES: usize = 50;

/// What a pass saw and did.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    /// Generation of the spec.
    pub(crate) generation: Option<i64>,
    /// The field of the spec that cannot be used; the last good spec is in force.
    pub(crate) invalid_spec: Option<String>,
    pub(crate) failure_mode: FailureMode,
    pub(crate) facts: Option<Facts>,
    pub(crate) proxy: ProxyState,
    /// Why the last one who said hello was turned away.
    pub(crate) rejection: Option<Complaint>,
    pub(crate) failure: Option<Failure>,
    pub(crate) warning: Option<Complaint>,
    /// What the proxy says about each port.
    pub(crate) listeners: Vec<(u16, Progress)>,
    pub(crate) workloads: Vec<WorkloadOutcome>,
    pub(crate) unusable: Vec<WorkloadNote>,
    pub(crate) excluded: Vec<WorkloadNote>,
}

/// The proxy, as the agent sees it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ProxyState {
    /// None has said hello, or its connection is closed.
    Absent,
    /// It is connected, but the host cannot redirect to its namespace.
    Unusable(Complaint),
    /// It is connected.
    Attached(Identity, Attachment),
}

/// One workload of the spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WorkloadOutcome {
    pub(crate) workload: Workload,
    pub(crate) progress: Progress,
    /// The kernel sends its traffic to the proxy.
    pub(crate) redirected: bool,
}

impl WorkloadOutcome {
    /// Whether the mesh carries its traffic.
    pub(crate) fn is_enrolled(&self) -> bool {
        self.redirected && self.progress == Progress::Ready
    }
}

/// The status to write, whose unchanged conditions keep the times of `previous`; all but the boot in
/// which the node became ready, which needs more than this one outcome.
pub(crate) fn report(
    outcome: &Outcome,
    previous: &[Condition],
    now: Timestamp,
) -> AmbientNodeStatus {
    let mut pending: Vec<WorkloadNote> = outcome
        .workloads
        .iter()
        .filter_map(|workload| pending(workload, outcome))
        .chain(outcome.unusable.iter().cloned())
        .collect();
    let workloads = outcome.workloads.len() + outcome.unusable.len();
    let enrolled = workloads - pending.len();
    let mut parts = vec![
        proxy_attached(outcome),
        tunnels_ready(outcome),
        redirection_ready(outcome),
        listeners_ready(outcome),
        workloads_ready(outcome, &pending),
    ];
    parts.insert(0, ready(outcome, &parts, enrolled));
    pending.truncate(MAX_NOTES);
    let mut excluded = outcome.excluded.clone();
    excluded.truncate(MAX_NOTES);
    let proxy = match &outcome.proxy {
        ProxyState::Attached(identity, attachment) => Some((identity, attachment)),
        ProxyState::Absent | ProxyState::Unusable(_) => None,
    };
    AmbientNodeStatus {
        observed_generation: outcome.generation,
        conditions: parts
            .into_iter()
            .map(|part| part.condition(outcome.generation, previous, now))
            .collect(),
        host_ip: proxy.map(|(_, attachment)| attachment.ends.outer().host.to_string()),
        proxy: proxy.map(|(identity, attachment)| ProxyStatus {
            pod_name: identity.pod_name.clone(),
            pod_uid: identity.pod_uid.clone(),
            ip: attachment.ends.outer().proxy.to_string(),
            device: attachment.host_device.clone(),
            version: identity.version.clone(),
        }),
        kernel: outcome.facts.as_ref().map(kernel),
        ready_boot_id: None,
        workloads: count(workloads),
        enrolled: count(enrolled),
        pending,
        excluded,
    }
}

/// Whether two statuses differ in nothing but times.
pub(crate) fn same(one: &AmbientNodeStatus, other: &AmbientNodeStatus) -> bool {
    let timeless = |status: &AmbientNodeStatus| {
        let mut status = status.clone();
        for condition in &mut status.conditions {
            condition.last_transition_time = Time(Timestamp::UNIX_EPOCH);
        }
        status.conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
        status
    };
    timeless(one) == timeless(other)
}

/// A workload whose traffic the mesh does not carry, and why.
fn pending(outcome: &WorkloadOutcome, node: &Outcome) -> Option<WorkloadNote> {
    let WorkloadOutcome {
        workload,
        progress,
        redirected,
    } = outcome;
    let attached = matches!(node.proxy, ProxyState::Attached(..));
    match progress {
        _ if !attached => Some(note(
            workload,
            reasons::NO_PROXY,
            "it waits for a proxy on this node",
        )),
        Progress::Waiting => Some(note(
            workload,
            reasons::WAITING_FOR_PROXY,
            "the proxy has not answered yet",
        )),
        Progress::Pending(why) => Some(note(workload, reasons::WAITING_FOR_PROXY, why.as_str())),
        Progress::Failed(why) => Some(note(workload, reasons::PROXY_FAILED, why.as_str())),
        Progress::Ready if !redirected => Some(note(
            workload,
            reasons::NOT_APPLIED,
            "the kernel does not redirect it yet; see RedirectionReady",
        )),
        Progress::Ready => None,
    }
}

fn proxy_attached(outcome: &Outcome) -> Statement {
    let kind = conditions::PROXY_ATTACHED;
    match (&outcome.proxy, &outcome.rejection) {
        (ProxyState::Attached(identity, attachment), _) => Statement::holds(
            kind,
            reasons::ATTACHED,
            format!(
                "{} at {} by device {}",
                identity.pod_name,
                attachment.ends.outer().proxy,
                attachment.host_device
            ),
        ),
        (ProxyState::Unusable(why), _) | (ProxyState::Absent, Some(why)) => {
            Statement::fails(kind, why.reason, &why.message)
        }
        (ProxyState::Absent, None) => Statement::fails(
            kind,
            reasons::NO_PROXY,
            format!(
                "no proxy is connected to the agent; see the pods of DaemonSet ambit-proxy on this node; {}",
                without_proxy(outcome.failure_mode)
            ),
        ),
    }
}

fn without_proxy(mode: FailureMode) -> &'static str {
    match mode {
        FailureMode::Closed => {
            "until then enrolled pods' TCP traffic is refused (failureMode Closed)"
        }
        FailureMode::Open => {
            "until then enrolled pods' traffic goes directly, in the clear (failureMode Open)"
        }
    }
}

fn tunnels_ready(outcome: &Outcome) -> Statement {
    let kind = conditions::TUNNELS_READY;
    match (&outcome.failure, &outcome.proxy) {
        (Some(failure), _) if failure.part != Part::Redirection => {
            Statement::fails(kind, failure.reason, &failure.message)
        }
        (_, ProxyState::Attached(..)) => Statement::holds(
            kind,
            reasons::TUNNELS_UP,
            "istioin and istioout stand, in the host's network namespace and in the proxy's",
        ),
        _ => Statement::fails(
            kind,
            reasons::NO_PROXY,
            "the devices are made when a proxy is attached; see ProxyAttached",
        ),
    }
}

fn redirection_ready(outcome: &Outcome) -> Statement {
    let kind = conditions::REDIRECTION_READY;
    match (&outcome.failure, &outcome.proxy) {
        (Some(failure), _) if failure.part == Part::Tunnels => Statement::fails(
            kind,
            failure.reason,
            "it waits for the tunnels; see TunnelsReady",
        ),
        (Some(failure), _) => Statement::fails(kind, failure.reason, &failure.message),
        (None, ProxyState::Attached(..)) => redirecting(outcome.warning.as_ref()),
        (None, _) => Statement::fails(
            kind,
            reasons::NO_PROXY,
            "there is no proxy to redirect to; see ProxyAttached",
        ),
    }
}

fn redirecting(warning: Option<&Complaint>) -> Statement {
    let kind = conditions::REDIRECTION_READY;
    let holds = "rules, routes, set, chains and settings are in the kernel, as read back";
    match warning {
        None => Statement::holds(kind, reasons::REDIRECTING, holds),
        Some(warning) => Statement::holds(
            kind,
            warning.reason,
            format!("{holds}; {}", warning.message),
        ),
    }
}

fn listeners_ready(outcome: &Outcome) -> Statement {
    let kind = conditions::LISTENERS_READY;
    if !matches!(outcome.proxy, ProxyState::Attached(..)) {
        return Statement::fails(
            kind,
            reasons::NO_PROXY,
            "the proxy listens when it is attached; see ProxyAttached",
        );
    }
    let failed: Vec<String> = outcome
        .listeners
        .iter()
        .filter_map(|(port, state)| match state {
            Progress::Failed(why) => Some(format!("port {port}: {why}")),
            Progress::Waiting | Progress::Pending(_) | Progress::Ready => None,
        })
        .collect();
    if !failed.is_empty() {
        let message = format!(
            "the proxy cannot listen on {}; free the port or change spec.ports",
            failed.join(", ")
        );
        return Statement::fails(kind, reasons::LISTENER_FAILED, message);
    }
    let waiting = outcome
        .listeners
        .iter()
        .any(|(_, state)| *state != Progress::Ready);
    if waiting || outcome.listeners.is_empty() {
        return Statement::fails(
            kind,
            reasons::WAITING_FOR_PROXY,
            "the proxy has not said yet that it listens",
        );
    }
    let ports: Vec<String> = outcome
        .listeners
        .iter()
        .map(|(port, _)| port.to_string())
        .collect();
    Statement::holds(
        kind,
        reasons::LISTENING,
        format!("the proxy listens on {}", ports.join(", ")),
    )
}

fn workloads_ready(outcome: &Outcome, pending: &[WorkloadNote]) -> Statement {
    let kind = conditions::WORKLOADS_READY;
    let total = outcome.workloads.len() + outcome.unusable.len();
    match pending.first() {
        None => Statement::holds(
            kind,
            reasons::ALL_ENROLLED,
            format!("{total} of {total} workloads are enrolled"),
        ),
        Some(first) => Statement::fails(
            kind,
            if first.reason == reasons::NO_PROXY {
                reasons::NO_PROXY
            } else {
                reasons::WORKLOADS_PENDING
            },
            format!(
                "{} of {total} workloads are not enrolled (status.pending); the first is {}/{}: {}",
                pending.len(),
                first.namespace,
                first.name,
                first.message
            ),
        ),
    }
}

fn ready(outcome: &Outcome, parts: &[Statement], enrolled: usize) -> Statement {
    if let Some(problem) = &outcome.invalid_spec {
        let message = format!("{problem}; the last valid spec stays in force");
        return Statement::fails(conditions::READY, reasons::INVALID_SPEC, message);
    }
    match parts.iter().find(|part| !part.holds) {
        None => Statement::holds(
            conditions::READY,
            reasons::READY,
            format!("the mesh carries the traffic of {enrolled} workloads"),
        ),
        Some(part) => Statement::fails(
            conditions::READY,
            part.reason,
            format!("{}: {}", part.kind, part.message),
        ),
    }
}

fn kernel(facts: &Facts) -> KernelStatus {
    KernelStatus {
        release: facts.release.clone(),
        geneve: facts.geneve,
        iptables: match facts.iptables {
            datapath::IptablesBackend::Nft => IptablesBackend::Nft,
            datapath::IptablesBackend::Legacy => IptablesBackend::Legacy,
        },
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use datapath::facts::{FactsError, Obstacle};

    use super::*;
    use crate::desired::tests::workload;

    pub(crate) fn all_well() -> Outcome {
        Outcome {
            generation: Some(3),
            invalid_spec: None,
            failure_mode: FailureMode::Closed,
            facts: Some(Facts {
                release: "6.1".to_owned(),
                boot: "boot-2".to_owned(),
                geneve: true,
                iptables: datapath::IptablesBackend::Nft,
            }),
            proxy: ProxyState::Attached(
                Identity {
                    pod_name: "ambit-proxy-x".to_owned(),
                    pod_uid: "p".to_owned(),
                    version: "1".to_owned(),
                    created: Timestamp::UNIX_EPOCH,
                    terminating: false,
                },
                Attachment {
                    ends: datapath::input::Ends::V4(datapath::input::Pair {
                        proxy: "10.0.0.3".parse().unwrap(),
                        host: "10.0.0.1".parse().unwrap(),
                    }),
                    device: "eth0".to_owned(),
                    host_device: "vethp".to_owned(),
                    mtu: 1500,
                    default_rp_filter: "0".to_owned(),
                },
            ),
            rejection: None,
            failure: None,
            warning: None,
            listeners: [15001, 15008, 15006]
                .map(|port| (port, Progress::Ready))
                .into(),
            workloads: vec![WorkloadOutcome {
                workload: workload("a", "10.0.0.4"),
                progress: Progress::Ready,
                redirected: true,
            }],
            unusable: Vec::new(),
            excluded: Vec::new(),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    pub(crate) fn status_of(outcome: &Outcome) -> AmbientNodeStatus {
        report(outcome, &[], at(1))
    }

    fn condition<'a>(status: &'a AmbientNodeStatus, kind: &str) -> (&'a str, &'a str, &'a str) {
        let found = status
            .conditions
            .iter()
            .find(|condition| condition.type_ == kind)
            .unwrap();
        (&found.status, &found.reason, &found.message)
    }

    #[test]
    fn when_all_is_well_every_condition_holds() {
        let status = status_of(&all_well());
        assert!(
            status
                .conditions
                .iter()
                .all(|condition| condition.status == "True"),
            "{status:?}"
        );
        assert_eq!((status.workloads, status.enrolled), (1, 1));
        assert_eq!(status.host_ip.as_deref(), Some("10.0.0.1"));
        insta::assert_snapshot!(
            "all_is_well",
            serde_json::to_string_pretty(&status).unwrap()
        );
    }

    #[test]
    fn there_is_one_condition_of_each_kind() {
        let status = status_of(&all_well());
        let kinds: Vec<&str> = status
            .conditions
            .iter()
            .map(|condition| condition.type_.as_str())
            .collect();
        assert_eq!(kinds[0], conditions::READY);
        assert_eq!(kinds[1..], conditions::PARTS);
    }

    #[test]
    fn a_kernel_without_geneve_is_told_what_to_do() {
        let mut outcome = all_well();
        outcome.failure = Some(Failure::geneve_unsupported());
        outcome.workloads[0].redirected = false;
        let status = status_of(&outcome);
        assert_eq!(
            condition(&status, conditions::TUNNELS_READY),
            (
                "False",
                "GeneveUnsupported",
                "this kernel has no geneve driver; load it (modprobe geneve) or set spec.tunnel.type: Veth"
            )
        );
        assert_eq!(condition(&status, conditions::READY).1, "GeneveUnsupported");
        assert_eq!(status.enrolled, 0);
    }

    #[test]
    fn what_might_be_in_the_way_is_said_of_a_redirection_that_is_ready() {
        let mut outcome = all_well();
        outcome.warning = Complaint::of(&[Obstacle::EbpfProgram {
            device: "vethp".to_owned(),
            program: "watch".to_owned(),
        }]);
        let status = status_of(&outcome);
        let (holds, reason, message) = condition(&status, conditions::REDIRECTION_READY);
        assert_eq!((holds, reason), ("True", "EbpfDataPath"));
        assert!(message.contains("vethp"), "{message}");
        assert_eq!(condition(&status, conditions::READY).1, "AllReady");
    }

    #[test]
    fn a_kernel_that_cannot_be_read_leaves_no_part_ready() {
        let mut outcome = all_well();
        outcome.failure = Some(Failure::from(&FactsError::Rights(vec!["NET_ADMIN"])));
        let status = status_of(&outcome);
        for kind in [conditions::TUNNELS_READY, conditions::REDIRECTION_READY] {
            let (holds, reason, _) = condition(&status, kind);
            assert_eq!((holds, reason), ("False", "CapabilityMissing"));
        }
    }

    #[test]
    fn without_a_proxy_nothing_counts_as_enrolled_and_the_message_says_what_happens() {
        let mut outcome = all_well();
        outcome.proxy = ProxyState::Absent;
        let status = status_of(&outcome);
        let (holds, reason, message) = condition(&status, conditions::READY);
        assert_eq!((holds, reason), ("False", "NoProxy"));
        assert!(message.contains("failureMode Closed"), "{message}");
        assert_eq!((status.enrolled, status.pending.len()), (0, 1));
        outcome.rejection = Some(Complaint {
            reason: reasons::PROXY_REJECTED,
            message: "pod x runs on another node".to_owned(),
        });
        assert_eq!(
            condition(&status_of(&outcome), conditions::PROXY_ATTACHED),
            ("False", "ProxyRejected", "pod x runs on another node")
        );
    }

    #[test]
    fn a_listener_that_cannot_bind_is_named_with_its_port() {
        let mut outcome = all_well();
        outcome.listeners[1].1 = Progress::Failed("address in use".to_owned());
        let status = status_of(&outcome);
        let (_, reason, message) = condition(&status, conditions::LISTENERS_READY);
        assert_eq!(reason, "ListenerFailed");
        assert!(message.contains("port 15008: address in use"), "{message}");
    }

    #[test]
    fn a_workload_that_waits_is_listed_with_its_reason() {
        let mut outcome = all_well();
        outcome.workloads[0].progress = Progress::Failed("no certificate: denied".to_owned());
        let status = status_of(&outcome);
        assert_eq!(status.pending[0].reason, reasons::PROXY_FAILED);
        assert_eq!(status.pending[0].message, "no certificate: denied");
        outcome.workloads[0].progress = Progress::Pending("asks for a certificate".to_owned());
        let waiting = &status_of(&outcome).pending[0];
        assert_eq!(waiting.reason, reasons::WAITING_FOR_PROXY);
        assert_eq!(waiting.message, "asks for a certificate");
        assert_eq!(
            condition(&status, conditions::WORKLOADS_READY).1,
            "WorkloadsPending"
        );
    }

    #[test]
    fn an_invalid_spec_is_the_reason_of_ready() {
        let mut outcome = all_well();
        outcome.invalid_spec = Some("spec.marks.skip: mark \"x\" has no mask".to_owned());
        let status = status_of(&outcome);
        let (_, reason, message) = condition(&status, conditions::READY);
        assert_eq!(reason, "InvalidSpec");
        assert!(message.starts_with("spec.marks.skip"), "{message}");
    }

    #[test]
    fn the_list_of_pending_workloads_is_bounded_and_the_count_is_not() {
        let mut outcome = all_well();
        outcome.workloads = (0..80)
            .map(|index| WorkloadOutcome {
                workload: workload(&index.to_string(), "10.0.0.4"),
                progress: Progress::Waiting,
                redirected: false,
            })
            .collect();
        let status = status_of(&outcome);
        assert_eq!(
            (status.pending.len(), status.workloads, status.enrolled),
            (50, 80, 0)
        );
    }

    #[test]
    fn the_time_of_a_condition_changes_with_its_status_only() {
        let first = report(&all_well(), &[], at(1));
        let mut outcome = all_well();
        outcome.generation = Some(4);
        let second = report(&outcome, &first.conditions, at(2));
        assert!(
            second
                .conditions
                .iter()
                .all(|condition| condition.last_transition_time.0 == at(1))
        );
        outcome.proxy = ProxyState::Absent;
        let third = report(&outcome, &second.conditions, at(3));
        assert!(
            third
                .conditions
                .iter()
                .all(|condition| condition.last_transition_time.0 == at(3))
        );
    }

    #[test]
    fn statuses_that_differ_in_times_only_are_the_same() {
        let (one, mut other) = (
            report(&all_well(), &[], at(1)),
            report(&all_well(), &[], at(2)),
        );
        assert!(same(&one, &other));
        other.enrolled = 7;
        assert!(!same(&one, &other));
    }
}
