//! The scenarios of the data path, by number: does it succeed, which way did it go, and whom does the
//! server see. Number 19 is in `withdraw.rs`, number 20 in `crash.rs`.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::setting;
use mesh_tests::podtool::{Place, peer_ip};
use mesh_tests::process;
use mesh_tests::stage::{MESH, NODE_1, NODE_2, STAGE, Stage};
use mesh_tests::traffic::ways_of;

const PODTOOL: &str = env!("CARGO_BIN_EXE_podtool");

/// What podtool sees, and the ways that were taken.
fn ways<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<String>)> {
    ways_of(&Stage::set()?.cluster, STAGE, work)
}

/// podtool on a node, as a process of the host.
fn on_node(node: &str) -> Result<Place> {
    Place::node(node, PODTOOL)
}

/// podtool in the network namespace of a node's proxy.
fn in_proxy(node: &str) -> Result<Place> {
    let cluster = &Stage::set()?.cluster;
    let pod = cluster.system_pod("ambit-proxy", node)?;
    Place::process(&process::of_pod(cluster, "ambit-proxy", &pod)?, PODTOOL)
}

fn proxy_ip(node: &str) -> Result<String> {
    let cluster = &Stage::set()?.cluster;
    let pod = cluster.system_pod("ambit-proxy", node)?;
    cluster.pod_field("ambit-system", &pod, ".status.podIP")
}

fn service_ip(name: &str) -> Result<String> {
    let path = "jsonpath={.spec.clusterIP}";
    Stage::set()?
        .cluster
        .kubectl(&["-n", MESH, "get", "service", name, "-o", path])
}

#[test]
fn s01_a_mesh_pod_reaches_a_mesh_pod_of_its_node_through_the_proxy() -> Result<()> {
    let stage = Stage::set()?;
    let (peer, ways) = ways(|| stage.mesh("client").send(&format!("{}:9000", stage.near)))?;
    assert_eq!(peer, stage.client);
    // Joined sockets on one node: the proxy checks identities, and there is no wire to encrypt.
    assert_eq!(
        ways,
        ["node-1 out stage-mesh/client -> stage-mesh/near plain"]
    );
    Ok(())
}

#[test]
fn s02_a_pod_outside_the_mesh_reaches_a_mesh_pod_in_plaintext() -> Result<()> {
    let stage = Stage::set()?;
    for (from, ip) in [("stranger", &stage.stranger), ("remote", &stage.remote)] {
        let (peer, ways) = ways(|| stage.plain(from).send(&format!("{}:9000", stage.near)))?;
        assert_eq!(peer, *ip);
        assert_eq!(
            ways,
            [format!(
                "node-1 in stage-plain/{from} -> stage-mesh/near plain"
            )]
        );
    }
    Ok(())
}

#[test]
fn s03_a_mesh_pod_reaches_a_pod_outside_the_mesh() -> Result<()> {
    let stage = Stage::set()?;
    for (to, ip) in [("stranger", &stage.stranger), ("remote", &stage.remote)] {
        let (peer, ways) = ways(|| stage.mesh("client").send(&format!("{ip}:9000")))?;
        assert_eq!(peer, stage.client);
        assert_eq!(
            ways,
            [format!(
                "node-1 out stage-mesh/client -> stage-plain/{to} plain"
            )]
        );
    }
    Ok(())
}

#[test]
fn s04_the_host_reaches_a_mesh_pod_directly() -> Result<()> {
    let stage = Stage::set()?;
    let status = stage.cluster.ambient_node(NODE_1)?["status"].take();
    let (peer, ways) = ways(|| on_node(NODE_1)?.send(&format!("{}:9000", stage.near)))?;
    assert_eq!(peer, status["hostIP"].as_str().context("status.hostIP")?);
    assert_eq!(ways, [""; 0]);
    Ok(())
}

#[test]
fn s05_a_mesh_pod_reaches_a_process_of_its_node_at_the_pod_side_address() -> Result<()> {
    let stage = Stage::set()?;
    let status = stage.cluster.ambient_node(NODE_1)?["status"].take();
    let host = status["hostIP"].as_str().context("status.hostIP")?;
    let (peer, ways) = ways(|| stage.mesh("client").send(&format!("{host}:19000")))?;
    assert_eq!(peer, stage.client);
    // The kernel looks at the table of its own addresses before any rule of ours.
    assert_eq!(ways, [""; 0]);
    Ok(())
}

