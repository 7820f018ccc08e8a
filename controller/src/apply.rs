//! Step 5: writes AmbientNodes, and has taints written, while this replica leads. No decisions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crds::{AmbientNode, CONTROLLER_MANAGER, TunnelType};
use futures::future::join_all;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::desired::NodeState;
use crate::desired::enrolment::Rules;
use crate::desired::node_state;
use crate::dirty_nodes::DirtyNodes;
use crate::metrics::Metrics;
use crate::model::{Model, Published};
use crate::names::NodeName;
use crate::plan::{NodeChange, plan};
use crate::problems::{Problems, explain};
use crate::taint::Tainter;

const PART: &str = "write ambientnodes and taints";

/// Writes in flight at once: few, for an API server that is slow is made slower by more, and what waits is written once
/// however often it changes meanwhile.
const CONCURRENCY: usize = 16;

/// The longest that the API server may take for an answer: a connection that dies without a word would hold up the
/// other nodes' writes for a quarter of an hour.
const ANSWERED_WITHIN: Duration = Duration::from_secs(15);

const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Keeps every AmbientNode as the model says.
pub(crate) struct Applier {
    api: Api<DynamicObject>,
    tainter: Option<Tainter>,
    rules: Rules,
    tunnel_type: TunnelType,
    published: Published,
    leading: watch::Receiver<bool>,
    dirty: Arc<DirtyNodes>,
    /// How often in a row a node's write has failed.
    failures: Mutex<BTreeMap<NodeName, u32>>,
    problems: Problems,
    metrics: Metrics,
}

impl Applier {
    pub(crate) fn new(
        client: Client,
        tainter: Option<Tainter>,
        (rules, tunnel_type): (Rules, TunnelType),
        (published, leading, dirty): (Published, watch::Receiver<bool>, Arc<DirtyNodes>),
        problems: Problems,
        metrics: Metrics,
    ) -> Self {
        Self {
            api: Api::all_with(client, &ApiResource::erase::<AmbientNode>(&())),
            tainter,
            rules,
            tunnel_type,
            published,
            leading,
            dirty,
            failures: Mutex::default(),
            problems,
            metrics,
        }
    }

    /// Runs until the process ends.
    pub(crate) async fn run(mut self) {
        while let Ok(true) = self
            .leading
            .wait_for(|leading| *leading)
            .await
            .map(|now| *now)
        {
            self.mark_all_dirty();
            self.write_while_leading().await;
            self.problems.clear(PART);
        }
    }

    /// Another replica may have left anything undone.
    fn mark_all_dirty(&self) {
        if let Some(model) = self.model() {
            let nodes = model.snapshot.nodes();
            self.dirty.insert(nodes.map(|node| node.name.clone()));
        }
    }

    async fn write_while_leading(&self) {
        let mut leading = self.leading.clone();
        tokio::select! {
            _ = join_all((0..CONCURRENCY).map(|_| self.write_one_by_one())) => {}
            _ = leading.wait_for(|leading| !leading) => {}
        }
    }

    async fn write_one_by_one(&self) {
        loop {
            let taken = self.dirty.take().await;
            self.converge(&taken.node).await;
        }
    }

    async fn converge(&self, node: &NodeName) {
        let Some(model) = self.model() else {
            return;
        };
        let state = node_state(&model.snapshot, &self.rules, node);
        let change = plan(
            model.snapshot.node(node).map(AsRef::as_ref),
            state,
            model.snapshot.written(node).map(AsRef::as_ref),
        );
        let tainter = self.tainter.as_ref();
        let taint = tainter.and_then(|it| Some((it, it.change(&model.snapshot, node)?)));
        let tainted = match taint.filter(|_| self.leads()) {
            Some((tainter, change)) => in_time(tainter.write(node, change)).await,
            None => Ok(()),
        };
        let written = match change.filter(|_| self.leads()) {
            Some(change) => in_time(self.write(&change)).await,
            None => Ok(()),
        };
        match written.and(tainted) {
            Ok(()) => self.succeeded(node),
            Err(error) => self.failed(node.clone(), &error),
        }
    }

    fn leads(&self) -> bool {
        *self.leading.borrow()
    }

    async fn write(&self, change: &NodeChange) -> Result<(), kube::Error> {
        match change {
            NodeChange::Create { node, owner, state } => {
                let object = parse(created(node, owner, self.tunnel_type))?;
                let params = PostParams {
                    field_manager: Some(CONTROLLER_MANAGER.to_owned()),
                    ..PostParams::default()
                };
                match self.api.create(&params, &object).await {
                    // The watch has not shown it yet.
                    Err(kube::Error::Api(status)) if status.is_already_exists() => {}
                    result => {
                        result?;
                        tracing::info!(%node, "made an AmbientNode");
                    }
                }
                self.apply(node, applied(node, owner, state)).await
            }
            NodeChange::Apply { node, owner, state } => {
                self.apply(node, applied(node, owner, state)).await
            }
        }
    }

