//! Programs die at any moment; connections, counts and conditions come right again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::capture::{Capture, tcp_of};
use mesh_tests::cluster::{Cluster, SYSTEM, items};
use mesh_tests::guard::{Namespace, Undo};
use mesh_tests::manifest::Pod;
use mesh_tests::matrix::{Case, cases};
use mesh_tests::process;
use mesh_tests::scene::{Actor, Scene, play};
use mesh_tests::stage::{MESH, NODE_1, NODE_2, Stage};
use mesh_tests::state;
use mesh_tests::wait::{eventually, patient};
use serde_json::json;

/// What is refused is so within this time: at the first try or, where a node sends no more refusals for now, at one of
/// the next.
const AT_ONCE: Duration = Duration::from_secs(3);

/// A new pod gets into the mesh.
fn a_new_pod_is_enrolled(cluster: &Cluster, node: &str) -> Result<()> {
    let namespace = Namespace::create(cluster, "after", Some("ambient"))?;
    cluster.apply(&Pod::new(&namespace.name, "pod", node).manifests())?;
    cluster.wait_ready(&namespace.name)?;
    cluster
        .wait_in_mesh(&namespace.name, Duration::from_secs(30))
        .map(drop)
}

fn wait_restarted(cluster: &Cluster, pod: &str, before: u32) -> Result<()> {
    eventually(Duration::from_secs(40), "its container runs again", || {
        let now = cluster.restarts(pod)?;
        let ready = cluster.pod_field(SYSTEM, pod, ".status.containerStatuses[0].ready")?;
        ensure!(
            now > before && ready == "true",
            "{before} restarts before, {now} now, ready {ready}"
        );
        Ok(())
    })
    .map(drop)
}

#[test]
fn a_killed_agent_comes_back_and_touches_neither_kernel_nor_connections() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    eventually(Duration::from_secs(40), "earlier tests are gone", || {
        let phase = "--field-selector=status.phase=Terminating";
        let left = cluster.kubectl(&["get", "namespaces", phase, "-o", "name"])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })?;
    let pod = cluster.system_pod("ambit-node-agent", NODE_1)?;
    let (restarts, before) = (cluster.restarts(&pod)?, state::ours(cluster, NODE_1)?);
    let held = stage.mesh("client").hold(&format!("{}:9000", stage.far))?;
    process::kill(cluster, "ambit-node-agent", &pod)?;
    stage.mesh("client").send(&format!("{}:9000", stage.far))?;
    wait_restarted(cluster, &pod, restarts)?;
    cluster.wait_recovered()?;
    assert_eq!(state::ours(cluster, NODE_1)?, before);
    a_new_pod_is_enrolled(cluster, NODE_1)?;
    held.end_uncut(Duration::from_secs(1))
}

#[test]
fn killed_controllers_come_back_and_the_mesh_works_meanwhile() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    let label = "app.kubernetes.io/name=ambit-controller";
    let pods = cluster.get(&["-n", SYSTEM, "pods", "-l", label])?;
    let names: Vec<_> = items(&pods)
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .collect();
    let held = stage.mesh("client").hold(&format!("{}:9000", stage.far))?;
    let mut before = Vec::new();
    for name in &names {
        before.push(cluster.restarts(name)?);
        process::kill(cluster, "ambit-controller", name)?;
    }
    stage.mesh("client").send(&format!("{}:9000", stage.far))?;
    for (name, before) in names.iter().zip(before) {
        wait_restarted(cluster, name, before)?;
    }
    a_new_pod_is_enrolled(cluster, NODE_2)?;
    cluster.wait_recovered()?;
    held.end_uncut(Duration::from_secs(1))
}

/// Kills the proxy of a node twice: the second time kubelet waits ten seconds before it starts it again.
fn keep_down(cluster: &Cluster, node: &str) -> Result<Undo> {
    let pod = cluster.system_pod("ambit-proxy", node)?;
    let before = cluster.restarts(&pod)?;
    let (also, name) = (cluster.clone(), pod.clone());
    let undo = Undo::new(move || {
        // A new pod has no history of crashes that kubelet would wait longer and longer for.
        also.kubectl(&["-n", SYSTEM, "delete", "pod", &name, "--grace-period=1"])?;
        also.wait_recovered()
    });
    process::kill(cluster, "ambit-proxy", &pod)?;
    eventually(Duration::from_secs(30), "it runs again", || {
        let now = cluster.restarts(&pod)?;
        ensure!(
            now > before && process::of_pod(cluster, "ambit-proxy", &pod).is_ok(),
            "{now} restarts"
        );
        Ok(())
    })?;
    process::kill(cluster, "ambit-proxy", &pod)?;
    Ok(undo)
}

