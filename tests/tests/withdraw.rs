//! The label is taken away.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::capture::Capture;
use mesh_tests::cluster::{Cluster, MODE_LABEL};
use mesh_tests::guard::Namespace;
use mesh_tests::manifest::Pod;
use mesh_tests::podtool::Place;
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::traffic::ways_of;
use mesh_tests::wait::eventually;

/// How long an open connection may stand still while the kernel changes around it.
const STILL: Duration = Duration::from_secs(1);

/// Long enough for ten lines on a connection that is held.
const TEN_LINES: Duration = Duration::from_millis(1200);

/// A client on node 1 and a server on node 2, and the server's address.
fn pair(cluster: &Cluster, namespace: &str) -> Result<String> {
    let client = Pod::new(namespace, "client", NODE_1).manifests();
    cluster.apply(&(client + &Pod::new(namespace, "server", NODE_2).manifests()))?;
    cluster.wait_ready(namespace)?;
    cluster.pod_field(namespace, "server", ".status.podIP")
}

/// Takes the namespace out of the mesh and waits until no node knows its pods.
fn withdraw(cluster: &Cluster, namespace: &str) -> Result<()> {
    cluster.kubectl(&["label", "namespace", namespace, &format!("{MODE_LABEL}-")])?;
    eventually(Duration::from_secs(20), "withdrawn", || {
        for node in [NODE_1, NODE_2] {
            let object = cluster.ambient_node(node)?;
            let settled =
                object["status"]["observedGeneration"] == object["metadata"]["generation"];
            let known = object["spec"]["workloads"].to_string().contains(namespace);
            ensure!(settled && !known, "{node}: {object:#}");
        }
        Ok(())
    })
    .map(drop)
}

#[test]
fn a_withdrawn_pod_talks_directly_and_leaves_nothing_in_set_and_routes() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "withdraw", Some("ambient"))?;
    let name = namespace.name.as_str();
    let server = pair(&cluster, name)?;
    cluster.wait_in_mesh(name, Duration::from_secs(20))?;
    let held = |node: &str| -> Result<String> {
        let set = cluster.on_node(node, &["ipset", "list", "ztunnel-pods-ips"])?;
        let routes = cluster.on_node(node, &["ip", "route", "show", "table", "100"])?;
        Ok(set + &routes)
    };
    ensure!(
        held(NODE_2)?.matches(&server).count() >= 2,
        "{}",
        held(NODE_2)?
    );
    withdraw(&cluster, name)?;
    for (node, pod) in [(NODE_1, "client"), (NODE_2, "server")] {
        let ip = cluster.pod_field(name, pod, ".status.podIP")?;
        eventually(Duration::from_secs(5), "nothing is left of the pod", || {
            let held = held(node)?;
            ensure!(
                !held.split_whitespace().any(|word| word == ip),
                "{ip}: {held}"
            );
            Ok(())
        })?;
    }
    let marker = format!("marker-of-{name}");
    let capture = Capture::start("withdrawn", &format!("tcp and host {server}"))?;
    let (_, ways) = ways_of(&cluster, name, || {
        let to = format!("{server}:9000");
        Place::pod(&cluster, name, "client").run(&["send", "--to", &to, "--text", &marker])
    })?;
    assert_eq!(ways, [""; 0]);
    ensure!(
        capture.stop()?.contains(&marker)?,
        "the traffic is not direct"
    );
    Ok(())
}

#[test]
fn s19_open_connections_go_on_when_their_pods_join_and_when_they_leave() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "open", None)?;
    let name = namespace.name.as_str();
    let server = format!("{}:9000", pair(&cluster, name)?);
    let client = Place::pod(&cluster, name, "client");
    let older = client.hold(&server)?;
    cluster.kubectl(&["label", "namespace", name, &format!("{MODE_LABEL}=ambient")])?;
    cluster.wait_in_mesh(name, Duration::from_secs(20))?;
    let (inside, ways) = ways_of(&cluster, name, || client.hold(&server))?;
    ensure!(
        ways.len() == 2 && ways.iter().all(|way| way.ends_with(" mtls")),
        "{ways:?}"
    );
    std::thread::sleep(TEN_LINES);
    withdraw(&cluster, name)?;
    std::thread::sleep(TEN_LINES);
    older.end_uncut(STILL)?;
    inside.end_uncut(STILL)?;
    // A new one is direct.
    let (_, ways) = ways_of(&cluster, name, || client.send(&server))?;
    assert_eq!(ways, [""; 0]);
    Ok(())
}
