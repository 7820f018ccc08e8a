//! How many streams each node has open: one that is not itself any longer cannot take the turns of all others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::names::NodeName;

/// Streams of one node: two proxies during a rollout, and what their former connections left.
const STREAMS: usize = 8;

/// The open streams by node.
#[derive(Clone, Debug, Default)]
pub(super) struct Streams(Arc<Mutex<HashMap<NodeName, usize>>>);

/// A stream that counts until it is dropped.
#[derive(Debug)]
pub(super) struct Open {
    streams: Streams,
    node: NodeName,
}

impl Streams {
    /// One more stream of a node, if it may have one.
    pub(super) fn open(&self, node: &NodeName) -> Option<Open> {
        let mut open = self.lock();
        let count = open.entry(node.clone()).or_default();
        if *count >= STREAMS {
            return None;
        }
        *count += 1;
        Some(Open {
            streams: self.clone(),
            node: node.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeName, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut open = self.streams.lock();
        if let Some(count) = open.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::n;

    #[test]
    fn a_node_has_a_few_streams_and_another_has_its_own() {
        let streams = Streams::default();
        let mut open: Vec<_> = (0..STREAMS).map(|_| streams.open(&n("n1"))).collect();
        assert!(open.iter().all(Option::is_some));
        assert!(streams.open(&n("n1")).is_none());
        assert!(streams.open(&n("n2")).is_some());
        open.pop();
        assert!(streams.open(&n("n1")).is_some());
        open.clear();
        assert!(streams.lock().is_empty());
    }
}
