//! What a node's kernel holds, as its own tools print it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, items};
use crate::wait::eventually;

/// All of Ambit's in the kernel of a node, without counters. Its routes and rules are of protocol 90.
const OURS: &str = "for family in -4 -6; do \
    ip $family rule | grep 'proto 90'; ip $family route show table all proto 90; \
  done; \
  ip -o link | grep istio; \
  for set in ztunnel-pods-ips ztunnel-pods-ips-guard; do ipset list $set; ipset list ${set}6; done; \
  for save in iptables-save ip6tables-save; do \
    for table in mangle nat; do $save -t $table | grep ztunnel | sed 's/\\[.*\\]//'; done; \
  done";

/// All of Ambit's in the kernel of a node, without counters.
///
/// # Errors
/// If the node does not answer.
pub fn ours(cluster: &Cluster, node: &str) -> Result<String> {
    cluster.on_node(node, &["sh", "-c", OURS])
}

/// Addresses that a node's sets hold, those that its routes lead to the proxy, and those that its AmbientNode wants.
fn addresses(cluster: &Cluster, node: &str) -> Result<[BTreeSet<String>; 3]> {
    let script = "ipset list -o save; for family in -4 -6; do ip $family route show table 100 proto 90; done";
    let printed = cluster.on_node(node, &["sh", "-c", script])?;
    let after = |start: &str, index: usize| {
        let lines = printed.lines().filter(|line| line.starts_with(start));
        let words = lines.filter_map(|line| line.split_whitespace().nth(index));
        words.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let members = after("add ztunnel-pods-ips", 2);
    let routes = printed
        .lines()
        .filter(|line| line.contains(" via "))
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect();
    let object = cluster.ambient_node(node)?;
    let workloads = object["spec"]["workloads"].as_array().into_iter().flatten();
    let wanted = workloads
        .flat_map(|workload| workload["ips"].as_array().into_iter().flatten())
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    Ok([members, routes, wanted])
}

/// Fails if a pod of the node is redirected in one direction only, or is not as its AmbientNode wants.
///
/// # Errors
/// If that is so, or the node does not answer.
pub fn ensure_whole(cluster: &Cluster, node: &str) -> Result<()> {
    let [members, routes, wanted] = addresses(cluster, node)?;
    ensure!(
        members == routes && members == wanted,
        "half-applied on {node}: in the sets {members:?}, routed {routes:?}, wanted {wanted:?}"
    );
    Ok(())
}

/// [`ensure_whole`] of every node.
///
/// # Errors
/// If one is not whole.
pub fn ensure_all_whole(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes()? {
        ensure_whole(cluster, &node).with_context(|| node.clone())?;
    }
    Ok(())
}

/// Waits until no pod of an earlier test is on its way out.
///
/// # Errors
/// If one is after a minute and a half.
pub fn wait_nobody_leaves(cluster: &Cluster) -> Result<()> {
    eventually(Duration::from_secs(90), "nobody leaves", || {
        for kind in ["namespaces", "pods"] {
            let all = cluster.get(&[kind, "-A"])?;
            let mut names = items(&all)
                .filter(|object| !object["metadata"]["deletionTimestamp"].is_null())
                .map(|leaving| &leaving["metadata"]["name"]);
            if let Some(leaving) = names.next() {
                bail!("{kind}: {leaving} is on its way out");
            }
        }
        Ok(())
    })?;
    cluster.wait_mesh_ready(Duration::from_secs(30)).map(drop)
}
