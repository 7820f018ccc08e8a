//! A node's machine starts anew under pods of the mesh that talk all the time.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::capture::{Capture, tcp_of};
use mesh_tests::cluster::{Cluster, setting};
use mesh_tests::command;
use mesh_tests::guard::Namespace;
use mesh_tests::manifest::{Pod, TCP};
use mesh_tests::scene::with_port;
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::wait::eventually;

/// An emulated machine starts, and all that runs on it.
const REBOOTED: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(60);

/// What the pods that talk are called: kubelet starts them at the same time, in an order by chance.
const TALKERS: [&str; 4] = ["talks-1", "talks-2", "talks-3", "talks-4"];

/// A pod's own command: it sends this text again and again, and says in which boot it arrived.
fn talk(to: &str, text: &str) -> String {
    format!(
        "[bash, -c, 'boot=$(cat /proc/sys/kernel/random/boot_id); \
         while :; do podtool send --to {to} --text {text} --timeout 5 >/dev/null 2>&1 && echo heard in $boot; \
         sleep 0.1; done']"
    )
}

/// The boot that the node's kernel is in.
fn boot(cluster: &Cluster, node: &str) -> Result<String> {
    let id = cluster.on_node(node, &["cat", "/proc/sys/kernel/random/boot_id"])?;
    Ok(id.trim().to_owned())
}

/// The boots in which the AmbientNode became Ready, and in which Kubernetes knows the node to run.
fn known_boots(cluster: &Cluster, node: &str) -> Result<(String, String)> {
    let ready = [
        "get",
        "ambientnode",
        node,
        "-o",
        "jsonpath={.status.readyBootID}",
    ];
    let runs = [
        "get",
        "node",
        node,
        "-o",
        "jsonpath={.status.nodeInfo.bootID}",
    ];
    Ok((cluster.kubectl(&ready)?, cluster.kubectl(&runs)?))
}

fn wait_heard(cluster: &Cluster, namespace: &str, boot: &str, limit: Duration) -> Result<()> {
    let words = format!("heard in {boot}");
    for pod in TALKERS {
        eventually(limit, "what it says arrives", || {
            let log = cluster.kubectl(&["-n", namespace, "logs", pod, "--tail=20"])?;
            ensure!(log.contains(&words), "{pod} in {boot}: {log}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "only a machine starts anew: ring 5"]
fn a_rebooted_node_sends_nothing_of_mesh_pods_in_the_clear_and_serves_them_again() -> Result<()> {
    let cluster = Cluster::current()?;
    cluster.wait_recovered()?;
    let namespace = Namespace::create(&cluster, "reboot", Some("ambient"))?;
    let name = namespace.name.as_str();
    let marker = format!("marker-of-{name}");
    cluster.apply(&Pod::new(name, "server", NODE_1).manifests())?;
    cluster.wait_ready(name)?;
    cluster.wait_in_mesh(name, SOON)?;
    let server = cluster.pod_ips(name, "server")?;
    let ip = server.first().copied().context("no address")?;
    let command = talk(&with_port(ip, TCP), &marker);
    let manifests = TALKERS.map(|pod| {
        let pod = Pod {
            command: Some(&command),
            ..Pod::new(name, pod, NODE_2)
        };
        pod.manifests()
    });

    let capture = Capture::start("reboot", &tcp_of(&server))?;
    cluster.apply(&manifests.concat())?;
    cluster.wait_ready(name)?;
    let before = boot(&cluster, NODE_2)?;
    wait_heard(&cluster, name, &before, SOON)?;

    let reboot = setting("AMBIT_REBOOT")?;
    command::output(&reboot, &[&setting("AMBIT_CLUSTER_NAME")?, NODE_2])?;
    let took = eventually(REBOOTED, "the node is Ready in its new boot", || {
        let (ready, runs) = known_boots(&cluster, NODE_2)?;
        ensure!(
            runs != before && ready == runs,
            "{before} before, {runs} now, ready in {ready}"
        );
        Ok(())
    })?;
    let after = boot(&cluster, NODE_2)?;
    ensure!(after != before, "it has not started anew");
    wait_heard(&cluster, name, &after, REBOOTED)?;
    println!("ready again after {} ms", took.as_millis());
    let captured = capture.stop()?;
    captured.ensure_encrypted(&marker)?;
    ensure!(
        captured.packets("tcp port 15008")?.len() > 100,
        "hardly anything was captured"
    );
    cluster.wait_in_mesh(name, SOON)?;
    cluster.wait_recovered()?;
    // Whoever comes next finds all pods running.
    let ready = [
        "wait",
        "pod",
        "-A",
        "--all",
        "--for=condition=Ready",
        "--timeout=240s",
    ];
    cluster.kubectl(&ready).map(drop)
}
