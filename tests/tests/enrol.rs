//! A label brings pods into the mesh.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::capture::{Capture, tcp_of};
use mesh_tests::cluster::{Cluster, items, setting};
use mesh_tests::command;
use mesh_tests::enrolment::label;
use mesh_tests::guard::Namespace;
use mesh_tests::manifest::{self, Pod, TCP};
use mesh_tests::podtool::Place;
use mesh_tests::scene::with_port;
use mesh_tests::stage::{MESH, NODE_1, NODE_2, STAGE, Stage};
use mesh_tests::state;
use mesh_tests::traffic::{log_of, now, ways_of};
use mesh_tests::wait::{SERVED, eventually};

/// A client on node 1 and a server on each node, behind a Service and a headless one.
fn shop(cluster: &Cluster, namespace: &str) -> Result<()> {
    let mut all = String::new();
    for (name, app, node) in [
        ("client", "client", NODE_1),
        ("near", "server", NODE_1),
        ("far", "server", NODE_2),
    ] {
        all += &Pod {
            app: Some(app),
            ..Pod::new(namespace, name, node)
        }
        .manifests();
    }
    all += &manifest::service(namespace, "server", "server", false);
    all += &manifest::service(namespace, "headless", "server", true);
    cluster.apply(&all)?;
    cluster.wait_ready(namespace)
}

/// Names, UIDs and restarts of a namespace's pods.
fn lives(cluster: &Cluster, namespace: &str) -> Result<Vec<String>> {
    let pods = cluster.get(&["-n", namespace, "pods"])?;
    Ok(items(&pods)
        .map(|pod| {
            let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
            format!(
                "{} {} {restarts}",
                pod["metadata"]["name"], pod["metadata"]["uid"]
            )
        })
        .collect())
}

fn enrolled(cluster: &Cluster) -> Result<i64> {
    let nodes = cluster.get(&["ambientnodes"])?;
    Ok(items(&nodes)
        .filter_map(|node| node["status"]["enrolled"].as_i64())
        .sum())
}

/// Sends `marker` from the client to every way the servers can be reached, with the server's view of
/// the client checked each time.
fn reach_all(cluster: &Cluster, namespace: &str, marker: &str) -> Result<()> {
    let client = cluster.pod_ips(namespace, "client")?;
    let mut all = cluster.pod_ips(namespace, "near")?;
    all.extend(cluster.pod_ips(namespace, "far")?);
    let path = "jsonpath={.spec.clusterIPs[*]}";
    let ips = cluster.kubectl(&["-n", namespace, "get", "service", "server", "-o", path])?;
    for ip in ips.split(' ') {
        all.push(ip.parse()?);
    }
    let mut all: Vec<String> = all.into_iter().map(|ip| with_port(ip, TCP)).collect();
    let whole = format!("headless.{namespace}.svc.cluster.local");
    all.extend(["server", "headless", &whole].map(|name| format!("{name}:{TCP}")));
    let place = Place::pod(cluster, namespace, "client");
    for to in all {
        let seen = place.run(&["send", "--to", &to, "--text", marker])?;
        let peer = mesh_tests::podtool::peer_ip(&seen)?;
        ensure!(client.contains(&peer.parse()?), "{to}: {seen}");
    }
    Ok(())
}

#[test]
fn a_label_brings_a_namespace_into_the_mesh_within_five_seconds_and_restarts_no_pod() -> Result<()>
{
    let cluster = Cluster::current()?;
    // Who leaves meanwhile is missing from the counts.
    state::wait_nobody_leaves(&cluster)?;
    let namespace = Namespace::create(&cluster, "enrol", None)?;
    let name = namespace.name.as_str();
    shop(&cluster, name)?;
    let (before, count) = (lives(&cluster, name)?, enrolled(&cluster)?);
    let client = tcp_of(&cluster.pod_ips(name, "client")?);
    let marker = format!("marker-of-{name}");

    let capture = Capture::start("clear", &client)?;
    // kube-proxy refuses for a Service until it knows of its pods.
    eventually(SERVED, "all are reached", || {
        reach_all(&cluster, name, &marker)
    })?;
    let clear = capture.stop()?;
    ensure!(
        clear.contains(&marker)?,
        "outside the mesh the marker can be read on the wire"
    );
    ensure!(
        clear.packets("tcp port 15008")?.is_empty(),
        "nothing is encrypted yet"
    );

    label(&cluster, name)?;
    let took = eventually(
        Duration::from_secs(5),
        "the counts show three more pods",
        || {
            let now = enrolled(&cluster)?;
            ensure!(now == count + 3, "{count} before, {now} now");
            Ok(())
        },
    )?;
    println!("enrolled after {took:?}");

    let capture = Capture::start("mesh", &client)?;
    reach_all(&cluster, name, &marker)?;
    let mesh = capture.stop()?;
    mesh.ensure_encrypted(&marker)?;
    // The first byte of a TLS record of a handshake, in the first packets after the header of TCP.
    let hello = "tcp port 15008 and tcp[((tcp[12] & 0xf0) >> 2)] = 22";
    ensure!(
        !mesh.packets(hello)?.is_empty(),
        "no TLS handshake was captured"
    );
    assert_eq!(lives(&cluster, name)?, before);
    Ok(())
}

