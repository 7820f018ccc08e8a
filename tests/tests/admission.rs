//! Who may write what, by the real API server and real tokens.

use anyhow::{Context, Result, ensure};
use mesh_tests::certificate_api::token;
use mesh_tests::cluster::Cluster;
use mesh_tests::stage::{NODE_1, NODE_2};

/// The cluster as the agent of `node` sees it.
fn agent_of(cluster: &Cluster, node: &str) -> Result<Cluster> {
    let pod = cluster.system_pod("ambit-node-agent", node)?;
    cluster.with_token(&token(cluster, "ambit-node-agent", None, Some(&pod))?)
}

/// A patch of an AmbientNode's status that changes nothing when it is allowed.
fn patch_status(agent: &Cluster, node: &str) -> Result<mesh_tests::command::Outcome> {
    let patch = [
        "patch",
        "ambientnode",
        node,
        "--subresource=status",
        "--type=merge",
        "--dry-run=server",
        "-p",
    ];
    agent.try_kubectl(
        &[&patch[..], &[r#"{"status":{"hostIP":"192.0.2.1"}}"#]].concat(),
        "",
    )
}

#[test]
fn an_agent_writes_the_status_of_its_own_node_only() -> Result<()> {
    let cluster = Cluster::current()?;
    let agent = agent_of(&cluster, NODE_1)?;
    patch_status(&agent, NODE_1)?
        .success()
        .context("its own node")?;
    let refusal = patch_status(&agent, NODE_2)?.failure()?;
    ensure!(
        refusal.contains("the agent of node 'node-1' may not write AmbientNode 'node-2'"),
        "{refusal}"
    );
    Ok(())
}

#[test]
fn an_agents_token_that_names_no_node_writes_nothing() -> Result<()> {
    let cluster = Cluster::current()?;
    let agent = cluster.with_token(&token(&cluster, "ambit-node-agent", None, None)?)?;
    let refusal = patch_status(&agent, NODE_1)?.failure()?;
    ensure!(
        refusal.contains("the agent's token names no node"),
        "{refusal}"
    );
    Ok(())
}

#[test]
fn an_agent_may_not_change_what_its_node_should_do() -> Result<()> {
    let cluster = Cluster::current()?;
    let agent = agent_of(&cluster, NODE_1)?;
    let patch = r#"{"spec":{"failureMode":"Open"}}"#;
    let call = [
        "patch",
        "ambientnode",
        NODE_1,
        "--type=merge",
        "--dry-run=server",
        "-p",
        patch,
    ];
    let refusal = agent.try_kubectl(&call, "")?.failure()?;
    ensure!(
        refusal.contains("forbidden") || refusal.contains("Forbidden"),
        "{refusal}"
    );
    // Neither if somebody widens its role by mistake.
    let identity = "system:serviceaccount:ambit-system:ambit-node-agent";
    let call = [
        &call[..],
        &["--as", identity, "--as-group", "system:masters"],
        &[
            "--as-user-extra",
            "authentication.kubernetes.io/node-name=node-1",
        ],
    ]
    .concat();
    let refusal = cluster.try_kubectl(&call, "")?.failure()?;
    ensure!(
        refusal.contains("an agent may write only the status of its AmbientNode"),
        "{refusal}"
    );
    Ok(())
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
