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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cluster, n, pod, rules, set_pod};

    #[test]
    fn a_node_has_its_own_pods_by_name() {
        let mut elsewhere = pod("c", "10.0.0.3");
        elsewhere.node = Some(n("n2"));
        let pods = [pod("b", "10.0.0.2"), pod("a", "10.0.0.1"), elsewhere];
        let cluster = Cluster::with(pods.map(set_pod));
        let state = node_state(&cluster.snapshot, &rules(), &n("n1"));
        let names: Vec<&str> = state
            .workloads
            .iter()
            .map(|one| one.name.as_str())
            .collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(state.workloads[0].ips, ["10.0.0.1"]);
        assert_eq!(state.workloads[0].service_account, "web");
        assert!(state.excluded.is_empty());
    }

    #[test]
    fn a_pod_of_both_families_is_written_with_both_addresses() {
        let mut both = pod("a", "10.0.0.1");
        both.ips.push(crate::testing::ip("fd00::1"));
        let cluster = Cluster::with([set_pod(both), set_pod(pod("b", "fd00::2"))]);
        let state = node_state(&cluster.snapshot, &rules(), &n("n1"));
        let ips: Vec<_> = state.workloads.iter().map(|one| &*one.ips).collect();
        assert_eq!(ips, [&["10.0.0.1", "fd00::1"][..], &["fd00::2"][..]]);
    }

    #[test]
    fn ended_pods_are_the_first_to_be_left_out_of_a_long_list() {
        let ended = (0..MAX_EXCLUDED).map(|i| {
            let mut pod = pod(&format!("job-{i:03}"), "");
            pod.terminal = true;
            pod
        });
        let mut host = pod("zz", "10.0.0.9");
        host.host_network = true;
        let cluster = Cluster::with(ended.chain([host]).map(set_pod));
        let state = node_state(&cluster.snapshot, &rules(), &n("n1"));
        assert_eq!(state.excluded.len(), MAX_EXCLUDED);
        let last = state.excluded.last().unwrap();
        assert_eq!(
            (last.name.as_str(), last.reason.as_str()),
            ("zz", "HostNetwork")
        );
    }
}
