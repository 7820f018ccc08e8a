//! What users may set in an AmbientNode is what the node then does, and goes on doing.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::guard::Undo;
use mesh_tests::stage::{NODE_1, STAGE, Stage};
use mesh_tests::traffic::ways_of;
use mesh_tests::wait::eventually;
use serde_json::{Value, json};

/// Sets a part of node 1's spec until the end of the test.
fn set(cluster: &Cluster, spec: &Value, back: Value) -> Result<Undo> {
    let also = cluster.clone();
    let undo = Undo::new(move || {
        also.patch_spec(NODE_1, &back)?;
        also.wait_recovered()
    });
    cluster.patch_spec(NODE_1, spec)?;
    Ok(undo)
}

fn mangle(cluster: &Cluster) -> Result<String> {
    cluster.on_node(NODE_1, &["iptables-save", "-t", "mangle"])
}

#[test]
fn changed_marks_networks_and_ports_are_used_and_traffic_goes_on() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    let undo = set(
        cluster,
        &json!({
            "marks": {"outbound": "0x100000/0x100000"},
            "ports": {"outbound": 15101},
            "tunnel": {"outbound": {"cidr": "192.168.227.0/30"}},
        }),
        json!({
            "marks": {"outbound": "0x100/0x100"},
            "ports": {"outbound": 15001},
            "tunnel": {"outbound": {"cidr": "192.168.127.0/30"}},
        }),
    )?;
    eventually(
        Duration::from_secs(20),
        "the kernel holds what is set",
        || {
            let (rules, links) = (
                mangle(cluster)?,
                cluster.on_node(NODE_1, &["ip", "address"])?,
            );
            ensure!(rules.contains("--set-xmark 0x100000/0x100000"), "{rules}");
            ensure!(links.contains("192.168.227.1/30"), "{links}");
            ensure!(!links.contains("192.168.127.1/30"), "{links}");
            Ok(())
        },
    )?;
    cluster.wait_recovered()?;
    let far = format!("{}:9000", stage.far);
    let (peer, ways) = ways_of(cluster, STAGE, || stage.mesh("client").send(&far))?;
    assert_eq!(peer, stage.client);
    ensure!(
        ways.len() == 2 && ways.iter().all(|way| way.ends_with(" mtls")),
        "{ways:?}"
    );
    undo.now()?;
    let rules = mangle(cluster)?;
    ensure!(!rules.contains("0x100000"), "{rules}");
    stage.mesh("client").send(&far).map(drop)
}

#[test]
fn local_traffic_hbone_carries_pods_of_one_node_through_a_tunnel() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    let undo = set(
        cluster,
        &json!({"localTraffic": "Hbone"}),
        json!({"localTraffic": "Direct"}),
    )?;
    let near = format!("{}:9000", stage.near);
    eventually(Duration::from_secs(10), "through a tunnel", || {
        let (peer, ways) = ways_of(cluster, STAGE, || stage.mesh("client").send(&near))?;
        ensure!(peer == stage.client, "the server sees {peer}");
        let expected = ["in", "out"]
            .map(|way| format!("node-1 {way} stage-mesh/client -> stage-mesh/near mtls"));
        ensure!(ways == expected, "{ways:?}");
        Ok(())
    })?;
    undo.now()
}

#[test]
fn what_somebody_deletes_of_the_data_path_is_back_at_once() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    // The kernel tells the agent about these; a second, and some for a busy machine.
    let limit = Duration::from_secs(3);
    for (list, delete) in [
        (
            &["ip", "rule"][..],
            &["ip", "rule", "del", "priority", "101"][..],
        ),
        (
            &["ip", "route", "show", "table", "101"],
            &[
                "sh",
                "-c",
                "ip route del $(ip route show table 101 | grep -o 'default via .* dev [^ ]*') table 101",
            ],
        ),
        (
            &["sh", "-c", "ip -br link | grep istioin"],
            &[
                "sh",
                "-c",
                "ip link set $(ip -br link | grep -o 'istioin[^@ ]*') down",
            ],
        ),
    ] {
        let before = cluster.on_node(NODE_1, list)?;
        cluster.on_node(NODE_1, delete)?;
        eventually(limit, "it is back", || {
            let now = cluster.on_node(NODE_1, list)?;
            ensure!(now == before, "before:\n{before}\nnow:\n{now}");
            Ok(())
        })?;
    }
    stage
        .mesh("client")
        .send(&format!("{}:9000", stage.far))
        .map(drop)
}
