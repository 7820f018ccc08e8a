//! Pure: who is in the mesh, and what keeps the others out.

use std::net::IpAddr;
use std::sync::Arc;

use crate::names::{NamespaceName, PodKey};
use crate::snapshot::ClusterSnapshot;
use crate::snapshot::objects::Pod;

/// What the enrolment label says, and where nobody is enrolled.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// Key of the label, on namespaces and pods.
    pub(crate) label: String,
    /// Value that enrols.
    pub(crate) enrol: String,
    /// Value on a pod that keeps it out.
    pub(crate) opt_out: String,
    /// The namespace of Ambit's own programs.
    pub(crate) system_namespace: NamespaceName,
}

/// A pod's place in the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Enrolment {
    /// Nothing asks for it.
    NotAsked,
    Enrolled,
    Excluded(Exclusion),
}

/// Why a pod that is labelled for the mesh stays out of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Exclusion {
    AddressConflict { address: IpAddr, holder: PodKey },
    Sidecar { container: &'static str },
    HostNetwork,
    SystemNamespace,
    OptedOut,
    NoAddress,
    Completed,
}

/// Decides about one pod. A pod that is being deleted stays in until it is gone: it may still
/// finish requests.
pub(crate) fn enrolment(snapshot: &ClusterSnapshot, rules: &Rules, pod: &Pod) -> Enrolment {
    let by_namespace = snapshot
        .namespace(&pod.key.namespace)
        .is_some_and(|namespace| namespace.mode.as_deref() == Some(rules.enrol.as_str()));
    let by_pod = pod.mode.as_deref() == Some(rules.enrol.as_str());
    if !by_namespace && !by_pod {
        return Enrolment::NotAsked;
    }
    match exclusion(snapshot, rules, pod) {
        Some(exclusion) => Enrolment::Excluded(exclusion),
        None => Enrolment::Enrolled,
    }
}

fn exclusion(snapshot: &ClusterSnapshot, rules: &Rules, pod: &Pod) -> Option<Exclusion> {
    if pod.key.namespace == rules.system_namespace {
        return Some(Exclusion::SystemNamespace);
    }
    if pod.mode.as_deref() == Some(rules.opt_out.as_str()) {
        return Some(Exclusion::OptedOut);
    }
    if pod.host_network {
        return Some(Exclusion::HostNetwork);
    }
    if pod.terminal {
        return Some(Exclusion::Completed);
    }
    if let Some(container) = pod.sidecar {
        return Some(Exclusion::Sidecar { container });
    }
    if pod.ips.is_empty() {
        return Some(Exclusion::NoAddress);
    }
    pod.ips.iter().find_map(|address| {
        let holder = address_holder(snapshot, *address)?;
        (holder.uid != pod.uid).then(|| Exclusion::AddressConflict {
            address: *address,
            holder: holder.key.clone(),
        })
    })
}

/// The pod that has an address that several may claim: one that is not terminal, then the newest.
pub(crate) fn address_holder(snapshot: &ClusterSnapshot, address: IpAddr) -> Option<&Arc<Pod>> {
    snapshot
        .claimants(address)
        .max_by_key(|pod| (!pod.terminal, pod.created, pod.uid.clone()))
}

// === impl Exclusion ===

