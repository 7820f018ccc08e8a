//! What the agent tells and is told: its messages to checked values, and states to a report. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::SystemTime;

use hbone::ListenerKind;
use hbone::certificates::State;
use hbone::identity::{SpiffeId, TrustDomain};
use hbone::local::{LocalWorkload, LocalWorkloads};
use hbone::serve::Listener;
use protocol::node::{
    self, Configure, ListenerReport, LocalTraffic, Report, WorkloadReport, WorkloadState,
};

/// A configuration of the agent, checked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Configuration {
    generation: u64,
    pub(crate) listeners: BTreeSet<Listener>,
    pub(crate) local_by_tunnel: bool,
    pub(crate) workloads: LocalWorkloads,
    /// What cannot be done, as it is reported.
    refused_listeners: Vec<ListenerReport>,
    refused_workloads: Vec<WorkloadReport>,
}

/// Of every wanted listener: nothing if it is bound, or why it is not.
pub(crate) type Bound = BTreeMap<Listener, Option<String>>;

/// Checks a configuration. What is wrong in it is kept for the report; the rest counts.
pub(crate) fn parse(configure: Configure, trust_domain: &TrustDomain) -> Configuration {
    let mut parsed = Configuration {
        generation: configure.generation,
        local_by_tunnel: configure.local_traffic == LocalTraffic::Hbone as i32,
        ..Configuration::default()
    };
    for wanted in configure.listeners {
        match listener(&wanted) {
            Ok(listener) => drop(parsed.listeners.insert(listener)),
            Err(error) => parsed.refused_listeners.push(ListenerReport {
                port: wanted.port,
                error,
            }),
        }
    }
    let mut good = Vec::new();
    for wanted in configure.workloads {
        let uid = wanted.uid.clone();
        match workload(wanted, trust_domain) {
            Ok(workload) => good.push(workload),
            Err(message) => parsed.refused_workloads.push(WorkloadReport {
                uid,
                state: WorkloadState::Failed.into(),
                message,
            }),
        }
    }
    parsed.workloads = good.into_iter().collect();
    parsed
}

fn listener(wanted: &node::Listener) -> Result<Listener, String> {
    let kind = match node::ListenerKind::try_from(wanted.kind) {
        Ok(node::ListenerKind::Outbound) => ListenerKind::Outbound,
        Ok(node::ListenerKind::Inbound) => ListenerKind::Inbound,
        Ok(node::ListenerKind::InboundPlaintext) => ListenerKind::InboundPlaintext,
        Ok(node::ListenerKind::Unspecified) | Err(_) => {
            return Err(format!(
                "a listener of kind {} is not known here",
                wanted.kind
            ));
        }
    };
    match u16::try_from(wanted.port) {
        Ok(port) if port != 0 => Ok((kind, port)),
        _ => Err(format!("{} is not a port", wanted.port)),
    }
}

fn workload(wanted: node::Workload, trust_domain: &TrustDomain) -> Result<LocalWorkload, String> {
    let identity = SpiffeId::new(trust_domain, &wanted.namespace, &wanted.service_account)
        .map_err(|error| error.to_string())?;
    let addresses = wanted.ips.iter().map(|ip| {
        ip.parse::<IpAddr>()
            .map_err(|_| format!("{ip:?} is not an address"))
    });
    Ok(LocalWorkload {
        addresses: addresses.collect::<Result<_, _>>()?,
        uid: wanted.uid.into(),
        namespace: wanted.namespace.into(),
        name: wanted.name.into(),
        identity,
    })
}

/// What the agent is told about a configuration.
pub(crate) fn report(
    configuration: &Configuration,
    bound: &Bound,
    certificates: &BTreeMap<SpiffeId, State>,
    now: SystemTime,
) -> Report {
    let mut listeners = configuration.refused_listeners.clone();
    listeners.extend(bound.iter().map(|((_, port), error)| ListenerReport {
        port: (*port).into(),
        error: error.clone().unwrap_or_default(),
    }));
    let serving = listeners.iter().all(|listener| listener.error.is_empty());
    let mut workloads = configuration.refused_workloads.clone();
    workloads.extend(configuration.workloads.iter().map(|workload| {
        let (state, message) = state(certificates.get(&workload.identity), serving, now);
        WorkloadReport {
            uid: workload.uid.to_string(),
            state: state.into(),
            message,
        }
    }));
    Report {
        generation: configuration.generation,
        listeners,
        workloads,
    }
}

/// A workload is ready when its connections can be carried: its certificate is valid, and every
/// listener is bound.
fn state(certificate: Option<&State>, serving: bool, now: SystemTime) -> (WorkloadState, String) {
    let message = match certificate {
        Some(state) if state.valid(now).is_some() => match serving {
            true => return (WorkloadState::Ready, String::new()),
            false => "not every listener of the proxy is bound".to_owned(),
        },
        Some(State {
            error: Some(error), ..
        }) => return (WorkloadState::Failed, error.clone()),
        _ => "waiting for its certificate".to_owned(),
    };
    (WorkloadState::Pending, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configure() -> Configure {
        let workload = |uid: &str, account: &str, ip: &str| node::Workload {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            name: uid.to_owned(),
            service_account: account.to_owned(),
            ips: vec![ip.to_owned()],
        };
        let listener = |kind, port| node::Listener { kind, port };
        Configure {
            generation: 7,
            listeners: vec![listener(1, 15001), listener(2, 15008), listener(9, 1)],
            workloads: vec![
                workload("good", "web", "10.1.0.4"),
                workload("bad-ip", "web", "10.1.0"),
                workload("bad-account", "", "10.1.0.5"),
            ],
            local_traffic: 0,
        }
    }

    fn trust_domain() -> TrustDomain {
        TrustDomain::new("cluster.local").unwrap()
    }

    #[test]
    fn what_is_wrong_is_reported_and_the_rest_counts() {
        let configuration = parse(configure(), &trust_domain());
        assert_eq!(configuration.listeners.len(), 2);
        assert_eq!(configuration.workloads.iter().count(), 1);
        let bound = Bound::from([((ListenerKind::Outbound, 15001), None)]);
        let report = report(&configuration, &bound, &BTreeMap::new(), SystemTime::now());
        assert_eq!(report.generation, 7);
        let states: BTreeMap<&str, i32> = report
            .workloads
            .iter()
            .map(|workload| (workload.uid.as_str(), workload.state))
            .collect();
        assert_eq!(states["good"], WorkloadState::Pending as i32);
        assert_eq!(states["bad-ip"], WorkloadState::Failed as i32);
        assert_eq!(states["bad-account"], WorkloadState::Failed as i32);
        assert!(
            report
                .listeners
                .iter()
                .any(|l| l.port == 1 && !l.error.is_empty())
        );
    }

    #[test]
    fn a_workload_without_certificate_says_why() {
        let configuration = parse(configure(), &trust_domain());
        let workload = configuration.workloads.iter().next().unwrap();
        let failed = State {
            certificate: None,
            error: Some("the controller said no".to_owned()),
        };
        let states = BTreeMap::from([(workload.identity.clone(), failed)]);
        let report = report(&configuration, &Bound::new(), &states, SystemTime::now());
        let good = report.workloads.iter().find(|w| w.uid == "good").unwrap();
        assert_eq!(good.state, WorkloadState::Failed as i32);
        assert_eq!(good.message, "the controller said no");
    }
}
