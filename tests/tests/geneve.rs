//! Geneve where the kernel has it; where not, words that say what to do.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::guard::Undo;
use mesh_tests::stage::{NODE_2, Stage};
use serde_json::json;

/// Whether a node's kernel makes geneve devices, tried with `ip` in a namespace of its own.
fn kernel_has_geneve(cluster: &Cluster, node: &str) -> Result<bool> {
    let script = "ip link add probe type geneve id 1 remote 192.0.2.1 2>/dev/null && echo made";
    let tried = format!("unshare --net sh -c '{script}' || true");
    Ok(cluster.on_node(node, &["sh", "-c", &tried])?.trim() == "made")
}

/// Kinds of the tunnels' devices, by name; those of the second slot end in 2.
fn device_kinds(cluster: &Cluster) -> Result<Vec<(String, String)>> {
    let shown = cluster.on_node(NODE_2, &["ip", "-d", "-j", "link", "show"])?;
    let links: Vec<serde_json::Value> = serde_json::from_str(&shown)?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let all = links
        .iter()
        .map(|link| (text(&link["ifname"]), text(&link["linkinfo"]["info_kind"])));
    let mut ours: Vec<_> = all
        .filter(|(name, _)| name.starts_with("istio"))
        .map(|(name, kind)| (name.trim_end_matches('2').to_owned(), kind))
        .collect();
    ours.sort();
    Ok(ours)
}

fn tunnels_of(kind: &str) -> Vec<(String, String)> {
    ["istioin", "istioout"]
        .map(|name| (name.to_owned(), kind.to_owned()))
        .to_vec()
}

#[test]
fn the_status_says_whether_the_kernel_has_geneve() -> Result<()> {
    let cluster = Cluster::current()?;
    for node in cluster.nodes()? {
        let status = cluster.ambient_node(&node)?["status"].take();
        assert_eq!(
            status["kernel"]["geneve"],
            kernel_has_geneve(&cluster, &node)?
        );
    }
    Ok(())
}

#[test]
fn geneve_is_used_where_the_kernel_has_it_and_else_the_condition_says_what_to_do() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    let before = cluster.ambient_node(NODE_2)?["spec"]["tunnel"]["type"].take();
    let also = cluster.clone();
    let undo = Undo::new(move || {
        also.patch_spec(NODE_2, &json!({"tunnel": {"type": before}}))?;
        also.wait_recovered()
    });
    cluster.patch_spec(NODE_2, &json!({"tunnel": {"type": "Geneve"}}))?;
    if kernel_has_geneve(cluster, NODE_2)? {
        let wanted = ("TunnelsReady", "True", "TunnelsUp");
        cluster.wait_condition(NODE_2, wanted, Duration::from_secs(20))?;
        assert_eq!(device_kinds(cluster)?, tunnels_of("geneve"));
    } else {
        let wanted = ("TunnelsReady", "False", "GeneveUnsupported");
        let message = cluster.wait_condition(NODE_2, wanted, Duration::from_secs(20))?;
        ensure!(message.contains("modprobe geneve"), "{message}");
        ensure!(message.contains("spec.tunnel.type: Veth"), "{message}");
        let wanted = ("Ready", "False", "GeneveUnsupported");
        cluster.wait_condition(NODE_2, wanted, Duration::from_secs(5))?;
    }
    undo.now()?;
    stage
        .mesh("client")
        .send(&format!("{}:9000", stage.far))
        .map(drop)
}

#[test]
fn veth_works_on_every_kernel_under_the_same_names() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    let before = cluster.ambient_node(NODE_2)?["spec"]["tunnel"]["type"].take();
    let also = cluster.clone();
    let undo = Undo::new(move || {
        also.patch_spec(NODE_2, &json!({"tunnel": {"type": before}}))?;
        also.wait_recovered()
    });
    cluster.patch_spec(NODE_2, &json!({"tunnel": {"type": "Veth"}}))?;
    cluster.wait_recovered()?;
    assert_eq!(device_kinds(cluster)?, tunnels_of("veth"));
    stage.mesh("client").send(&format!("{}:9000", stage.far))?;
    undo.now()
}