#[test]
fn s06_a_mesh_pod_reaches_itself_by_its_address_and_by_a_cluster_ip() -> Result<()> {
    let stage = Stage::set()?;
    let client = stage.mesh("client");
    let (seen, direct) = ways(|| client.run(&["send", "--to", &format!("{}:9000", stage.client)]))?;
    assert_eq!(
        (peer_ip(&seen)?, &seen["pod"]),
        (stage.client.clone(), &"client".into())
    );
    assert_eq!(direct, [""; 0]);
    let service = service_ip("client")?;
    let (seen, proxied) = ways(|| client.run(&["send", "--to", &format!("{service}:9000")]))?;
    assert_eq!(seen["pod"], "client");
    assert_eq!(
        proxied,
        [
            "node-1 out stage-mesh/client -> stage-mesh/client via client.stage-mesh.svc.cluster.local plain"
        ]
    );
    Ok(())
}

#[test]
fn s07_the_proxys_own_traffic_goes_directly() -> Result<()> {
    let stage = Stage::set()?;
    let (proxy, ip) = (in_proxy(NODE_1)?, proxy_ip(NODE_1)?);
    for to in [&stage.stranger, &stage.remote] {
        let (peer, ways) = ways(|| proxy.send(&format!("{to}:9000")))?;
        assert_eq!(peer, ip);
        assert_eq!(ways, [""; 0]);
    }
    Ok(())
}

#[test]
fn s08_the_host_reaches_the_proxy_directly() -> Result<()> {
    let to = format!("{}:15020", proxy_ip(NODE_1)?);
    let (seen, ways) = ways(|| on_node(NODE_1)?.run(&["connect", "--to", &to]))?;
    assert_eq!(seen["connected"], true, "{seen}");
    assert_eq!(ways, [""; 0]);
    Ok(())
}

#[test]
fn s09_a_pod_outside_the_mesh_reaches_the_proxy_directly() -> Result<()> {
    let stage = Stage::set()?;
    let to = format!("{}:15020", proxy_ip(NODE_1)?);
    for from in ["stranger", "remote"] {
        let (seen, ways) = ways(|| stage.plain(from).run(&["connect", "--to", &to]))?;
        assert_eq!(seen["connected"], true, "{seen}");
        assert_eq!(ways, [""; 0]);
    }
    Ok(())
}

#[test]
fn s10_the_proxy_sees_the_cluster_ip_that_a_mesh_pod_dials() -> Result<()> {
    let stage = Stage::set()?;
    let to = format!("{}:9000", service_ip("far")?);
    let (peer, ways) = ways(|| stage.mesh("client").send(&to))?;
    assert_eq!(peer, stage.client);
    assert_eq!(
        ways,
        [
            "node-1 out stage-mesh/client -> stage-mesh/far via far.stage-mesh.svc.cluster.local mtls",
            "node-2 in stage-mesh/client -> stage-mesh/far mtls",
        ]
    );
    Ok(())
}

#[test]
fn s11_udp_and_ping_to_and_from_a_mesh_pod_go_directly() -> Result<()> {
    let stage = Stage::set()?;
    for (from, ip, to) in [
        (stage.mesh("client"), &stage.client, &stage.near),
        (stage.mesh("client"), &stage.client, &stage.far),
        (stage.mesh("client"), &stage.client, &stage.remote),
        (stage.plain("remote"), &stage.remote, &stage.client),
    ] {
        let to_port = format!("{to}:9000");
        let (seen, ways) = ways(|| from.run(&["udp", "--to", &to_port]))?;
        assert_eq!((&peer_ip(&seen)?, ways), (ip, vec![]));
        from.run(&["ping", "--to", to])?;
    }
    Ok(())
}

#[test]
fn s12_a_mesh_pod_reaches_an_address_outside_the_cluster() -> Result<()> {
    let stage = Stage::set()?;
    let outside = setting("AMBIT_OUTSIDE_IP")?;
    let _serving = Place::outside(PODTOOL)?.serve()?;
    let (peer, ways) = ways(|| stage.mesh("client").send(&format!("{outside}:9000")))?;
    assert_eq!(peer, stage.client);
    assert_eq!(
        ways,
        ["node-1 out stage-mesh/client -> unknown/unknown plain"]
    );
    Ok(())
}

#[test]
fn s13_what_comes_to_port_15008_of_a_mesh_pod_meets_its_proxy() -> Result<()> {
    let stage = Stage::set()?;
    let to = format!("{}:15008", stage.near);
    let authority = format!("{}:9000", stage.near);
    let call = ["hbone", "--to", &to, "--authority", &authority];
    for from in [
        Place::outside(PODTOOL)?,
        stage.plain("remote"),
        stage.plain("stranger"),
    ] {
        let seen = from.run(&call)?;
        let identity = format!("spiffe://cluster.local/ns/{MESH}/sa/near");
        assert_eq!(seen["identities"], serde_json::json!([identity]), "{seen}");
    }
    Ok(())
}

