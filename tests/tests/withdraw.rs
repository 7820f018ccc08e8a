//! The label is taken away.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::capture::Capture;
use mesh_tests::cluster::Cluster;
use mesh_tests::enrolment::{enrol, withdraw};
use mesh_tests::guard::Namespace;
use mesh_tests::manifest::{Pod, TCP};
use mesh_tests::matrix::under_every_filter;
use mesh_tests::podtool::{Held, Place};
use mesh_tests::scene::with_port;
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::traffic::ways_of;
use mesh_tests::wait::{eventually, patient};

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

#[test]
fn a_withdrawn_pod_talks_directly_and_leaves_nothing_in_set_and_routes() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "withdraw", Some("ambient"))?;
    let name = namespace.name.as_str();
    let server = pair(&cluster, name)?;
    cluster.wait_in_mesh(name, Duration::from_secs(20))?;
    let held = |node: &str, ip: &IpAddr| -> Result<usize> {
        let (set, family) = if ip.is_ipv4() {
            ("ztunnel-pods-ips", "-4")
        } else {
            ("ztunnel-pods-ips6", "-6")
        };
        let mut all = cluster.on_node(node, &["ipset", "list", set])?;
        all += &cluster.on_node(node, &["ip", family, "route", "show", "table", "100"])?;
        let ip = ip.to_string();
        Ok(all.split_whitespace().filter(|word| **word == ip).count())
    };
    let mut all = Vec::new();
    for (node, pod) in [(NODE_1, "client"), (NODE_2, "server")] {
        for ip in cluster.pod_ips(name, pod)? {
            ensure!(held(node, &ip)? >= 2, "{ip} is not in set and routes");
            all.push((node, ip));
        }
    }
    withdraw(&cluster, name)?;
    for (node, ip) in all {
        eventually(Duration::from_secs(5), "nothing is left of the pod", || {
            ensure!(held(node, &ip)? == 0, "{ip} is in set or routes");
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
    under_every_filter(&cluster, |filter| {
        open_connections_go_on(&cluster).with_context(|| format!("rp_filter {filter}"))
    })
}

/// From either node to the other, and over both families, at the same time.
fn open_connections_go_on(cluster: &Cluster) -> Result<()> {
    let namespace = Namespace::create(cluster, "open", None)?;
    let name = namespace.name.as_str();
    let one = Pod::new(name, "one", NODE_1).manifests();
    cluster.apply(&(one + &Pod::new(name, "two", NODE_2).manifests()))?;
    cluster.wait_ready(name)?;
    let mut all = Vec::new();
    for (from, to) in [("one", "two"), ("two", "one")] {
        for ip in cluster.pod_ips(name, to)? {
            all.push((Place::pod(cluster, name, from), with_port(ip, TCP)));
        }
    }
    ensure!(all.len() == 4, "{all:?}");
    let hold_all = || all.iter().map(|(from, to)| from.hold(to)).collect();
    let older: Vec<Held> = hold_all()?;
    enrol(cluster, name)?;
    let (inside, ways): (Vec<Held>, _) = ways_of(cluster, name, hold_all)?;
    ensure!(
        ways.len() == 4 && ways.iter().all(|way| way.ends_with(" mtls")),
        "{ways:?}"
    );
    std::thread::sleep(TEN_LINES);
    withdraw(cluster, name)?;
    std::thread::sleep(TEN_LINES);
    for (kind, held) in [("older", older), ("inside", inside)] {
        for ((_, to), held) in all.iter().zip(held) {
            held.end_uncut(patient(STILL))
                .with_context(|| format!("the connection to {to}, {kind}"))?;
        }
    }
    // New ones are direct.
    let ((), ways) = ways_of(cluster, name, || {
        all.iter()
            .try_for_each(|(from, to)| from.send(to).map(drop))
    })?;
    ensure!(ways.is_empty(), "{ways:?}");
    Ok(())
}
