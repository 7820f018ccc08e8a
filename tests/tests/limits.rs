//! What stands in the way on a node is said in its AmbientNode, and is forgotten when it is gone.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::cluster::{Cluster, SYSTEM};
use mesh_tests::guard::Undo;
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::wait::eventually;
use serde_json::json;

/// A full pass of the agent, which looks at what has no notification, and some time to tell.
const PASS: Duration = Duration::from_secs(45);

#[test]
fn a_node_that_does_not_forward_says_so_and_recovers() -> Result<()> {
    let cluster = Cluster::current()?;
    let forward = |cluster: &Cluster, value: &str| {
        let setting = format!("net.ipv4.ip_forward={value}");
        cluster
            .on_node(NODE_2, &["sysctl", "-qw", &setting])
            .map(drop)
    };
    let also = cluster.clone();
    let undo = Undo::new(move || {
        forward(&also, "1")?;
        also.wait_recovered()
    });
    forward(&cluster, "0")?;
    let wanted = ("RedirectionReady", "False", "ForwardingDisabled");
    let message = cluster.wait_condition(NODE_2, wanted, PASS)?;
    ensure!(message.contains("net/ipv4/ip_forward is 0"), "{message}");
    undo.now()
}

#[test]
fn an_agent_without_a_capability_names_it() -> Result<()> {
    const AGENTS: &str = "daemonset/ambit-node-agent";
    let cluster = Cluster::current()?;
    let give = |cluster: &Cluster, capabilities: &[&str]| {
        let path = "/spec/template/spec/containers/0/securityContext/capabilities/add";
        let patch = json!([{"op": "replace", "path": path, "value": capabilities}]).to_string();
        let call = ["-n", SYSTEM, "patch", AGENTS, "--type=json", "-p", &patch];
        cluster.kubectl(&call).map(drop)
    };
    let also = cluster.clone();
    let undo = Undo::new(move || {
        give(&also, &["NET_ADMIN", "NET_RAW", "SYS_ADMIN"])?;
        also.wait_recovered()
    });
    give(&cluster, &["NET_RAW", "SYS_ADMIN"])?;
    eventually(
        Duration::from_secs(60),
        "an agent misses a capability",
        || {
            for node in [NODE_1, NODE_2] {
                let condition = cluster.condition(node, "RedirectionReady")?;
                let message = condition["message"].as_str().unwrap_or_default();
                if condition["reason"] == "CapabilityMissing"
                    && message.contains("lacks NET_ADMIN:")
                {
                    return Ok(());
                }
            }
            anyhow::bail!("no node has the reason CapabilityMissing")
        },
    )?;
    undo.now()
}
