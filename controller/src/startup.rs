//! Step 4, beside `plan`: whether a Node carries the startup taint. Pure.
//!
//! ```text
//!  the node's boot is not the one it became ready in, and it starts ─▶ put
//!  it is                                                            ─▶ lift
//!  neither can be said                                              ─▶ leave
//! ```

use std::sync::Arc;

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::Taint;

use crate::names::{NamespaceName, NodeName};
use crate::snapshot::ClusterSnapshot;
use crate::snapshot::objects::{Node, WrittenNode};

/// A Node that is so much older than its AmbientNode ran before Ambit was installed. It does not start:
/// what runs on it runs, and to hold the rest back would stop a cluster in which Ambit cannot work.
const JOINS_WITHIN: SignedDuration = SignedDuration::from_mins(10);

/// Keeps pods from being bound to the node. Those that run there stay.
const EFFECT: &str = "NoSchedule";

/// Who puts the taint, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Startup {
    /// Key of the taint.
    pub(crate) taint: Arc<str>,
    /// Where the agents run.
    pub(crate) system_namespace: NamespaceName,
    /// Service account of the agents' pods.
    pub(crate) agent_account: Arc<str>,
}

/// What a Node's taints should become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaintChange {
    Put,
    Lift,
}

impl Startup {
    /// `None` if the Node is to stay as it is.
    pub(crate) fn change(
        &self,
        snapshot: &ClusterSnapshot,
        name: &NodeName,
    ) -> Option<TaintChange> {
        let node = snapshot.node(name)?;
        let change = wanted(node, snapshot.written(name)?)?;
        // Where no agent is to run, nobody could ever say that the node is ready.
        if change == TaintChange::Put && !self.has_agent(snapshot, name) {
            return None;
        }
        let is_put = node.taints.contains(&self.taint);
        (is_put != (change == TaintChange::Put)).then_some(change)
    }

    /// The taints that a Node should have; `None` if it has them.
    pub(crate) fn taints(&self, change: TaintChange, now: &[Taint]) -> Option<Vec<Taint>> {
        let is_ours = |taint: &&Taint| *taint.key == *self.taint;
        match (change, now.iter().any(|taint| is_ours(&taint))) {
            (TaintChange::Put, false) => {
                let ours = Taint {
                    key: self.taint.to_string(),
                    effect: EFFECT.to_owned(),
                    ..Taint::default()
                };
                Some(now.iter().cloned().chain([ours]).collect())
            }
            (TaintChange::Lift, true) => {
                Some(now.iter().filter(|one| !is_ours(one)).cloned().collect())
            }
            (TaintChange::Put, true) | (TaintChange::Lift, false) => None,
        }
    }

    fn has_agent(&self, snapshot: &ClusterSnapshot, node: &NodeName) -> bool {
        snapshot.pods_on(node).any(|pod| {
            pod.key.namespace == self.system_namespace && pod.service_account == self.agent_account
        })
    }
}

fn wanted(node: &Node, written: &WrittenNode) -> Option<TaintChange> {
    // No kubelet has said anything yet, so none starts a pod.
    let boot = node.boot.as_ref().filter(|_| node.linux)?;
    // Its pods may talk in the clear without a proxy: they need not wait for one.
    if written.ready_boot.as_ref() == Some(boot) || written.fails_open {
        return Some(TaintChange::Lift);
    }
    let starts = written.ready_boot.is_some() || joined(node, written);
    starts.then_some(TaintChange::Put)
}

