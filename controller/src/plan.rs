//! Step 4: the difference between what an AmbientNode should hold and what it holds. Pure.

use std::sync::Arc;

use crate::desired::NodeState;
use crate::names::NodeName;
use crate::snapshot::objects::{Node, WrittenNode};

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NodeChange {
    /// There is none: make it, then write its content.
    Create {
        node: NodeName,
        owner: Arc<str>,
        state: NodeState,
    },
    /// Write its content.
    Apply {
        node: NodeName,
        owner: Arc<str>,
        state: NodeState,
    },
}

/// `None` if there is nothing to write. An AmbientNode without a Node is left to the garbage
/// collector, one that is being deleted to whom deleted it: it is made anew once it is gone.
pub(crate) fn plan(
    node: Option<&Node>,
    state: NodeState,
    written: Option<&WrittenNode>,
) -> Option<NodeChange> {
    let node = node.filter(|node| node.linux)?;
    let (name, owner) = (node.name.clone(), node.uid.clone());
    let Some(written) = written else {
        return Some(NodeChange::Create {
            node: name,
            owner,
            state,
        });
    };
    let current = written.workloads == state.workloads
        && written.excluded == state.excluded
        && written.mesh_namespaces == state.mesh_namespaces
        && written.outside == state.outside
        && written.owner.as_ref() == Some(&node.uid);
    if current || written.deleting {
        return None;
    }
    Some(NodeChange::Apply {
        node: name,
        owner,
        state,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::node_state;
    use crate::testing::{Cluster, n, node, pod, rules, set_pod};

    fn state() -> NodeState {
        let cluster = Cluster::with([set_pod(pod("a", "10.0.0.1"))]);
        node_state(&cluster.snapshot, &rules(), &n("n1"))
    }

    fn written(state: &NodeState) -> WrittenNode {
        WrittenNode {
            name: n("n1"),
            created: None,
            owner: Some(node("n1").uid),
            deleting: false,
            fails_open: false,
            ready_boot: None,
            workloads: state.workloads.clone(),
            excluded: state.excluded.clone(),
            mesh_namespaces: state.mesh_namespaces.clone(),
            outside: state.outside.clone(),
        }
    }

    #[test]
    fn a_missing_object_is_made() {
        let change = plan(Some(&node("n1")), state(), None);
        assert!(matches!(change, Some(NodeChange::Create { .. })));
    }

    #[test]
    fn what_is_as_it_should_be_is_not_written() {
        assert_eq!(
            plan(Some(&node("n1")), state(), Some(&written(&state()))),
            None
        );
    }

    #[test]
    fn other_workloads_or_another_owner_are_written_over() {
        let mut other = written(&state());
        other.workloads.clear();
        let mut unguarded = written(&state());
        unguarded.mesh_namespaces.clear();
        let mut orphan = written(&state());
        orphan.owner = Some("uid-of-an-older-node".into());
        for written in [other, unguarded, orphan] {
            let change = plan(Some(&node("n1")), state(), Some(&written));
            assert!(matches!(change, Some(NodeChange::Apply { .. })));
        }
    }

    #[test]
    fn an_object_on_its_way_out_is_left_alone() {
        let mut leaving = written(&NodeState::default());
        leaving.deleting = true;
        assert_eq!(plan(Some(&node("n1")), state(), Some(&leaving)), None);
    }

    #[test]
    fn a_node_that_is_gone_or_not_linux_has_none() {
        assert_eq!(plan(None, NodeState::default(), None), None);
        let mut windows = node("n1");
        windows.linux = false;
        assert_eq!(plan(Some(&windows), NodeState::default(), None), None);
    }
}
