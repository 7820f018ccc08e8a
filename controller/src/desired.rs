//! Step 3: what one node should hold. Pure.

pub(crate) mod enrolment;

use self::enrolment::{Enrolment, Exclusion, Rules, enrolment};
use crate::names::NodeName;
use crate::snapshot::ClusterSnapshot;
use crate::snapshot::objects::Pod;

/// How many pods a node names that are labelled and stay out.
const MAX_EXCLUDED: usize = 50;

/// What the controller writes into one AmbientNode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeState {
    /// By namespace and name.
    pub(crate) workloads: Vec<crds::Workload>,
    /// By namespace and name.
    pub(crate) excluded: Vec<crds::WorkloadNote>,
}

/// Equal snapshots give equal states, in the same order.
pub(crate) fn node_state(snapshot: &ClusterSnapshot, rules: &Rules, node: &NodeName) -> NodeState {
    let mut enrolled: Vec<&Pod> = Vec::new();
    let mut excluded: Vec<(Exclusion, &Pod)> = Vec::new();
    for pod in snapshot.pods_on(node) {
        match enrolment(snapshot, rules, pod) {
            Enrolment::NotAsked => {}
            Enrolment::Enrolled => enrolled.push(pod),
            Enrolment::Excluded(exclusion) => excluded.push((exclusion, pod)),
        }
    }
    enrolled.sort_unstable_by_key(|pod| &pod.key);
    // The list is short: those that somebody can do something about come before ended pods.
    excluded.sort_unstable_by(|a, b| (&a.0, &a.1.key).cmp(&(&b.0, &b.1.key)));
    excluded.truncate(MAX_EXCLUDED);
    excluded.sort_unstable_by_key(|(_, pod)| &pod.key);
    NodeState {
        workloads: enrolled.into_iter().map(workload).collect(),
        excluded: excluded
            .into_iter()
            .map(|(exclusion, pod)| note(&exclusion, rules, pod))
            .collect(),
    }
}

fn workload(pod: &Pod) -> crds::Workload {
    crds::Workload {
        uid: pod.uid.to_string(),
        namespace: pod.key.namespace.to_string(),
        name: pod.key.name.to_string(),
        service_account: pod.service_account.to_string(),
        ips: pod.ips.iter().map(ToString::to_string).collect(),
    }
}

fn note(exclusion: &Exclusion, rules: &Rules, pod: &Pod) -> crds::WorkloadNote {
    crds::WorkloadNote {
        uid: pod.uid.to_string(),
        namespace: pod.key.namespace.to_string(),
        name: pod.key.name.to_string(),
        reason: exclusion.reason().to_owned(),
        message: exclusion.message(rules),
    }
}
