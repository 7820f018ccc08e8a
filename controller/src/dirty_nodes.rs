//! Between steps 4 and 5: nodes whose AmbientNode may not be as it should.
//!
//! A node that changes often waits once, behind those that came before it, and nobody works on it twice at a time.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::names::NodeName;

/// The nodes that wait, and those that are worked on.
#[derive(Debug, Default)]
pub(crate) struct DirtyNodes {
    nodes: Mutex<Nodes>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Nodes {
    waiting: VecDeque<NodeName>,
    /// The same, to find them.
    known: BTreeSet<NodeName>,
    taken: BTreeSet<NodeName>,
}

/// A node to work on: nobody else gets it before this is dropped.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    pub(crate) node: NodeName,
    from: &'a DirtyNodes,
}

impl DirtyNodes {
    pub(crate) fn insert(&self, nodes: impl IntoIterator<Item = NodeName>) {
        let mut all = self.lock();
        for node in nodes {
            if all.known.insert(node.clone()) {
                all.waiting.push_back(node);
            }
        }
        drop(all);
        self.changed.notify_one();
    }

    /// Waits until there is one that nobody works on, and takes it.
    pub(crate) async fn take(&self) -> Taken<'_> {
        loop {
            if let Some(node) = self.take_now() {
                return Taken { node, from: self };
            }
            self.changed.notified().await;
        }
    }

    fn take_now(&self) -> Option<NodeName> {
        let mut all = self.lock();
        let mut waiting = all.waiting.iter();
        let index = waiting.position(|node| !all.taken.contains(node))?;
        let node = all.waiting.remove(index)?;
        all.known.remove(&node);
        all.taken.insert(node.clone());
        if !all.waiting.is_empty() {
            // For the next who waits: one notification may stand for many nodes.
            self.changed.notify_one();
        }
        Some(node)
    }

    fn lock(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.from.lock().taken.remove(&self.node);
        // It may wait again.
        self.from.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::sync::mpsc;

    use super::*;
    use crate::testing::n;

    /// All that nobody works on, in their order.
    fn take_all(dirty: &DirtyNodes) -> Vec<NodeName> {
        std::iter::from_fn(|| dirty.take_now()).collect()
    }

    #[tokio::test]
    async fn a_node_that_changes_often_waits_once_and_in_its_turn() {
        let dirty = DirtyNodes::default();
        dirty.insert([n("n2")]);
        dirty.insert([n("n1"), n("n2")]);
        assert_eq!(take_all(&dirty), [n("n2"), n("n1")]);
    }

    #[tokio::test]
    async fn nobody_gets_a_node_that_another_works_on() {
        let dirty = DirtyNodes::default();
        dirty.insert([n("n1"), n("n2")]);
        let first = dirty.take().await;
        dirty.insert([n("n1"), n("n3")]);
        assert_eq!(first.node, n("n1"));
        assert_eq!(take_all(&dirty), [n("n2"), n("n3")]);
        drop(first);
        assert_eq!(take_all(&dirty), [n("n1")]);
    }

    /// One notification may be for many nodes, and many may wait for one.
    #[tokio::test]
    async fn every_node_is_taken_however_many_take_them() {
        let dirty = Arc::new(DirtyNodes::default());
        let (tell, mut told) = mpsc::unbounded_channel();
        for _ in 0..4 {
            let (dirty, tell) = (dirty.clone(), tell.clone());
            tokio::spawn(async move {
                loop {
                    let taken = dirty.take().await;
                    tokio::task::yield_now().await;
                    tell.send(taken.node.clone()).unwrap();
                }
            });
        }
        // All of them wait.
        tokio::task::yield_now().await;
        let all: Vec<_> = (0..50).map(|index| n(&format!("n{index}"))).collect();
        dirty.insert(all.clone());
        let mut taken = BTreeSet::new();
        while taken.len() < all.len() {
            let next = tokio::time::timeout(Duration::from_secs(5), told.recv()).await;
            taken.extend(next.expect("it is not forgotten"));
        }
        assert_eq!(taken, all.into_iter().collect());
    }
}
