//! API server and controller are away for some time, under load.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_tests::api_server;
use mesh_tests::capture::{Capture, tcp_of};
use mesh_tests::cluster::{Cluster, SYSTEM};
use mesh_tests::guard::{Namespace, Undo};
use mesh_tests::load::report::{Report, Totals};
use mesh_tests::load::{Party, ensure_none_failed};
use mesh_tests::manifest::Pod;
use mesh_tests::process;
use mesh_tests::soak::{count, recorded};
use mesh_tests::stage::{NODE_1, NODE_2};
use mesh_tests::state;
use mesh_tests::wait::eventually;
use serde::Serialize;

const CONTROLLER: &str = "deployment/ambit-controller";

/// Until all is made up for once everybody is back. Kubelet may wait before it starts a proxy.
const CONVERGED: Duration = Duration::from_secs(90);

#[derive(Default, Serialize)]
struct Numbers {
    away_seconds: u64,
    churned_pods: usize,
    converged_after_ms: u128,
    #[serde(flatten)]
    traffic: Totals,
}

impl Numbers {
    fn begin(&mut self) {
        self.away_seconds = away().as_secs();
        self.churned_pods = churn();
    }

    fn take(&mut self, converged_after: Duration, traffic: &Report) {
        self.traffic.take(traffic);
        self.converged_after_ms = converged_after.as_millis();
    }
}

/// How long somebody is away.
fn away() -> Duration {
    Duration::from_secs(count(3, 300) as u64)
}

/// How many pods come and go.
fn churn() -> usize {
    count(4, 40)
}

fn party(cluster: &Cluster) -> Result<Party> {
    cluster.wait_recovered()?;
    let party = Party::gather(cluster, "outage", Some("ambient"))?;
    party.wait_in_mesh(CONVERGED)?;
    Ok(party)
}

/// Pods come on both nodes, and the first half of them goes.
fn churn_pods(cluster: &Cluster, namespace: &str) -> Result<()> {
    let name = |number: usize| format!("churn-{number}");
    let manifests: String = (0..churn())
        .map(|number| {
            let node = if number % 2 == 0 { NODE_1 } else { NODE_2 };
            Pod::new(namespace, &name(number), node).manifests()
        })
        .collect();
    cluster.apply(&manifests)?;
    for number in 0..churn() / 2 {
        cluster.kubectl(&[
            "-n",
            namespace,
            "delete",
            "pod",
            &name(number),
            "--wait=false",
        ])?;
    }
    Ok(())
}

/// Waits until every pod is in the mesh that should be, and nothing else is in the kernel.
fn wait_converged(cluster: &Cluster, namespaces: &[&str]) -> Result<Duration> {
    let start = Instant::now();
    for namespace in namespaces {
        eventually(CONVERGED, "pods that were deleted are gone", || {
            let left = cluster.kubectl(&["-n", namespace, "get", "pods", "-o", "name"])?;
            let churned = left.matches("churn-").count();
            ensure!(churned == 0 || churned == churn() - churn() / 2, "{left}");
            Ok(())
        })?;
        // Kubernetes' own parts turn to an API server that was away after half a minute only.
        eventually(CONVERGED, "ready", || cluster.wait_ready(namespace))?;
        cluster.wait_in_mesh(namespace, CONVERGED)?;
    }
    eventually(CONVERGED, "whole", || state::ensure_all_whole(cluster))?;
    Ok(start.elapsed())
}

/// Takes the controller away; it is back once the returned step is done.
fn without_controller(cluster: &Cluster) -> Result<Undo> {
    let also = cluster.clone();
    let undo = Undo::new(move || {
        also.kubectl(&["-n", SYSTEM, "scale", CONTROLLER, "--replicas=2"])?;
        let wait = [
            "-n",
            SYSTEM,
            "rollout",
            "status",
            CONTROLLER,
            "--timeout=90s",
        ];
        also.kubectl(&wait).map(drop)
    });
    cluster.kubectl(&["-n", SYSTEM, "scale", CONTROLLER, "--replicas=0"])?;
    let label = "app.kubernetes.io/name=ambit-controller";
    eventually(Duration::from_secs(60), "the controller is away", || {
        let left = cluster.kubectl(&["-n", SYSTEM, "get", "pods", "-l", label, "-o", "name"])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })?;
    Ok(undo)
}

#[test]
fn while_the_api_server_is_away_no_connection_fails_and_pods_that_come_after_it_join() -> Result<()>
{
    recorded("api_server_away", |_, numbers: &mut Numbers| {
        let cluster = Cluster::current()?;
        let party = party(&cluster)?;
        let name = party.namespace.name.as_str();
        numbers.begin();
        let (took, report) = party.under_load("outage", |_| {
            let back = api_server::stop(&cluster)?;
            std::thread::sleep(away());
            back.now()?;
            churn_pods(&cluster, name)?;
            wait_converged(&cluster, &[name])
        })?;
        numbers.take(took, &report);
        cluster.wait_recovered()?;
        ensure_none_failed(&report)
    })
}

#[test]
fn while_the_controller_is_away_no_connection_fails_and_what_came_meanwhile_joins() -> Result<()> {
    recorded("controller_away", |_, numbers: &mut Numbers| {
        let cluster = Cluster::current()?;
        let party = party(&cluster)?;
        let others = Namespace::create(&cluster, "meanwhile", Some("ambient"))?;
        numbers.begin();
        let (took, report) = party.under_load("outage", |_| {
            let back = without_controller(&cluster)?;
            churn_pods(&cluster, &others.name)?;
            std::thread::sleep(away());
            back.now()?;
            wait_converged(&cluster, &[&party.namespace.name, &others.name])
        })?;
        numbers.take(took, &report);
        cluster.wait_recovered()?;
        ensure_none_failed(&report)
    })
}

#[test]
fn proxies_that_start_again_while_both_are_away_leak_nothing_and_serve_once_they_are_back()
-> Result<()> {
    recorded("both_away", |_, numbers: &mut Numbers| {
        let cluster = Cluster::current()?;
        let party = party(&cluster)?;
        let name = party.namespace.name.as_str();
        let marker = format!("marker-of-outage-{}", std::process::id());
        numbers.away_seconds = away().as_secs();
        let mut proxies = Vec::new();
        for node in [NODE_1, NODE_2] {
            let pod = cluster.system_pod("ambit-proxy", node)?;
            proxies.push(process::of_pod(&cluster, "ambit-proxy", &pod)?);
        }
        let capture = Capture::start("outage", &tcp_of(&party.ips()?))?;
        let (took, report) = party.under_load(&marker, |_| {
            let controller = without_controller(&cluster)?;
            let api_server = api_server::stop(&cluster)?;
            for process in &proxies {
                process::kill_process(&cluster, process)?;
            }
            std::thread::sleep(away());
            api_server.now()?;
            controller.now()?;
            let start = Instant::now();
            cluster.wait_recovered()?;
            wait_converged(&cluster, &[name])?;
            Ok(start.elapsed())
        })?;
        numbers.take(took, &report);
        capture.stop()?.ensure_encrypted(&marker)?;
        // All is well again.
        let ((), after) = party.under_load(&marker, |_| {
            std::thread::sleep(Duration::from_secs(3));
            Ok(())
        })?;
        ensure_none_failed(&after)
    })
}