#[test]
fn s20_without_a_proxy_mesh_traffic_fails_at_once_and_never_leaves_in_the_clear() -> Result<()> {
    let stage = Stage::set()?;
    for home in [NODE_1, NODE_2] {
        without_a_proxy(stage, home).with_context(|| format!("from {home}"))?;
    }
    Ok(())
}

fn without_a_proxy(stage: &'static Stage, home: &str) -> Result<()> {
    let cluster = &stage.cluster;
    let all: Vec<Case> = cases()?
        .into_iter()
        .filter(|case| case.home == home)
        .collect();
    let marker = format!("marker-of-s20-{}", std::process::id());
    let mut ips = Vec::new();
    for pod in ["client", "near", "far", "client-2"] {
        ips.extend(cluster.pod_ips(MESH, pod)?);
    }
    let capture = Capture::start("s20", &tcp_of(&ips))?;
    let undo = keep_down(cluster, home)?;
    let wanted = ("ProxyAttached", "False", "NoProxy");
    let message = cluster.wait_condition(home, wanted, Duration::from_secs(5))?;
    ensure!(!message.is_empty(), "the condition does not say what to do");
    play(stage, &all, |scene| {
        refused_and_never_in_the_clear(scene, &marker)
    })?;
    let ready = cluster.condition(home, "ProxyAttached")?;
    ensure!(
        ready["status"] == "False",
        "the proxy came back too early to see anything: {ready}"
    );
    let captured = capture.stop()?;
    captured.ensure_encrypted(&marker)?;
    undo.now()?;
    stage
        .mesh("client")
        .send(&format!("{}:9000", stage.far))
        .map(drop)
}

fn refused_and_never_in_the_clear(scene: &Scene, marker: &str) -> Result<()> {
    let Scene { client, near, .. } = scene;
    let refused = |from: &Actor, to: &Actor| {
        let start = Instant::now();
        let seen = from.attempt(&["send", "--to", &to.tcp(), "--text", marker])?;
        ensure!(seen["error"].is_string(), "{from} to {to}: {seen}");
        let took = start.elapsed();
        ensure!(
            took < patient(AT_ONCE),
            "{from} to {to} after {took:?}: {seen}"
        );
        Ok(())
    };
    // The kernel sends a pod few refusals a second, and what goes without one tries again: so one from
    // each pod, in turns. At the same time, for the proxy is not away for long.
    let ways = if scene.case.rp_filter == 1 {
        [(client, &scene.remote), (near, &scene.far)]
    } else {
        [(client, &scene.far), (near, client)]
    };
    std::thread::scope(|scope| {
        let tries = ways.map(|(from, to)| scope.spawn(move || refused(from, to)));
        tries.into_iter().try_for_each(|attempt| {
            attempt
                .join()
                .unwrap_or_else(|_| bail!("the thread of an attempt died"))
        })
    })?;
    // Kubelet's way to its pods, and pods outside the mesh, do not depend on the proxy.
    scene.host.send(&near.tcp())?;
    scene.stranger.send(&scene.remote.tcp()).map(drop)
}

#[test]
fn with_failure_mode_open_traffic_goes_directly_while_there_is_no_proxy() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    let also = cluster.clone();
    let closed = Undo::new(move || also.patch_spec(NODE_1, &json!({"failureMode": "Closed"})));
    cluster.patch_spec(NODE_1, &json!({"failureMode": "Open"}))?;
    let undo = keep_down(cluster, NODE_1)?;
    let wanted = ("ProxyAttached", "False", "NoProxy");
    cluster.wait_condition(NODE_1, wanted, Duration::from_secs(5))?;
    eventually(Duration::from_secs(5), "direct", || {
        let seen =
            stage
                .mesh("client")
                .run(&["send", "--to", &format!("{}:9000", stage.remote)])?;
        ensure!(
            mesh_tests::podtool::peer_ip(&seen)? == stage.client,
            "{seen}"
        );
        let down = cluster.condition(NODE_1, "ProxyAttached")?;
        ensure!(down["status"] == "False", "the proxy is back: {down}");
        Ok(())
    })?;
    closed.now()?;
    undo.now()?;
    ensure!(cluster.wait_in_mesh(MESH, Duration::from_secs(20))? < Duration::from_secs(20));
    Ok(())
}