/// Whether the node came to a cluster that had Ambit.
fn joined(node: &Node, written: &WrittenNode) -> bool {
    match (node.created, written.created) {
        (Some(node), Some(written)) => written.duration_since(node) <= JOINS_WITHIN,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::snapshot::objects::Pod;
    use crate::snapshot::{Change, Update};
    use crate::testing::{Cluster, n, node, pod, set_pod};

    const TAINT: &str = "ambit.mesh/not-ready";

    fn startup() -> Startup {
        Startup {
            taint: TAINT.into(),
            system_namespace: "ambit-system".into(),
            agent_account: "agent".into(),
        }
    }

    fn at(minute: i64) -> Option<Timestamp> {
        Some(Timestamp::from_second(60 * minute).unwrap())
    }

    /// A node that joined at minute 100 and runs in boot `new`.
    fn joining() -> Node {
        Node {
            boot: Some("new".into()),
            created: at(100),
            ..node("n1")
        }
    }

    fn written(ready_boot: Option<&str>) -> WrittenNode {
        WrittenNode {
            name: n("n1"),
            created: at(101),
            owner: None,
            deleting: false,
            fails_open: false,
            ready_boot: ready_boot.map(Into::into),
            workloads: Vec::new(),
            excluded: Vec::new(),
            mesh_namespaces: Vec::new(),
            outside: Vec::new(),
        }
    }

    fn agent() -> Pod {
        let mut agent = pod("agent", "10.0.0.9");
        agent.key.namespace = "ambit-system".into();
        agent.service_account = "agent".into();
        agent
    }

    fn change(node: Node, written: WrittenNode, pods: Vec<Pod>) -> Option<TaintChange> {
        let mut cluster = Cluster::with(pods.into_iter().map(set_pod));
        cluster.apply(Update::Node(Change::Set(node)));
        cluster.apply(Update::Written(Change::Set(written)));
        startup().change(&cluster.snapshot, &n("n1"))
    }

    fn tainted(mut node: Node) -> Node {
        node.taints = [Arc::from(TAINT), Arc::from("example.com/foreign")].into();
        node
    }

    #[test]
    fn a_node_that_joins_or_reboots_is_held_until_it_is_ready() {
        for earlier in [None, Some("old")] {
            let change = |node| change(node, written(earlier), vec![agent()]);
            assert_eq!(change(joining()), Some(TaintChange::Put), "{earlier:?}");
            assert_eq!(change(tainted(joining())), None, "{earlier:?}");
        }
        let change = |node| change(node, written(Some("new")), vec![agent()]);
        assert_eq!(change(tainted(joining())), Some(TaintChange::Lift));
        assert_eq!(change(joining()), None);
    }

    #[test]
    fn a_node_that_ran_before_ambit_came_is_held_only_when_it_reboots() {
        let mut old = joining();
        old.created = at(80);
        assert_eq!(change(old.clone(), written(None), vec![agent()]), None);
        assert_eq!(
            change(old, written(Some("old")), vec![agent()]),
            Some(TaintChange::Put)
        );
    }

    #[test]
    fn nothing_is_put_where_no_agent_is_to_run() {
        assert_eq!(change(joining(), written(None), vec![]), None);
        let mut stranger = agent();
        stranger.key.namespace = "shop".into();
        assert_eq!(change(joining(), written(None), vec![stranger]), None);
        // Nor is taken what kubelet put itself, before the agent's pod is there.
        assert_eq!(change(tainted(joining()), written(None), vec![]), None);
    }

    #[test]
    fn a_node_that_may_fail_open_is_not_held() {
        let mut open = written(None);
        open.fails_open = true;
        assert_eq!(change(joining(), open.clone(), vec![agent()]), None);
        assert_eq!(
            change(tainted(joining()), open, vec![agent()]),
            Some(TaintChange::Lift)
        );
    }

    #[test]
    fn a_node_without_a_kubelet_and_one_of_another_system_stay_as_they_are() {
        let mut silent = joining();
        silent.boot = None;
        let mut windows = joining();
        windows.linux = false;
        for node in [silent, windows] {
            assert_eq!(change(tainted(node), written(None), vec![agent()]), None);
        }
    }

    #[test]
    fn foreign_taints_stay_in_their_order() {
        let foreign = |key: &str| Taint {
            key: key.to_owned(),
            effect: "NoExecute".to_owned(),
            ..Taint::default()
        };
        let others = [foreign("a"), foreign("b")];
        let put = startup().taints(TaintChange::Put, &others).unwrap();
        assert_eq!(put[..2], others);
        assert_eq!((&*put[2].key, &*put[2].effect), (TAINT, "NoSchedule"));
        assert_eq!(startup().taints(TaintChange::Put, &put), None);
        let lifted = startup().taints(TaintChange::Lift, &put).unwrap();
        assert_eq!(lifted, others);
        assert_eq!(startup().taints(TaintChange::Lift, &others), None);
    }
}