impl Exclusion {
    /// One word, for programs.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::AddressConflict { .. } => "AddressConflict",
            Self::Sidecar { .. } => "Sidecar",
            Self::HostNetwork => "HostNetwork",
            Self::SystemNamespace => "SystemNamespace",
            Self::OptedOut => "OptedOut",
            Self::NoAddress => "NoAddress",
            Self::Completed => "Completed",
        }
    }

    /// For people: what keeps the pod out, and what to do.
    pub(crate) fn message(&self, rules: &Rules) -> String {
        let Rules { label, opt_out, .. } = rules;
        match self {
            Self::AddressConflict { address, holder } => format!(
                "pod {holder} has the address {address} too and is newer; delete one of the two"
            ),
            Self::Sidecar { container } => format!(
                "its container {container} carries its traffic already; \
                 disable the injection and restart the pod to bring it into this mesh"
            ),
            Self::HostNetwork => {
                "it is on the host's network and has no address of its own".to_owned()
            }
            Self::SystemNamespace => {
                "Ambit's own programs cannot be in the mesh; move other pods elsewhere".to_owned()
            }
            Self::OptedOut => {
                format!("its label {label}={opt_out} keeps it out; remove the label to enrol it")
            }
            Self::NoAddress => "it has no address yet".to_owned(),
            Self::Completed => "it has ended".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::{SignedDuration, Timestamp};

    use super::*;
    use crate::snapshot::{Change, Update};
    use crate::testing::{Cluster, ip, namespace, pod, rules, set_pod};

    /// Decides about the first of the pods in a cluster of all of them.
    fn decide(pods: &[Pod]) -> Enrolment {
        let cluster = Cluster::with(pods.iter().cloned().map(set_pod));
        enrolment(&cluster.snapshot, &rules(), &pods[0])
    }

    fn why_not(change: impl Fn(&mut Pod)) -> Exclusion {
        let mut pod = pod("a", "10.0.0.1");
        change(&mut pod);
        match decide(&[pod]) {
            Enrolment::Excluded(exclusion) => exclusion,
            other => panic!("{other:?}"),
        }
    }

    fn at(seconds: i64) -> Option<Timestamp> {
        Some(Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds))
    }

    #[test]
    fn a_pod_of_a_labelled_namespace_is_in() {
        assert_eq!(decide(&[pod("a", "10.0.0.1")]), Enrolment::Enrolled);
    }

    #[test]
    fn a_pod_of_another_namespace_is_in_only_if_labelled_itself() {
        let mut pod = pod("a", "10.0.0.1");
        pod.key = PodKey::new("plain", "a");
        assert_eq!(decide(&[pod.clone()]), Enrolment::NotAsked);
        pod.mode = Some("out".into());
        assert_eq!(decide(&[pod.clone()]), Enrolment::NotAsked);
        pod.mode = Some("in".into());
        assert_eq!(decide(&[pod]), Enrolment::Enrolled);
    }

    #[test]
    fn every_exclusion_has_its_reason() {
        let reasons = [
            why_not(|pod| pod.mode = Some("out".into())),
            why_not(|pod| pod.host_network = true),
            why_not(|pod| pod.terminal = true),
            why_not(|pod| pod.sidecar = Some("istio-proxy")),
            why_not(|pod| pod.ips.clear()),
        ]
        .map(|exclusion| exclusion.reason());
        assert_eq!(
            reasons,
            [
                "OptedOut",
                "HostNetwork",
                "Completed",
                "Sidecar",
                "NoAddress"
            ]
        );
    }

    #[test]
    fn the_programs_of_the_mesh_stay_out_of_it() {
        let mut pod = pod("a", "10.0.0.1");
        pod.key = PodKey::new("ambit-system", "a");
        let mut cluster = Cluster::with([set_pod(pod.clone())]);
        let labelled = namespace("ambit-system", Some("in"));
        cluster.apply(Update::Namespace(Change::Set(labelled)));
        assert_eq!(
            enrolment(&cluster.snapshot, &rules(), &pod),
            Enrolment::Excluded(Exclusion::SystemNamespace)
        );
    }

    #[test]
    fn a_terminating_pod_stays_in() {
        let mut pod = pod("a", "10.0.0.1");
        pod.terminating = true;
        pod.ready = false;
        assert_eq!(decide(&[pod]), Enrolment::Enrolled);
    }

    #[test]
    fn of_two_pods_with_one_address_the_newer_has_it() {
        let (mut old, mut new) = (pod("z", "10.0.0.1"), pod("a", "10.0.0.1"));
        (old.created, new.created) = (at(1), at(2));
        assert_eq!(decide(&[new.clone(), old.clone()]), Enrolment::Enrolled);
        let conflict = Exclusion::AddressConflict {
            address: ip("10.0.0.1"),
            holder: new.key.clone(),
        };
        assert!(conflict.message(&rules()).contains("shop/a"));
        assert_eq!(decide(&[old, new]), Enrolment::Excluded(conflict));
    }

    #[test]
    fn a_pod_that_has_ended_does_not_keep_its_address_from_an_older_one() {
        let (mut old, mut ended) = (pod("old", "10.0.0.1"), pod("ended", "10.0.0.1"));
        (old.created, ended.created) = (at(1), at(2));
        ended.terminal = true;
        assert_eq!(decide(&[old, ended]), Enrolment::Enrolled);
    }

    #[test]
    fn pods_on_the_hosts_network_claim_no_address() {
        let (one, mut host) = (pod("a", "10.0.0.1"), pod("h", "10.0.0.1"));
        host.host_network = true;
        host.created = at(9);
        assert_eq!(decide(&[one, host]), Enrolment::Enrolled);
    }
}