#[test]
fn s14_hosts_reach_each_other_directly() -> Result<()> {
    let stage = Stage::set()?;
    let node_2 = stage.cluster.kubectl(&[
        "get",
        "node",
        NODE_2,
        "-o",
        "jsonpath={.status.addresses[0].address}",
    ])?;
    let (peer, ways) = ways(|| on_node(NODE_2)?.send(&format!("{}:19000", stage.node_1)))?;
    assert_eq!(peer, node_2);
    assert_eq!(ways, [""; 0]);
    Ok(())
}

#[test]
fn s15_a_mesh_pod_reaches_a_process_of_its_node_at_the_nodes_own_address() -> Result<()> {
    let stage = Stage::set()?;
    let (peer, ways) = ways(|| {
        stage
            .mesh("client")
            .send(&format!("{}:19000", stage.node_1))
    })?;
    assert_eq!(peer, stage.client);
    assert_eq!(ways, [""; 0]);
    Ok(())
}

/// Completes a TLS handshake with the API server's ClusterIP from a pod; the server's subject.
fn api_server_seen_from(namespace: &str, pod: &str) -> Result<String> {
    let cluster = &Stage::set()?.cluster;
    let path = "jsonpath={.spec.clusterIP}";
    let ip = cluster.kubectl(&["get", "service", "kubernetes", "-o", path])?;
    let script = format!("openssl s_client -connect {ip}:443 </dev/null 2>&1 | grep '^subject='");
    cluster
        .exec(namespace, pod, &["sh", "-c", &script])?
        .success()
}

#[test]
fn s16_a_mesh_pod_reaches_the_api_server_by_its_cluster_ip() -> Result<()> {
    let (subject, ways) = ways(|| api_server_seen_from(MESH, "client"))?;
    assert!(subject.contains("kube-apiserver"), "{subject}");
    assert_eq!(ways.len(), 1, "{ways:?}");
    assert!(
        ways[0].starts_with("node-1 out stage-mesh/client -> "),
        "{ways:?}"
    );
    assert!(
        ways[0].ends_with(" via kubernetes.default.svc.cluster.local plain"),
        "{ways:?}"
    );
    Ok(())
}

#[test]
fn s17_a_pod_outside_the_mesh_reaches_the_api_server_directly() -> Result<()> {
    let (subject, ways) = ways(|| api_server_seen_from("stage-plain", "stranger"))?;
    assert!(subject.contains("kube-apiserver"), "{subject}");
    assert_eq!(ways, [""; 0]);
    Ok(())
}

#[test]
fn s18_a_cluster_ip_without_endpoints_is_refused_at_once() -> Result<()> {
    let stage = Stage::set()?;
    let to = format!("{}:9000", service_ip("nobody")?);
    let seen = stage
        .mesh("client")
        .attempt(&["connect", "--to", &to], "")?;
    // By the node's own filter, which kube-proxy fills and which mesh traffic passes too.
    let error = seen["error"].as_str().context("it was not refused")?;
    ensure!(error.contains("Connection refused"), "{seen}");
    let took = seen["ms"].as_u64().context("ms")?;
    ensure!(took < 1000, "{seen}");
    Ok(())
}

#[test]
fn s21_a_mesh_pod_reaches_a_mesh_pod_of_another_node_over_hbone() -> Result<()> {
    let stage = Stage::set()?;
    let (peer, ways) = ways(|| stage.mesh("client").send(&format!("{}:9000", stage.far)))?;
    assert_eq!(peer, stage.client);
    assert_eq!(
        ways,
        [
            "node-1 out stage-mesh/client -> stage-mesh/far mtls",
            "node-2 in stage-mesh/client -> stage-mesh/far mtls",
        ]
    );
    Ok(())
}

#[test]
fn s22_large_bodies_half_closes_and_single_bytes_arrive_whole() -> Result<()> {
    const GIB: u64 = 1 << 30;
    let stage = Stage::set()?;
    let client = stage.mesh("client");
    for server in [&stage.near, &stage.far] {
        client.run(&["half-close", "--to", &format!("{server}:9001")])?;
        client.run(&["dribble", "--to", &format!("{server}:9000")])?;
    }
    for (server, bytes) in [
        (&stage.near, 60 << 10),
        (&stage.far, 60 << 10),
        (&stage.far, GIB),
    ] {
        let (bytes, web) = (bytes.to_string(), format!("http://{server}:8080"));
        let page = format!("{web}/bytes/{bytes}");
        let down = client.run(&["download", &page, "--timeout", "120"])?;
        assert_eq!(down["bytes"].to_string(), bytes, "{down}");
        let page = format!("{web}/sum");
        client.run(&["upload", &page, "--bytes", &bytes, "--timeout", "120"])?;
    }
    Ok(())
}
