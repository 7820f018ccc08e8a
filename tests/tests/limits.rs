//! What stands in the way on a node is said in its AmbientNode, and is forgotten when it is gone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::{Cluster, SYSTEM};
use mesh_tests::guard::Undo;
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::wait::eventually;
use serde_json::{Value, json};

const AGENTS: &str = "daemonset/ambit-node-agent";

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
fn a_check_of_the_source_is_said_while_it_is_there() -> Result<()> {
    let cluster = Cluster::current()?;
    // As Calico's, for the devices of this cluster's pods.
    let check = |cluster: &Cluster, what: &str| {
        let rule = "PREROUTING -i veth+ -m rpfilter --validmark --invert -j DROP";
        let mut words = vec!["iptables-nft", "-t", "raw", what];
        words.extend(rule.split(' '));
        cluster.on_node(NODE_2, &words).map(drop)
    };
    let also = cluster.clone();
    let undo = Undo::new(move || {
        check(&also, "-D")?;
        also.wait_recovered()
    });
    check(&cluster, "-A")?;
    let wanted = ("RedirectionReady", "False", "SourceCheck");
    let message = cluster.wait_condition(NODE_2, wanted, PASS)?;
    ensure!(
        message.contains("rpfilter") && message.contains("allowedSourcePrefixes"),
        "{message}"
    );
    undo.now()
}

/// A change of the agents' container, as JSON patches have it.
fn change_agents(cluster: &Cluster, operation: &str, path: &str, value: &Value) -> Result<()> {
    let path = format!("/spec/template/spec/containers/0/{path}");
    let patch = json!([{"op": operation, "path": path, "value": value}]).to_string();
    let call = ["-n", SYSTEM, "patch", AGENTS, "--type=json", "-p", &patch];
    cluster.kubectl(&call).map(drop)
}

#[test]
fn an_agent_that_can_only_read_settings_says_so() -> Result<()> {
    let cluster = Cluster::current()?;
    let agents = cluster.get(&["-n", SYSTEM, AGENTS])?;
    let mounts = &agents["spec"]["template"]["spec"]["containers"][0]["volumeMounts"];
    let mounts = mounts.as_array().context("the agents have no mounts")?;
    let index = mounts.iter().position(|mount| mount["name"] == "sysctl");
    let path = format!(
        "volumeMounts/{}/readOnly",
        index.context("the agents do not mount settings")?
    );
    let (also, same) = (cluster.clone(), path.clone());
    let undo = Undo::new(move || {
        change_agents(&also, "remove", &same, &Value::Null)?;
        also.wait_recovered()
    });
    change_agents(&cluster, "add", &path, &json!(true))?;
    cluster.kubectl(&["-n", SYSTEM, "rollout", "status", AGENTS, "--timeout=90s"])?;
    // A new proxy has settings yet to be written.
    let proxy = cluster.system_pod("ambit-proxy", NODE_2)?;
    cluster.kubectl(&["-n", SYSTEM, "delete", "pod", &proxy, "--wait=false"])?;
    let wanted = ("RedirectionReady", "False", "SysctlReadOnly");
    let message = cluster.wait_condition(NODE_2, wanted, Duration::from_secs(60))?;
    ensure!(message.contains("/proc/sys/net writable"), "{message}");
    undo.now()
}

#[test]
fn an_agent_without_a_capability_names_it() -> Result<()> {
    let cluster = Cluster::current()?;
    let give = |cluster: &Cluster, capabilities: &[&str]| {
        let path = "securityContext/capabilities/add";
        change_agents(cluster, "replace", path, &json!(capabilities))
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
