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