#[test]
fn a_label_on_a_pod_brings_it_alone_into_the_mesh() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "alone", None)?;
    let name = namespace.name.as_str();
    let inside = Pod {
        mode: Some("ambient"),
        ..Pod::new(name, "inside", NODE_1)
    };
    cluster.apply(&(inside.manifests() + &Pod::new(name, "beside", NODE_1).manifests()))?;
    cluster.wait_ready(name)?;
    eventually(
        Duration::from_secs(20),
        "the labelled pod is a workload",
        || {
            let workloads = cluster.ambient_node(NODE_1)?["spec"]["workloads"].take();
            let names: Vec<_> = workloads
                .as_array()
                .into_iter()
                .flatten()
                .filter(|workload| workload["namespace"] == name)
                .map(|workload| &workload["name"])
                .collect();
            ensure!(names == ["inside"], "{names:?}");
            Ok(())
        },
    )?;
    Ok(())
}

#[test]
fn certificates_that_openssl_reads_carry_the_identities_of_both_ends() -> Result<()> {
    let stage = Stage::set()?;
    for (pod, ip) in [("client", &stage.client), ("far", &stage.far)] {
        let net = format!("--net=/run/netns/{}", setting("AMBIT_OUTSIDE_NETNS")?);
        let to = format!("{ip}:15008");
        let shown = command::run(
            std::process::Command::new("nsenter")
                .args([&net, "openssl", "s_client", "-connect", &to]),
            "",
        )?;
        let pem = shown
            .stdout
            .find("-----BEGIN CERTIFICATE-----")
            .map(|at| &shown.stdout[at..]);
        let pem =
            pem.with_context(|| format!("no certificate: {}{}", shown.stdout, shown.stderr))?;
        let read = command::run(
            std::process::Command::new("openssl").args([
                "x509",
                "-noout",
                "-ext",
                "subjectAltName",
            ]),
            pem,
        )?
        .success()?;
        ensure!(
            read.contains(&format!("URI:spiffe://cluster.local/ns/{MESH}/sa/{pod}")),
            "{read}"
        );
    }
    Ok(())
}

#[test]
fn both_ends_log_the_identity_of_the_other() -> Result<()> {
    let stage = Stage::set()?;
    let since = now()?;
    stage.mesh("client").send(&format!("{}:9000", stage.far))?;
    let identity = |pod: &str| format!("spiffe://cluster.local/ns/{MESH}/sa/{pod}");
    for node in [NODE_1, NODE_2] {
        eventually(Duration::from_secs(10), "the access log names both", || {
            let lines = log_of(&stage.cluster, node, &since, &identity("far"))?;
            ensure!(
                lines.iter().any(|line| line.contains(&identity("client"))),
                "{lines:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_mesh_server_is_reached_by_address_service_and_headless_name_with_mutual_tls() -> Result<()> {
    let stage = Stage::set()?;
    for to in [
        stage.far.clone(),
        format!("far.{MESH}"),
        format!("headless.{MESH}.svc.cluster.local"),
    ] {
        let ((), ways) = ways_of(&stage.cluster, STAGE, || {
            let peer = stage.mesh("client").send(&format!("{to}:9000"))?;
            ensure!(stage.is_client(&peer), "{to}: the server sees {peer}");
            Ok(())
        })?;
        assert_eq!(ways.len(), 2, "{to}: {ways:?}");
        assert!(
            ways.iter().all(|way| way.ends_with(" mtls")),
            "{to}: {ways:?}"
        );
    }
    Ok(())
}
