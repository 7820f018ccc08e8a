//! `kubectl apply -k config/default`, and what a user sees then.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::{Cluster, SYSTEM, items};

#[test]
fn the_controller_runs_twice_and_agent_and_proxy_on_every_node() -> Result<()> {
    let cluster = Cluster::current()?;
    let nodes = cluster.nodes()?.len();
    assert_eq!(nodes, 2);
    let ready = |kind: &str, name: &str, field: &str| {
        let path = format!("jsonpath={{.status.{field}}}");
        cluster.kubectl(&["-n", SYSTEM, "get", kind, name, "-o", &path])
    };
    assert_eq!(
        ready("deployment", "ambit-controller", "readyReplicas")?,
        "2"
    );
    for program in ["ambit-node-agent", "ambit-proxy"] {
        assert_eq!(
            ready("daemonset", program, "numberReady")?,
            nodes.to_string()
        );
        assert_eq!(
            ready("daemonset", program, "desiredNumberScheduled")?,
            nodes.to_string()
        );
    }
    Ok(())
}

#[test]
fn the_list_of_ambientnodes_shows_every_node_ready_with_tunnel_and_counts() -> Result<()> {
    let cluster = Cluster::current()?;
    let table = cluster.kubectl(&["get", "ambientnodes"])?;
    let mut lines = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let header = lines.next().context("an empty table")?;
    assert_eq!(
        header,
        [
            "NAME",
            "TUNNEL",
            "WORKLOADS",
            "ENROLLED",
            "READY",
            "REASON",
            "AGE"
        ]
    );
    let nodes = cluster.nodes()?;
    for (line, node) in lines.by_ref().zip(&nodes) {
        let [name, tunnel, workloads, enrolled, ready, reason, _] = line[..] else {
            anyhow::bail!("not seven columns: {line:?}");
        };
        assert_eq!((name, ready, reason), (node.as_str(), "True", "AllReady"));
        ensure!(["Geneve", "Veth"].contains(&tunnel), "{line:?}");
        assert_eq!(workloads.parse::<u32>()?, enrolled.parse::<u32>()?);
    }
    assert_eq!(lines.count(), 0);
    assert_eq!(table.lines().count(), nodes.len() + 1);
    Ok(())
}

#[test]
fn an_ambientnode_belongs_to_its_node() -> Result<()> {
    let cluster = Cluster::current()?;
    for node in cluster.nodes()? {
        let owner = cluster.ambient_node(&node)?["metadata"]["ownerReferences"][0].take();
        let uid = cluster.kubectl(&["get", "node", &node, "-o", "jsonpath={.metadata.uid}"])?;
        assert_eq!(
            (&owner["kind"], &owner["name"]),
            (&"Node".into(), &node.as_str().into())
        );
        assert_eq!(owner["uid"], uid.as_str());
    }
    Ok(())
}

#[test]
fn the_status_names_proxy_host_and_kernel_as_they_are() -> Result<()> {
    let cluster = Cluster::current()?;
    for node in cluster.nodes()? {
        let status = cluster.ambient_node(&node)?["status"].take();
        let pod = cluster.system_pod("ambit-proxy", &node)?;
        assert_eq!(status["proxy"]["podName"], pod.as_str());
        let field = |path| cluster.pod_field(SYSTEM, &pod, path);
        assert_eq!(status["proxy"]["podUID"], field(".metadata.uid")?.as_str());
        let ip = field(".status.podIP")?;
        assert_eq!(status["proxy"]["ip"], ip.as_str());
        let route = cluster.on_node(&node, &["ip", "-o", "route", "get", &ip])?;
        let device = status["proxy"]["device"].as_str().context("no device")?;
        ensure!(
            route.contains(&format!("dev {device} ")),
            "{device} is not in: {route}"
        );
        let release = cluster.on_node(&node, &["uname", "-r"])?;
        assert_eq!(status["kernel"]["release"], release.trim());
        assert_eq!(status["kernel"]["iptables"], cluster.iptables(&node)?);
        let host = status["hostIP"].as_str().context("no hostIP")?;
        let addresses = cluster.on_node(&node, &["ip", "-o", "-4", "address"])?;
        ensure!(
            addresses.contains(&format!(" {host}/")),
            "{host} is not in: {addresses}"
        );
    }
    Ok(())
}

#[test]
fn applying_the_manifests_again_changes_nothing() -> Result<()> {
    let cluster = Cluster::current()?;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/default");
    cluster.kubectl(&["apply", "-k", folder])?;
    // `apply` says "configured" of objects that it then leaves as they are; `diff` asks the server.
    assert_eq!(cluster.kubectl(&["diff", "-k", folder])?, "");
    Ok(())
}

#[test]
fn the_controller_answers_health_readiness_and_metrics() -> Result<()> {
    let cluster = Cluster::current()?;
    let label = "app.kubernetes.io/name=ambit-controller";
    let pods = cluster.get(&["-n", SYSTEM, "pods", "-l", label])?;
    for pod in items(&pods) {
        let name = pod["metadata"]["name"]
            .as_str()
            .context("a pod without a name")?;
        let page = |path| {
            let raw = format!("/api/v1/namespaces/{SYSTEM}/pods/{name}:15014/proxy/{path}");
            cluster.kubectl(&["get", "--raw", &raw])
        };
        page("healthz")?;
        page("readyz")?;
        ensure!(page("metrics")?.contains("# TYPE"), "no metrics");
    }
    Ok(())
}

#[test]
fn the_agents_answer_health_readiness_and_metrics() -> Result<()> {
    let cluster = Cluster::current()?;
    for node in cluster.nodes()? {
        let pod = cluster.system_pod("ambit-node-agent", &node)?;
        let page = |path| {
            let raw = format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}:15022/proxy/{path}");
            cluster.kubectl(&["get", "--raw", &raw])
        };
        page("healthz")?;
        page("readyz")?;
        ensure!(page("metrics")?.contains("# TYPE"), "no metrics");
    }
    Ok(())
}
