//! Step 5, beside `apply`: writes a Node's taints. No decisions.

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::names::NodeName;
use crate::snapshot::ClusterSnapshot;
use crate::startup::{Startup, TaintChange};

/// How often a write that somebody else was faster than is tried anew at once.
const TRIES: usize = 5;

/// Keeps the startup taint of every Node as the snapshot says.
pub(crate) struct Tainter {
    api: Api<Node>,
    startup: Startup,
}

impl Tainter {
    pub(crate) fn new(client: Client, startup: Startup) -> Self {
        Self {
            api: Api::all(client),
            startup,
        }
    }

    /// What is to be done with a Node.
    pub(crate) fn change(
        &self,
        snapshot: &ClusterSnapshot,
        node: &NodeName,
    ) -> Option<TaintChange> {
        self.startup.change(snapshot, node)
    }

    /// Does it; a Node that is gone needs nothing.
    pub(crate) async fn write(
        &self,
        node: &NodeName,
        change: TaintChange,
    ) -> Result<(), kube::Error> {
        let mut tries = 1..=TRIES;
        loop {
            match self.try_write(node, change).await {
                Err(kube::Error::Api(status)) if status.is_conflict() && tries.next().is_some() => {
                }
                Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
                result => return result,
            }
        }
    }

    /// The list of taints is written as a whole, so the Node must be the one that was read.
    async fn try_write(&self, name: &NodeName, change: TaintChange) -> Result<(), kube::Error> {
        let node = self.api.get(name.as_str()).await?;
        let now = node.spec.unwrap_or_default().taints.unwrap_or_default();
        let Some(taints) = self.startup.taints(change, &now) else {
            return Ok(());
        };
        let version = node.metadata.resource_version.unwrap_or_default();
        let patch = Patch::Merge(patch(&version, &taints));
        let params = PatchParams {
            field_manager: Some(crds::CONTROLLER_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        self.api.patch(name.as_str(), &params, &patch).await?;
        match change {
            TaintChange::Put => tracing::info!(node = %name, "the node starts: tainted"),
            TaintChange::Lift => tracing::info!(node = %name, "the taint is lifted"),
        }
        Ok(())
    }
}

fn patch(version: &str, taints: &[Taint]) -> Value {
    // Without any, the field was not there.
    let taints = Some(taints).filter(|taints| !taints.is_empty());
    json!({
        "metadata": {"resourceVersion": version},
        "spec": {"taints": taints},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_taints_has_no_list_of_them() {
        let patch = patch("7", &[]);
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
        let spec = patch["spec"].as_object().unwrap();
        assert_eq!(spec.get("taints"), Some(&Value::Null));
    }
}