    async fn apply(&self, node: &NodeName, object: Value) -> Result<(), kube::Error> {
        let params = PatchParams::apply(CONTROLLER_MANAGER).force();
        self.api
            .patch(node.as_str(), &params, &Patch::Apply(object))
            .await?;
        self.metrics.node_writes.inc();
        tracing::debug!(%node, "wrote an AmbientNode");
        Ok(())
    }

    fn succeeded(&self, node: &NodeName) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.remove(node).is_some() && failures.is_empty() {
            self.problems.clear(PART);
        }
    }

    fn failed(&self, node: NodeName, error: &kube::Error) {
        self.metrics.node_write_errors.inc();
        self.problems
            .report(PART, format!("{node}: {}", explain(error)));
        let attempt = {
            let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
            let count = failures.entry(node.clone()).or_default();
            *count = count.saturating_add(1);
            *count
        };
        let dirty = self.dirty.clone();
        tokio::spawn(async move {
            tokio::time::sleep(retry_after(attempt)).await;
            dirty.insert([node]);
        });
    }

    fn model(&self) -> Option<Arc<Model>> {
        self.published.borrow().clone()
    }
}

async fn in_time(work: impl Future<Output = Result<(), kube::Error>>) -> Result<(), kube::Error> {
    tokio::time::timeout(ANSWERED_WITHIN, work)
        .await
        .unwrap_or_else(|late| Err(kube::Error::Service(late.into())))
}

/// Doubles with every failure.
fn retry_after(attempt: u32) -> Duration {
    FIRST_RETRY
        .saturating_mul(1 << attempt.saturating_sub(1).min(10))
        .min(LAST_RETRY)
}

/// A new AmbientNode. The rest of its spec comes from the schema's defaults, and is the user's.
fn created(node: &NodeName, owner: &str, tunnel_type: TunnelType) -> Value {
    let spec = match tunnel_type {
        TunnelType::Geneve => json!({}),
        TunnelType::Veth => json!({"tunnel": {"type": "Veth"}}),
    };
    json!({
        "apiVersion": api_version(),
        "kind": "AmbientNode",
        "metadata": metadata(node, owner),
        "spec": spec,
    })
}

/// All that the controller owns of it.
fn applied(node: &NodeName, owner: &str, state: &NodeState) -> Value {
    json!({
        "apiVersion": api_version(),
        "kind": "AmbientNode",
        "metadata": metadata(node, owner),
        "spec": {
            "workloads": state.workloads,
            "excluded": state.excluded,
            "meshNamespaces": state.mesh_namespaces,
            "outside": state.outside,
        },
    })
}

fn api_version() -> String {
    format!("{}/{}", crds::GROUP, crds::VERSION)
}

fn metadata(node: &NodeName, owner: &str) -> Value {
    json!({
        "name": node.as_str(),
        "ownerReferences": [{
            "apiVersion": "v1",
            "kind": "Node",
            "name": node.as_str(),
            "uid": owner,
        }],
    })
}

fn parse(object: Value) -> Result<DynamicObject, kube::Error> {
    serde_json::from_value(object).map_err(kube::Error::SerdeError)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_wait_longer_and_longer_but_never_forever() {
        assert_eq!(retry_after(1), FIRST_RETRY);
        assert!(retry_after(3) > retry_after(2));
        assert_eq!(retry_after(u32::MAX), LAST_RETRY);
    }

    #[test]
    fn a_write_holds_the_workloads_and_nothing_of_the_users_part() {
        let object = applied(&"n".into(), "uid", &NodeState::default());
        let spec = object["spec"].as_object().unwrap();
        let fields: Vec<&str> = spec.keys().map(String::as_str).collect();
        assert_eq!(
            fields,
            ["workloads", "excluded", "meshNamespaces", "outside"]
        );
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "uid");
    }

    #[test]
    fn only_a_tunnel_type_that_is_not_the_default_is_written() {
        assert_eq!(
            created(&"n".into(), "u", TunnelType::Geneve)["spec"],
            json!({})
        );
        let veth = created(&"n".into(), "u", TunnelType::Veth);
        assert_eq!(veth["spec"]["tunnel"], json!({"type": "Veth"}));
    }
}
