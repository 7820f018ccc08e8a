//! Step 3: what one node should hold. Pure.

pub(crate) mod enrolment;

use std::collections::BTreeSet;

use self::enrolment::{Enrolment, Exclusion, Rules, enrolment};
use crate::names::{NamespaceName, NodeName};
use crate::snapshot::ClusterSnapshot;
use crate::snapshot::objects::Pod;

/// How many pods a node names that are labelled and stay out.
const MAX_EXCLUDED: usize = 50;

/// How many namespaces a node's new pods are held in, and how many pods it names that are not: as many as
/// an AmbientNode takes.
const MAX_NAMESPACES: usize = 10_000;
const MAX_OUTSIDE: usize = 1000;

/// What the controller writes into one AmbientNode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeState {
    /// By namespace and name.
    pub(crate) workloads: Vec<crds::Workload>,
    /// By namespace and name.
    pub(crate) excluded: Vec<crds::WorkloadNote>,
    /// Namespaces whose new pods wait for their enrolment, by name.
    pub(crate) mesh_namespaces: Vec<String>,
    /// UIDs of pods of these namespaces that need not wait, in order.
    pub(crate) outside: Vec<String>,
}

/// Equal snapshots give equal states, in the same order.
pub(crate) fn node_state(snapshot: &ClusterSnapshot, rules: &Rules, node: &NodeName) -> NodeState {
    let mut enrolled: Vec<&Pod> = Vec::new();
    let mut excluded: Vec<(Exclusion, &Pod)> = Vec::new();
    let mut outside: Vec<String> = Vec::new();
    let waiting = waiting(snapshot, rules);
    for pod in snapshot.pods_on(node) {
        let enrolment = enrolment(snapshot, rules, pod);
        if waiting.contains(&pod.key.namespace) && need_not_wait(pod, &enrolment) {
            outside.push(pod.uid.to_string());
        }
        match enrolment {
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
    outside.sort_unstable();
    outside.truncate(MAX_OUTSIDE);
    NodeState {
        workloads: enrolled.into_iter().map(workload).collect(),
        excluded: excluded
            .into_iter()
            .map(|(exclusion, pod)| note(&exclusion, rules, pod))
            .collect(),
        mesh_namespaces: waiting
            .into_iter()
            .take(MAX_NAMESPACES)
            .map(ToString::to_string)
            .collect(),
        outside,
    }
}

/// Namespaces of which a new pod may have to wait for its enrolment: those that are labelled, and those
/// with a pod that is labelled itself, for nobody can tell of the next one before it runs.
fn waiting<'a>(snapshot: &'a ClusterSnapshot, rules: &Rules) -> BTreeSet<&'a NamespaceName> {
    let mut names = snapshot.namespaces_of_mode(&rules.enrol);
    names.retain(|name| {
        **name != rules.system_namespace && !crds::UNHELD_NAMESPACES.contains(&name.as_str())
    });
    names
}

/// Whether a pod of such a namespace stays out of the mesh. One without an address may come in yet, and
/// one that has ended or is on the host's network sends nothing that could be held.
fn need_not_wait(pod: &Pod, enrolment: &Enrolment) -> bool {
    match enrolment {
        Enrolment::NotAsked => !pod.terminal && !pod.host_network,
        Enrolment::Excluded(exclusion) => !matches!(
            exclusion,
            Exclusion::NoAddress | Exclusion::Completed | Exclusion::HostNetwork
        ),
        Enrolment::Enrolled => false,
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
    use crate::names::PodKey;
    use crate::snapshot::{Change, Touched, Update};
    use crate::testing::{Cluster, n, namespace, pod, rules, set_pod};

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

    fn without_its_label(cluster: &mut Cluster) -> Touched {
        cluster.apply(Update::Namespace(Change::Set(namespace("shop", None))))
    }

    #[test]
    fn new_pods_wait_in_labelled_namespaces_and_in_those_of_labelled_pods() {
        let mut cluster = Cluster::with([]);
        for name in ["kube-system", "ambit-system"] {
            cluster.apply(Update::Namespace(Change::Set(namespace(name, Some("in")))));
        }
        let state = |cluster: &Cluster| node_state(&cluster.snapshot, &rules(), &n("n2"));
        assert_eq!(state(&cluster).mesh_namespaces, ["shop"]);
        let both = BTreeSet::from([n("n1"), n("n2")]);
        assert_eq!(without_its_label(&mut cluster).nodes, both);
        assert!(state(&cluster).mesh_namespaces.is_empty());

        let mut alone = pod("alone", "10.0.0.1");
        alone.mode = Some("in".into());
        assert_eq!(cluster.apply(set_pod(alone.clone())).nodes, both);
        assert_eq!(state(&cluster).mesh_namespaces, ["shop"]);
        let mut another = alone.clone();
        (another.uid, another.key) = ("uid-b".into(), PodKey::new("shop", "b"));
        assert_eq!(cluster.apply(set_pod(another)).nodes, [n("n1")].into());
        let gone = Update::Pod(Change::Remove("uid-alone".into()));
        assert_eq!(cluster.apply(gone).nodes, [n("n1")].into());
        let gone = Update::Pod(Change::Remove("uid-b".into()));
        assert_eq!(cluster.apply(gone).nodes, both);
        assert!(state(&cluster).mesh_namespaces.is_empty());
    }

    #[test]
    fn only_pods_that_stay_out_of_the_mesh_need_not_wait() {
        let mut pods: Vec<Pod> = ["in", "none", "sidecar", "host", "new", "done"]
            .into_iter()
            .zip(1..)
            .map(|(name, last)| pod(name, &format!("10.0.0.{last}")))
            .collect();
        pods[1].mode = Some("out".into());
        pods[1].ips.clear();
        pods[2].sidecar = Some("istio-proxy");
        pods[3].host_network = true;
        pods[4].ips.clear();
        pods[5].terminal = true;
        let mut cluster = Cluster::with(pods.into_iter().map(set_pod));
        let mut elsewhere = pod("plain", "10.0.0.9");
        elsewhere.key = PodKey::new("plain", "plain");
        cluster.apply(set_pod(elsewhere));
        let outside = |cluster: &Cluster| node_state(&cluster.snapshot, &rules(), &n("n1")).outside;
        assert_eq!(outside(&cluster), ["uid-none", "uid-sidecar"]);

        without_its_label(&mut cluster);
        assert!(outside(&cluster).is_empty());
        let mut alone = pod("alone", "10.0.0.8");
        alone.mode = Some("in".into());
        cluster.apply(set_pod(alone));
        assert_eq!(
            outside(&cluster),
            ["uid-in", "uid-new", "uid-none", "uid-sidecar"]
        );
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
