//! Pods change: they leave the mesh, go, come, and join it, one after the other at an even rate.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::ambient_nodes::AmbientNodes;
use crate::fill::{self, Filled, Made};
use crate::fleet::Fleet;

/// Which change it was.
pub(crate) type Number = u32;

/// A change, and when the API server had it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) number: Number,
    pub(crate) answered: Instant,
    /// How long the API server took.
    pub(crate) took: Duration,
}

/// What changes of a pod.
#[derive(Clone, Debug)]
enum Kind {
    /// It is labelled: out of the mesh, or into it.
    Label(Made),
    /// It is deleted.
    Delete(Made),
    /// It comes.
    Create,
}

/// Changes pods at a rate a second for a time.
pub(crate) async fn run(
    client: &Client,
    cluster: &Filled,
    nodes: &AmbientNodes,
    fleet: &Fleet,
    (rate, length): (u64, Duration),
) -> Result<Vec<Change>> {
    let count = usize::try_from(rate * length.as_secs())?;
    let mut tick = tokio::time::interval(Duration::from_secs(1) / u32::try_from(rate)?);
    let mut running = JoinSet::new();
    for (index, kind) in kinds(cluster).take(count).enumerate() {
        tick.tick().await;
        let number = Number::try_from(index)?;
        let one = One {
            client: client.clone(),
            size: cluster.size,
            nodes: nodes.clone(),
            fleet: fleet.clone(),
            number,
        };
        // Behind those that were made at first.
        let new = cluster.pods.len() + index;
        running.spawn(one.take(kind, new));
    }
    let mut changes = Vec::new();
    while let Some(change) = running.join_next().await {
        changes.push(change??);
    }
    Ok(changes)
}

/// No pod changes twice.
fn kinds(cluster: &Filled) -> impl Iterator<Item = Kind> {
    let (inside, outside): (Vec<_>, Vec<_>) =
        cluster.pods.iter().cloned().partition(|pod| pod.in_mesh);
    let (mut inside, mut outside) = (inside.into_iter(), outside.into_iter());
    (0..).map_while(move |index| {
        Some(match index % 4 {
            0 => Kind::Label(inside.next()?),
            1 => Kind::Delete(inside.next()?),
            2 => Kind::Create,
            _ => Kind::Label(outside.next()?),
        })
    })
}

/// One change, and who waits for it.
struct One {
    client: Client,
    size: fill::Size,
    nodes: AmbientNodes,
    fleet: Fleet,
    number: Number,
}

impl One {
    async fn take(self, kind: Kind, new: usize) -> Result<Change> {
        match kind {
            Kind::Label(pod) => {
                self.expect(&pod, !pod.in_mesh);
                let label = if pod.in_mesh {
                    json!("none")
                } else {
                    Value::Null
                };
                let patch = json!({"metadata": {"labels": {"istio.io/dataplane-mode": label}}});
                let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
                let pods = self.pods(&pod);
                self.timed(async { pods.patch(&pod.name, &params, &patch).await.map(drop) })
                    .await
                    .with_context(|| format!("label {}", pod.name))
            }
            Kind::Delete(pod) => {
                self.expect(&pod, false);
                let params = DeleteParams::default().grace_period(0);
                let pods = self.pods(&pod);
                self.timed(async { pods.delete(&pod.name, &params).await.map(drop) })
                    .await
                    .with_context(|| format!("delete {}", pod.name))
            }
            Kind::Create => {
                let pod = fill::create_pod(&self.client, &self.size, new).await?;
                self.expect(&pod, pod.in_mesh);
                self.timed(fill::start_pod(&self.client, pod.key(), new))
                    .await
            }
        }
    }

    fn pods(&self, pod: &Made) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &pod.namespace)
    }

    /// A pod that comes and stays out does not show in its AmbientNode's workloads.
    fn expect(&self, pod: &Made, present: bool) {
        self.fleet.expect(self.number, &pod.uid);
        if present || pod.in_mesh {
            self.nodes.expect(self.number, &pod.node, &pod.uid, present);
        }
    }

    async fn timed<E>(&self, work: impl Future<Output = Result<(), E>>) -> Result<Change, E> {
        let start = Instant::now();
        work.await?;
        let answered = Instant::now();
        Ok(Change {
            number: self.number,
            answered,
            took: answered - start,
        })
    }
}
