//! When AmbientNodes are as they should be: one watch of them all.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use crds::AmbientNode;
use futures::{StreamExt, TryStreamExt};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt};

use crate::changes::Number;

/// What the watch has shown.
#[derive(Clone, Debug, Default)]
pub(crate) struct AmbientNodes(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// UIDs of each node's workloads.
    workloads: HashMap<String, BTreeSet<String>>,
    awaited: HashMap<String, Vec<Awaited>>,
    arrivals: HashMap<Number, Instant>,
    error: Option<String>,
}

/// A change that has to show on a node.
#[derive(Debug)]
struct Awaited {
    change: Number,
    uid: String,
    /// Whether the workload is to be there afterwards.
    present: bool,
}

impl AmbientNodes {
    pub(crate) fn watch(client: Client) -> Self {
        let nodes = Self::default();
        let seen = nodes.clone();
        tokio::spawn(async move {
            let api = Api::<AmbientNode>::all(client);
            let mut events = watcher::watcher(api, watcher::Config::default()).boxed();
            loop {
                match events.try_next().await {
                    Ok(Some(Event::Apply(node) | Event::InitApply(node))) => seen.note(&node),
                    Ok(Some(_)) => {}
                    Ok(None) => return,
                    Err(error) => seen.lock().error = Some(error.to_string()),
                }
            }
        });
        nodes
    }

    fn note(&self, node: &AmbientNode) {
        let now = Instant::now();
        let workloads = node.spec.workloads.iter();
        let uids: BTreeSet<String> = workloads.map(|workload| workload.uid.clone()).collect();
        let mut guard = self.lock();
        let seen = &mut *guard;
        if let Some(awaited) = seen.awaited.get_mut(&node.name_any()) {
            awaited.retain(|change| {
                let is_so = uids.contains(&change.uid) == change.present;
                if is_so {
                    seen.arrivals.insert(change.change, now);
                }
                !is_so
            });
        }
        seen.workloads.insert(node.name_any(), uids);
    }

    /// From now on it is noted when the workload is there, or gone.
    pub(crate) fn expect(&self, change: Number, node: &str, uid: &str, present: bool) {
        let awaited = Awaited {
            change,
            uid: uid.to_owned(),
            present,
        };
        let mut seen = self.lock();
        seen.awaited
            .entry(node.to_owned())
            .or_default()
            .push(awaited);
    }

    /// When each change was there.
    pub(crate) fn arrivals(&self) -> HashMap<Number, Instant> {
        self.lock().arrivals.clone()
    }

    /// Waits until so many workloads are in all of them.
    pub(crate) async fn wait_for(&self, workloads: usize, patience: Duration) -> Result<()> {
        let lacks = |seen: &Seen| {
            let found: usize = seen.workloads.values().map(BTreeSet::len).sum();
            (found != workloads).then(|| format!("{found} workloads and not {workloads}"))
        };
        self.wait(lacks, patience).await
    }

    /// Waits until everything that is expected is there.
    pub(crate) async fn wait_settled(&self, patience: Duration) -> Result<()> {
        let lacks = |seen: &Seen| {
            let missing: usize = seen.awaited.values().map(Vec::len).sum();
            (missing != 0).then(|| format!("not yet {missing} of the changes"))
        };
        self.wait(lacks, patience).await
    }

    /// Waits until they lack nothing, or else says what they have.
    async fn wait(
        &self,
        lacks: impl Fn(&Seen) -> Option<String>,
        patience: Duration,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let (lack, error) = {
                let seen = self.lock();
                (lacks(&seen), seen.error.clone())
            };
            let Some(lack) = lack else {
                return Ok(());
            };
            if start.elapsed() > patience {
                bail!("AmbientNodes have {lack}; last error of the watch: {error:?}");
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
