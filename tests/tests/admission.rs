//! Who may write what, by the real API server and real tokens.

use anyhow::{Result, ensure};
use mesh_tests::api::Caller;
use mesh_tests::certificate_api::token;
use mesh_tests::cluster::Cluster;
use mesh_tests::stage::{NODE_1, NODE_2};
use serde_json::Value;

const STATUS: &str = r#"{"status":{"hostIP":"192.0.2.1"}}"#;
const SPEC: &str = r#"{"spec":{"failureMode":"Open"}}"#;

fn path(node: &str) -> String {
    format!("/apis/ambit.mesh/v1alpha1/ambientnodes/{node}")
}

/// The agent of `node`, as the API server knows it.
fn agent_of(cluster: &Cluster, node: &str) -> Result<Caller> {
    let pod = cluster.system_pod("ambit-node-agent", node)?;
    Caller::with_token(
        cluster,
        &token(cluster, "ambit-node-agent", None, Some(&pod))?,
    )
}

fn ensure_refused(answer: &Value, words: &str) -> Result<()> {
    let message = answer["message"].as_str().unwrap_or_default();
    ensure!(answer["code"] == 403 && message.contains(words), "{answer}");
    Ok(())
}

#[test]
fn an_agent_writes_the_status_of_its_own_node_only() -> Result<()> {
    let cluster = Cluster::current()?;
    let agent = agent_of(&cluster, NODE_1)?;
    let own = agent.try_patch(&(path(NODE_1) + "/status"), &[], STATUS)?;
    ensure!(own["status"]["hostIP"] == "192.0.2.1", "{own}");
    let other = agent.try_patch(&(path(NODE_2) + "/status"), &[], STATUS)?;
    ensure_refused(
        &other,
        "the agent of node 'node-1' may not write AmbientNode 'node-2'",
    )
}

#[test]
fn an_agents_token_that_names_no_node_writes_nothing() -> Result<()> {
    let cluster = Cluster::current()?;
    let agent = Caller::with_token(&cluster, &token(&cluster, "ambit-node-agent", None, None)?)?;
    let answer = agent.try_patch(&(path(NODE_1) + "/status"), &[], STATUS)?;
    ensure_refused(&answer, "the agent's token names no node")
}

#[test]
fn an_agent_may_not_change_what_its_node_should_do() -> Result<()> {
    let cluster = Cluster::current()?;
    let answer = agent_of(&cluster, NODE_1)?.try_patch(&path(NODE_1), &[], SPEC)?;
    ensure_refused(&answer, "cannot patch resource")?;
    // Neither if somebody widens its role by mistake.
    let widened = [
        "Impersonate-User: system:serviceaccount:ambit-system:ambit-node-agent",
        "Impersonate-Group: system:masters",
        "Impersonate-Extra-authentication.kubernetes.io%2Fnode-name: node-1",
    ];
    let administrator = Caller::administrator(&cluster)?;
    let answer = administrator.try_patch(&path(NODE_1), &widened, SPEC)?;
    ensure_refused(
        &answer,
        "an agent may write only the status of its AmbientNode",
    )
}

#[test]
fn the_controller_may_change_only_the_startup_taint_of_a_node() -> Result<()> {
    let cluster = Cluster::current()?;
    let administrator = Caller::administrator(&cluster)?;
    let controller = ["Impersonate-User: system:serviceaccount:ambit-system:ambit-controller"];
    let node = format!("/api/v1/nodes/{NODE_2}");
    let try_patch = |path: &str, patch: &str| administrator.try_patch(path, &controller, patch);
    let ours = r#"{"key":"ambit.mesh/not-ready","effect":"NoSchedule"}"#;
    let put = try_patch(&node, &format!(r#"{{"spec":{{"taints":[{ours}]}}}}"#))?;
    ensure!(put["spec"]["taints"][0]["effect"] == "NoSchedule", "{put}");
    let foreign = r#"{"key":"example.com/foreign","effect":"NoExecute"}"#;
    for patch in [
        &*format!(r#"{{"spec":{{"taints":[{ours},{foreign}]}}}}"#),
        r#"{"spec":{"unschedulable":true}}"#,
        r#"{"metadata":{"labels":{"a":"b"}}}"#,
        r#"{"metadata":{"annotations":{"a":"b"}}}"#,
    ] {
        let answer = try_patch(&node, patch)?;
        ensure_refused(
            &answer,
            "the controller may change only the startup taint of a Node",
        )?;
    }
    // What is no right of its own is nothing that a policy must forbid.
    let status = r#"{"status":{"phase":"Running"}}"#;
    ensure_refused(
        &try_patch(&(node + "/status"), status)?,
        "cannot patch resource",
    )
}

#[test]
fn a_proxy_may_read_no_kubernetes_object() -> Result<()> {
    let cluster = Cluster::current()?;
    let identity = "system:serviceaccount:ambit-system:ambit-proxy";
    for resource in [
        "pods",
        "secrets",
        "configmaps",
        "nodes",
        "services",
        "ambientnodes",
    ] {
        for verb in ["get", "list", "watch"] {
            let call = [
                "auth",
                "can-i",
                verb,
                resource,
                "--as",
                identity,
                "-n",
                "ambit-system",
            ];
            let answer = cluster.try_kubectl(&call, "")?.failure()?;
            ensure!(answer.starts_with("no"), "{verb} {resource}: {answer}");
        }
    }
    Ok(())
}

#[test]
fn controller_and_agent_have_the_rights_they_need_and_no_more() -> Result<()> {
    let cluster = Cluster::current()?;
    let can = |account: &str, verb: &str, resource: &str, namespace: &str| -> Result<bool> {
        let identity = format!("system:serviceaccount:ambit-system:{account}");
        let call = [
            "auth", "can-i", verb, resource, "--as", &identity, "-n", namespace,
        ];
        Ok(cluster.try_kubectl(&call, "")?.ok)
    };
    for (account, verb, resource, namespace, expected) in [
        (
            "ambit-controller",
            "get",
            "secrets/ambit-ca",
            "ambit-system",
            true,
        ),
        (
            "ambit-controller",
            "get",
            "secrets/another",
            "ambit-system",
            false,
        ),
        ("ambit-controller", "list", "secrets", "default", false),
        ("ambit-controller", "delete", "pods", "default", false),
        (
            "ambit-controller",
            "delete",
            "ambientnodes",
            "default",
            false,
        ),
        ("ambit-controller", "patch", "ambientnodes", "default", true),
        (
            "ambit-controller",
            "patch",
            "ambientnodes/status",
            "default",
            false,
        ),
        ("ambit-node-agent", "get", "pods", "ambit-system", true),
        ("ambit-node-agent", "list", "pods", "default", false),
        ("ambit-node-agent", "get", "secrets", "ambit-system", false),
        (
            "ambit-node-agent",
            "patch",
            "ambientnodes",
            "default",
            false,
        ),
    ] {
        let may = match resource.split_once("/status") {
            Some((kind, _)) => {
                let identity = format!("system:serviceaccount:ambit-system:{account}");
                let call = [
                    "auth",
                    "can-i",
                    verb,
                    kind,
                    "--subresource=status",
                    "--as",
                    &identity,
                ];
                cluster.try_kubectl(&call, "")?.ok
            }
            None => can(account, verb, resource, namespace)?,
        };
        ensure!(
            may == expected,
            "{account} {verb} {resource} in {namespace}: {may}"
        );
    }
    Ok(())
}
