//! A node that starts takes no pods before its AmbientNode is Ready.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::cluster::{Cluster, SYSTEM, items};
use mesh_tests::guard::{Namespace, Undo};
use mesh_tests::manifest::PODTOOL;
use mesh_tests::stage::NODE_2;
use mesh_tests::wait::eventually;
use serde_json::json;

const TAINT: &str = "ambit.mesh/not-ready";
const FOREIGN: &str = "example.com/foreign=here:PreferNoSchedule";
const SOON: Duration = Duration::from_secs(40);

/// Every taint of node 2, as `key=value:effect`.
fn taints(cluster: &Cluster) -> Result<Vec<String>> {
    let path = "jsonpath={range .spec.taints[*]}{.key}={.value}:{.effect}{\"\\n\"}{end}";
    let taints = cluster.kubectl(&["get", "node", NODE_2, "-o", path])?;
    Ok(taints.lines().map(str::to_owned).collect())
}

fn is_held(cluster: &Cluster) -> Result<bool> {
    Ok(taints(cluster)?.contains(&format!("{TAINT}=:NoSchedule")))
}

/// Takes agent and proxy off node 2, or lets them come back: they run on Linux nodes only.
fn label_system(cluster: &Cluster, system: &str) -> Result<()> {
    let label = format!("kubernetes.io/os={system}");
    let call = ["label", "--overwrite", "node", NODE_2, &label];
    cluster.kubectl(&call).map(drop)
}

/// The agent cannot use this, so that the node does not get ready.
fn set_mark(cluster: &Cluster, mark: &str) -> Result<()> {
    cluster.patch_spec(NODE_2, &json!({"marks": {"skip": mark}}))
}

/// A Deployment whose one pod can run on node 2 only.
fn deployment(namespace: &str) -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata: {{name: late, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: late}}}}
  template:
    metadata: {{labels: {{app: late}}}}
    spec:
      nodeSelector: {{kubernetes.io/hostname: {NODE_2}}}
      terminationGracePeriodSeconds: 0
      containers:
      - {{name: podtool, image: '{PODTOOL}', imagePullPolicy: Never, args: [serve]}}
"
    )
}

/// Why the scheduler has not bound the pod.
fn unscheduled(cluster: &Cluster, namespace: &str) -> Result<String> {
    let pods = cluster.get(&["-n", namespace, "pods"])?;
    let pod = items(&pods).next().context("no pod yet")?;
    ensure!(pod["spec"]["nodeName"].is_null(), "{}", pod["spec"]);
    let conditions = pod["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .find(|condition| condition["reason"] == "Unschedulable")
        .and_then(|condition| condition["message"].as_str())
        .map(str::to_owned)
        .context("the scheduler has not looked at it yet")
}

/// Agent and proxy are gone from node 2, and its AmbientNode says that it was ready in another boot: as
/// if it had been started anew.
fn start_anew(cluster: &Cluster) -> Result<()> {
    eventually(SOON, "no agent and no proxy", || {
        // Kubelet puts its label back whenever it tells of its node.
        label_system(cluster, "none")?;
        let field = format!("--field-selector=spec.nodeName={NODE_2}");
        let pods = cluster.get(&["-n", SYSTEM, "pods", &field])?;
        for pod in items(&pods) {
            let owner = &pod["metadata"]["ownerReferences"][0]["kind"];
            ensure!(owner != "DaemonSet", "{} runs", pod["metadata"]["name"]);
        }
        Ok(())
    })?;
    let patch = r#"{"status":{"readyBootID":"an-earlier-boot"}}"#;
    let call = [
        "patch",
        "ambientnode",
        NODE_2,
        "--subresource=status",
        "--type=merge",
        "-p",
        patch,
    ];
    cluster.kubectl(&call)?;
    label_system(cluster, "linux")
}

#[test]
fn a_node_that_starts_takes_no_pods_before_its_ambientnode_is_ready() -> Result<()> {
    let cluster = Cluster::current()?;
    cluster.wait_mesh_ready(SOON)?;
    ensure!(!is_held(&cluster)?, "{:?}", taints(&cluster)?);
    let namespace = Namespace::create(&cluster, "late", Some("ambient"))?;
    let name = namespace.name.as_str();
    cluster.kubectl(&["taint", "node", NODE_2, FOREIGN])?;
    let back = Undo::new({
        let cluster = cluster.clone();
        move || {
            set_mark(&cluster, "0x200/0x200")?;
            label_system(&cluster, "linux")?;
            cluster.kubectl(&["taint", "node", NODE_2, &format!("{FOREIGN}-")])?;
            cluster.wait_recovered()
        }
    });

    set_mark(&cluster, "0x300/0x200")?;
    start_anew(&cluster)?;
    eventually(SOON, "the taint", || {
        ensure!(is_held(&cluster)?, "{:?}", taints(&cluster)?);
        Ok(())
    })?;
    cluster.apply(&deployment(name))?;
    eventually(SOON, "the pod is held back", || {
        let why = unscheduled(&cluster, name)?;
        ensure!(why.contains(TAINT), "{why}");
        Ok(())
    })?;
    cluster.wait_condition(NODE_2, ("Ready", "False", "InvalidSpec"), SOON)?;
    ensure!(is_held(&cluster)?, "{:?}", taints(&cluster)?);
    unscheduled(&cluster, name)?;

    set_mark(&cluster, "0x200/0x200")?;
    cluster.wait_mesh_ready(SOON)?;
    cluster.wait_ready(name)?;
    cluster.wait_in_mesh(name, SOON)?;
    assert_eq!(taints(&cluster)?, [FOREIGN]);

    // Not at its start: it stays free.
    set_mark(&cluster, "0x300/0x200")?;
    cluster.wait_condition(NODE_2, ("Ready", "False", "InvalidSpec"), SOON)?;
    let another = cluster.kubectl(&["-n", name, "rollout", "restart", "deployment/late"]);
    another?;
    cluster.kubectl(&[
        "-n",
        name,
        "rollout",
        "status",
        "deployment/late",
        "--timeout=40s",
    ])?;
    assert_eq!(taints(&cluster)?, [FOREIGN]);
    back.now()
}

#[test]
fn the_taint_of_an_autoscaler_or_of_kubelet_is_lifted_once_the_node_is_ready() -> Result<()> {
    let cluster = Cluster::current()?;
    cluster.wait_mesh_ready(SOON)?;
    let undo = Undo::new({
        let cluster = cluster.clone();
        move || {
            if is_held(&cluster)? {
                cluster.kubectl(&["taint", "node", NODE_2, &format!("{TAINT}-")])?;
            }
            Ok(())
        }
    });
    cluster.kubectl(&["taint", "node", NODE_2, &format!("{TAINT}:NoSchedule")])?;
    eventually(SOON, "no taint", || {
        if is_held(&cluster)? {
            bail!("{:?}", taints(&cluster)?);
        }
        Ok(())
    })?;
    undo.now()
}
