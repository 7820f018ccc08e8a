//! How far the proxy is, for the agent. Pure.

use std::collections::BTreeMap;
use std::io;
use std::time::SystemTime;

use hbone::ListenerKind;
use hbone::certificates::State;
use hbone::identity::SpiffeId;
use hbone::local::LocalWorkload;
use hbone::serve::Listener;
use protocol::node::{ListenerReport, Report, WorkloadReport, WorkloadState};

use super::configuration::Configuration;

/// Builds the report.
pub(super) fn build(
    configuration: &Configuration,
    listeners: &BTreeMap<Listener, Result<(), io::Error>>,
    certificates: &BTreeMap<SpiffeId, State>,
    discovered: bool,
    now: SystemTime,
) -> Report {
    let bound = |kind| {
        let mut of_kind = listeners.iter().filter(|((of, _), _)| *of == kind);
        of_kind.any(|(_, result)| result.is_ok())
    };
    let listening = bound(ListenerKind::Outbound) && bound(ListenerKind::Inbound);
    let served = configuration.workloads.iter().map(|workload| {
        let (state, message) = if !listening {
            (
                WorkloadState::Pending,
                "the proxy does not listen yet".to_owned(),
            )
        } else if !discovered {
            let message = "the proxy has received nothing from the controller yet";
            (WorkloadState::Pending, message.to_owned())
        } else {
            by_certificate(workload, certificates, now)
        };
        workload_report(&workload.uid, state, message)
    });
    let refused = configuration
        .refused
        .iter()
        .map(|(uid, error)| workload_report(uid, WorkloadState::Failed, error.clone()));
    Report {
        generation: configuration.generation,
        listeners: listeners.iter().map(listener_report).collect(),
        workloads: served.chain(refused).collect(),
        ..Report::default()
    }
}

fn by_certificate(
    workload: &LocalWorkload,
    certificates: &BTreeMap<SpiffeId, State>,
    now: SystemTime,
) -> (WorkloadState, String) {
    let identity = &workload.identity;
    let state = certificates.get(identity);
    if state.is_some_and(|state| state.valid(now).is_some()) {
        return (WorkloadState::Ready, String::new());
    }
    match state.and_then(|state| state.error.as_ref()) {
        Some(error) => (WorkloadState::Failed, error.clone()),
        None => (
            WorkloadState::Pending,
            format!("waiting for the certificate of {identity}"),
        ),
    }
}

fn workload_report(uid: &str, state: WorkloadState, message: String) -> WorkloadReport {
    WorkloadReport {
        uid: uid.to_owned(),
        state: state.into(),
        message,
    }
}

fn listener_report(((_, port), result): (&Listener, &Result<(), io::Error>)) -> ListenerReport {
    let error = result.as_ref().err();
    ListenerReport {
        port: u32::from(*port),
        error: error.map(ToString::to_string).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::configuration::tests::{parse, workload};
    use super::*;

    fn listeners(error: Option<&str>) -> BTreeMap<Listener, Result<(), io::Error>> {
        let inbound = error.map_or(Ok(()), |error| Err(io::Error::other(error.to_owned())));
        BTreeMap::from([
            ((ListenerKind::Outbound, 15001), Ok(())),
            ((ListenerKind::Inbound, 15008), inbound),
        ])
    }

    fn state_of(report: &Report) -> (WorkloadState, &str) {
        let first = &report.workloads[0];
        (first.state(), &first.message)
    }

    #[test]
    fn a_pod_waits_for_listeners_then_for_discovery_then_for_its_certificate() {
        let wanted = parse(vec![workload("a", "10.0.0.1")]);
        let none = BTreeMap::new();
        let now = SystemTime::now();
        let report = build(&wanted, &listeners(Some("in use")), &none, true, now);
        assert_eq!(
            state_of(&report),
            (WorkloadState::Pending, "the proxy does not listen yet")
        );
        assert_eq!(report.listeners[1].error, "in use");
        let report = build(&wanted, &listeners(None), &none, false, now);
        assert!(state_of(&report).1.contains("from the controller"));
        let report = build(&wanted, &listeners(None), &none, true, now);
        assert!(state_of(&report).1.contains("waiting for the certificate"));
        let failed = State {
            certificate: None,
            error: Some("no such pod here".to_owned()),
        };
        let identity = wanted.workloads.iter().next().unwrap().identity.clone();
        let failed = BTreeMap::from([(identity, failed)]);
        let report = build(&wanted, &listeners(None), &failed, true, now);
        assert_eq!(
            state_of(&report),
            (WorkloadState::Failed, "no such pod here")
        );
        assert_eq!(report.generation, 7);
    }

    #[test]
    fn a_pod_that_cannot_be_served_is_reported_too() {
        let wanted = parse(vec![workload("b", "ten")]);
        let report = build(
            &wanted,
            &listeners(None),
            &BTreeMap::new(),
            true,
            SystemTime::now(),
        );
        assert_eq!(
            state_of(&report),
            (WorkloadState::Failed, "\"ten\" is no address")
        );
    }
}
