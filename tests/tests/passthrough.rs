//! What is outside the mesh stays reachable, and who stays out is told why.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::enrolment::label;
use mesh_tests::guard::Namespace;
use mesh_tests::manifest::Pod;
use mesh_tests::matrix::families;
use mesh_tests::stage::{MESH, NODE_1, NODE_2, PLAIN, Stage};
use mesh_tests::wait::eventually;

#[test]
fn names_are_looked_up_over_udp_from_a_mesh_pod() -> Result<()> {
    let stage = Stage::set()?;
    let seen = stage
        .mesh("client")
        .run(&["resolve", &format!("headless.{MESH}.svc.cluster.local")])?;
    let far = stage.cluster.pod_ips(MESH, "far")?;
    assert_eq!(seen["addresses"], serde_json::json!(far));
    let seen = stage
        .mesh("client")
        .run(&["resolve", &format!("remote.{PLAIN}")])?;
    let mut ips = Vec::new();
    for &family in families()? {
        ips.push(stage.cluster_ip(PLAIN, "remote", family)?);
    }
    assert_eq!(seen["addresses"], serde_json::json!(ips));
    Ok(())
}

#[test]
fn a_mesh_pod_reaches_a_service_of_pods_outside_the_mesh() -> Result<()> {
    let stage = Stage::set()?;
    let seen = stage
        .mesh("client")
        .run(&["send", "--to", &format!("remote.{PLAIN}:9000")])?;
    assert_eq!(seen["pod"], "remote");
    ensure!(
        stage.is_client(&mesh_tests::podtool::peer_ip(&seen)?),
        "{seen}"
    );
    Ok(())
}

#[test]
fn a_pod_outside_the_mesh_reaches_a_service_of_mesh_pods() -> Result<()> {
    let stage = Stage::set()?;
    for from in ["stranger", "remote"] {
        let seen = stage
            .plain(from)
            .run(&["send", "--to", &format!("far.{MESH}:9000")])?;
        assert_eq!(seen["pod"], "far");
    }
    Ok(())
}

#[test]
fn kubelets_http_and_tcp_probes_of_mesh_pods_keep_succeeding() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "probes", None)?;
    let name = namespace.name.as_str();
    let pods = [
        (
            "http-1",
            NODE_1,
            "{httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 1}",
        ),
        (
            "tcp-1",
            NODE_1,
            "{tcpSocket: {port: 9000}, periodSeconds: 1, failureThreshold: 1}",
        ),
        (
            "http-2",
            NODE_2,
            "{httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 1}",
        ),
    ];
    for (pod, node, probe) in pods {
        cluster.apply(
            &Pod {
                probe: Some(probe),
                ..Pod::new(name, pod, node)
            }
            .manifests(),
        )?;
    }
    cluster.wait_ready(name)?;
    // When each pod became ready, and how often its container was started.
    let lives = || {
        let path = "jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=='Ready')].status} \
                    {.status.conditions[?(@.type=='Ready')].lastTransitionTime} \
                    {.status.containerStatuses[0].restartCount}{'\\n'}{end}";
        cluster.kubectl(&["-n", name, "get", "pods", "-o", path])
    };
    let before = lives()?;
    label(&cluster, name)?;
    cluster.wait_in_mesh(name, Duration::from_secs(20))?;
    // Four probes of each kind, one a second, every one of which counts.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(lives()?, before);
    assert_eq!(before.matches(" True ").count(), pods.len(), "{before}");
    Ok(())
}

#[test]
fn who_stays_out_of_the_mesh_is_told_in_the_status_with_its_reason() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "outsiders", Some("ambient"))?;
    let name = namespace.name.as_str();
    let host = Pod {
        host_network: true,
        ports_from: Some(29000),
        ..Pod::new(name, "host", NODE_2)
    };
    let none = Pod {
        mode: Some("none"),
        ..Pod::new(name, "none", NODE_2)
    };
    cluster.apply(
        &(host.manifests() + &none.manifests() + &Pod::new(name, "inside", NODE_2).manifests()),
    )?;
    cluster.wait_ready(name)?;
    eventually(Duration::from_secs(20), "both are listed", || {
        let status = cluster.ambient_node(NODE_2)?["status"].take();
        let mut notes: Vec<_> = status["excluded"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|note| note["namespace"] == name)
            .map(|note| {
                (
                    note["name"].as_str(),
                    note["reason"].as_str(),
                    note["message"] != "",
                )
            })
            .collect();
        notes.sort_unstable();
        let expected = [("host", "HostNetwork"), ("none", "OptedOut")];
        ensure!(
            notes == expected.map(|(pod, reason)| (Some(pod), Some(reason), true)),
            "{status:#}"
        );
        Ok(())
    })?;
    let workloads = cluster.ambient_node(NODE_2)?["spec"]["workloads"].take();
    let inside: Vec<_> = workloads
        .as_array()
        .context("no workloads")?
        .iter()
        .filter(|workload| workload["namespace"] == name)
        .map(|workload| workload["name"].clone())
        .collect();
    assert_eq!(inside, ["inside"]);
    Ok(())
}
