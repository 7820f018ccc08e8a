//! The scenarios of the data path, by number: does it succeed, which way did it go, and whom does the
//! server see. Each is played in every combination of family, node and reverse-path filter
//! ([`mesh_tests::matrix`]). Number 19 is in `withdraw.rs`, number 20 in `crash.rs`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::cluster::{Cluster, setting};
use mesh_tests::matrix::{Family, cases, families};
use mesh_tests::podtool::{Place, peer_ip};
use mesh_tests::process;
use mesh_tests::scene::{Actor, Scene, in_every_case, same, with_port};
use mesh_tests::stage::{MESH, PLAIN};
use serde_json::json;

const PODTOOL: &str = env!("CARGO_BIN_EXE_podtool");

/// No proxy had a part in it.
const DIRECT: [&str; 0] = [];

/// podtool in the network namespace of the proxy at home.
fn in_proxy(scene: &Scene) -> Result<Place> {
    let cluster = &scene.stage.cluster;
    let pod = cluster.system_pod("ambit-proxy", scene.home)?;
    Place::process(&process::of_pod(cluster, "ambit-proxy", &pod)?, PODTOOL)
}

/// The address of the proxy at home.
fn proxy_ip(scene: &Scene) -> Result<IpAddr> {
    let cluster = &scene.stage.cluster;
    let pod = cluster.system_pod("ambit-proxy", scene.home)?;
    let ips = cluster.pod_field("ambit-system", &pod, ".status.podIPs[*].ip")?;
    let mut ips = ips.split(' ').filter_map(|ip| ip.parse().ok());
    ips.find(|ip| scene.case.family.has(*ip))
        .with_context(|| format!("{pod} has no {} address", scene.case.family))
}

/// The address that the node at home speaks to its pods from: its pod-side address.
fn pod_side(scene: &Scene) -> Result<IpAddr> {
    let proxy = proxy_ip(scene)?.to_string();
    let route = ["ip", "-o", "route", "get", &proxy];
    let route = scene.stage.cluster.on_node(scene.home, &route)?;
    let mut words = route.split_whitespace().skip_while(|word| *word != "src");
    let source = words.nth(1).with_context(|| route.clone())?;
    Ok(source.parse()?)
}

#[test]
fn the_combinations_hold_every_family_both_backends_and_every_reverse_path_filter() -> Result<()> {
    let cluster = Cluster::current()?;
    let mut met = BTreeSet::new();
    for case in cases()? {
        let backend = cluster.iptables(case.home)?;
        met.extend([
            case.family.to_string(),
            backend.to_owned(),
            case.rp_filter.to_string(),
        ]);
    }
    // Whoever set this wants one of them only.
    if std::env::var("AMBIT_IPTABLES").is_ok_and(|backend| !backend.is_empty()) {
        met.extend(["nft", "legacy"].map(str::to_owned));
    }
    let mut wanted = BTreeSet::from(["0", "1", "2", "legacy", "nft"].map(str::to_owned));
    wanted.extend(families()?.iter().map(Family::to_string));
    assert_eq!(met, wanted);
    Ok(())
}

#[test]
fn s01_a_mesh_pod_reaches_a_mesh_pod_of_its_node_through_the_proxy() -> Result<()> {
    in_every_case(|scene| {
        let Scene {
            home, client, near, ..
        } = scene;
        let (peer, ways) = scene.ways(|| client.send(&near.tcp()))?;
        same(peer, client.ip)?;
        // Joined sockets on one node: the proxy checks identities, and there is no wire to encrypt.
        same(ways, [format!("{home} out {client} -> {near} plain")])
    })
}

#[test]
fn s02_a_pod_outside_the_mesh_reaches_a_mesh_pod_in_plaintext() -> Result<()> {
    in_every_case(|scene| {
        let Scene { home, near, .. } = scene;
        for from in [&scene.stranger, &scene.remote] {
            let (peer, ways) = scene.ways(|| from.send(&near.tcp()))?;
            same(peer, from.ip)?;
            same(ways, [format!("{home} in {from} -> {near} plain")])?;
        }
        Ok(())
    })
}

#[test]
fn s03_a_mesh_pod_reaches_a_pod_outside_the_mesh() -> Result<()> {
    in_every_case(|scene| {
        let Scene { home, client, .. } = scene;
        for to in [&scene.stranger, &scene.remote] {
            let (peer, ways) = scene.ways(|| client.send(&to.tcp()))?;
            same(peer, client.ip)?;
            same(ways, [format!("{home} out {client} -> {to} plain")])?;
        }
        Ok(())
    })
}

#[test]
fn s04_the_host_reaches_a_mesh_pod_directly() -> Result<()> {
    in_every_case(|scene| {
        let (peer, ways) = scene.ways(|| scene.host.send(&scene.near.tcp()))?;
        same(peer, pod_side(scene)?)?;
        same(ways, DIRECT)
    })
}

#[test]
fn s05_a_mesh_pod_reaches_a_process_of_its_node_at_the_pod_side_address() -> Result<()> {
    in_every_case(|scene| {
        let Scene { client, host, .. } = scene;
        let to = with_port(pod_side(scene)?, host.tcp_port());
        let (peer, ways) = scene.ways(|| client.send(&to))?;
        same(peer, client.ip)?;
        // The kernel looks at the table of its own addresses before any rule of ours.
        same(ways, DIRECT)
    })
}

#[test]
fn s06_a_mesh_pod_reaches_itself_by_its_address_and_by_a_cluster_ip() -> Result<()> {
    in_every_case(|scene| {
        let Scene { home, client, .. } = scene;
        let name = client.name;
        let (seen, direct) = scene.ways(|| client.run(&["send", "--to", &client.tcp()]))?;
        same(peer_ip(&seen)?, client.ip.to_string())?;
        same(&seen["pod"], name)?;
        same(direct, DIRECT)?;
        let service = scene.service(client)?;
        let (seen, proxied) = scene.ways(|| client.run(&["send", "--to", &service]))?;
        same(&seen["pod"], name)?;
        let via = format!("{name}.{MESH}.svc.cluster.local");
        let way = format!("{home} out {client} -> {client} via {via} plain");
        same(proxied, [way])
    })
}

#[test]
fn s07_the_proxys_own_traffic_goes_directly() -> Result<()> {
    in_every_case(|scene| {
        let (proxy, ip) = (in_proxy(scene)?, proxy_ip(scene)?);
        for to in [&scene.stranger, &scene.remote] {
            let (peer, ways) = scene.ways(|| proxy.send(&to.tcp()))?;
            same(peer, ip.to_string())?;
            same(ways, DIRECT)?;
        }
        Ok(())
    })
}

#[test]
fn s08_the_host_reaches_the_proxy_directly() -> Result<()> {
    in_every_case(|scene| {
        let to = with_port(proxy_ip(scene)?, 15020);
        let (seen, ways) = scene.ways(|| scene.host.run(&["connect", "--to", &to]))?;
        ensure!(seen["connected"] == true, "{seen}");
        same(ways, DIRECT)
    })
}

#[test]
fn s09_a_pod_outside_the_mesh_reaches_the_proxy_directly() -> Result<()> {
    in_every_case(|scene| {
        let to = with_port(proxy_ip(scene)?, 15020);
        for from in [&scene.stranger, &scene.remote] {
            let (seen, ways) = scene.ways(|| from.run(&["connect", "--to", &to]))?;
            ensure!(seen["connected"] == true, "{seen}");
            same(ways, DIRECT)?;
        }
        Ok(())
    })
}

#[test]
fn s10_the_proxy_sees_the_cluster_ip_that_a_mesh_pod_dials() -> Result<()> {
    in_every_case(|scene| {
        let Scene {
            home,
            away,
            client,
            far,
            ..
        } = scene;
        let service = scene.service(far)?;
        let (peer, ways) = scene.ways(|| client.send(&service))?;
        same(peer, client.ip)?;
        let via = format!("{}.{MESH}.svc.cluster.local", far.name);
        let out = format!("{home} out {client} -> {far} via {via} mtls");
        let into = format!("{away} in {client} -> {far} mtls");
        same(sorted(ways), sorted(vec![out, into]))
    })
}

#[test]
fn s11_udp_and_ping_to_and_from_a_mesh_pod_go_directly() -> Result<()> {
    in_every_case(|scene| {
        let Scene { client, remote, .. } = scene;
        for (from, to) in [
            (client, &scene.near),
            (client, &scene.far),
            (client, remote),
            (remote, client),
        ] {
            let (seen, ways) = scene.ways(|| from.run(&["udp", "--to", &to.tcp()]))?;
            same(peer_ip(&seen)?, from.ip.to_string())?;
            same(ways, DIRECT)?;
            from.run(&["ping", "--to", &to.ip.to_string()])?;
        }
        Ok(())
    })
}

#[test]
fn s12_a_mesh_pod_reaches_an_address_outside_the_cluster() -> Result<()> {
    let _serving = Place::outside(PODTOOL)?.serve()?;
    in_every_case(|scene| {
        let Scene { home, client, .. } = scene;
        let outside = setting(match scene.case.family {
            Family::V4 => "AMBIT_OUTSIDE_IP",
            Family::V6 => "AMBIT_OUTSIDE_IP6",
        })?;
        let to = with_port(outside.parse()?, 9000);
        let (peer, ways) = scene.ways(|| client.send(&to))?;
        same(peer, client.ip)?;
        same(
            ways,
            [format!("{home} out {client} -> unknown/unknown plain")],
        )
    })
}

#[test]
fn s13_what_comes_to_port_15008_of_a_mesh_pod_meets_its_proxy() -> Result<()> {
    let outside = Place::outside(PODTOOL)?;
    in_every_case(|scene| {
        let near = &scene.near;
        let (to, authority) = (near.port(15008), near.tcp());
        let call = ["hbone", "--to", &to, "--authority", &authority];
        let identity = format!("spiffe://cluster.local/ns/{MESH}/sa/{}", near.name);
        for seen in [
            outside.run(&call)?,
            scene.remote.run(&call)?,
            scene.stranger.run(&call)?,
        ] {
            same(&seen["identities"], &json!([identity]))?;
        }
        Ok(())
    })
}

#[test]
fn s14_hosts_reach_each_other_directly() -> Result<()> {
    in_every_case(|scene| {
        let (peer, ways) = scene.ways(|| scene.away_host.send(&scene.host.tcp()))?;
        same(peer, scene.away_host.ip)?;
        same(ways, DIRECT)
    })
}

#[test]
fn s15_a_mesh_pod_reaches_a_process_of_its_node_at_the_nodes_own_address() -> Result<()> {
    in_every_case(|scene| {
        let Scene { client, host, .. } = scene;
        let (peer, ways) = scene.ways(|| client.send(&host.tcp()))?;
        same(peer, client.ip)?;
        same(ways, DIRECT)
    })
}

#[test]
fn s16_a_mesh_pod_reaches_processes_of_hosts_by_a_cluster_ip() -> Result<()> {
    in_every_case(|scene| {
        let Scene { home, client, .. } = scene;
        for host in [&scene.host, &scene.away_host] {
            let service = scene.service(host)?;
            let (peer, ways) = scene.ways(|| client.send(&service))?;
            same(peer, client.ip)?;
            let via = format!("{}.{PLAIN}.svc.cluster.local", host.name);
            let way = format!("{home} out {client} -> {host} via {via} plain");
            same(ways, [way])?;
        }
        Ok(())
    })
}

/// Whether the API server's ClusterIP is of the family that is spoken: it has one, of the cluster's first family.
fn api_server_has_this_family(scene: &Scene) -> Result<bool> {
    Ok(scene.case.family == families()?[0])
}

/// Completes a TLS handshake with the API server's ClusterIP, from a pod; the server must be it.
fn reach_api_server(scene: &Scene, from: &Actor) -> Result<()> {
    let cluster = &scene.stage.cluster;
    let path = "jsonpath={.spec.clusterIP}";
    let ip = cluster.kubectl(&["get", "service", "kubernetes", "-o", path])?;
    let to = with_port(ip.parse()?, 443);
    let script = format!("openssl s_client -connect {to} </dev/null 2>&1 | grep '^subject='");
    let subject = cluster
        .exec(from.namespace, from.name, &["sh", "-c", &script])?
        .success()?;
    ensure!(subject.contains("kube-apiserver"), "{subject}");
    Ok(())
}

#[test]
fn s16_a_mesh_pod_reaches_the_api_server_by_its_cluster_ip() -> Result<()> {
    in_every_case(|scene| {
        if !api_server_has_this_family(scene)? {
            return Ok(());
        }
        let Scene { home, client, .. } = scene;
        let ((), ways) = scene.ways(|| reach_api_server(scene, client))?;
        let [way] = &ways[..] else {
            bail!("not one way: {ways:?}")
        };
        let start = format!("{home} out {client} -> ");
        let end = " via kubernetes.default.svc.cluster.local plain";
        ensure!(way.starts_with(&start) && way.ends_with(end), "{way}");
        Ok(())
    })
}

#[test]
fn s17_a_pod_outside_the_mesh_reaches_hosts_and_the_api_server_directly() -> Result<()> {
    in_every_case(|scene| {
        let stranger = &scene.stranger;
        for host in [&scene.host, &scene.away_host] {
            let service = scene.service(host)?;
            let (peer, ways) = scene.ways(|| stranger.send(&service))?;
            same(peer, stranger.ip)?;
            same(ways, DIRECT)?;
        }
        if api_server_has_this_family(scene)? {
            let ((), ways) = scene.ways(|| reach_api_server(scene, stranger))?;
            same(ways, DIRECT)?;
        }
        Ok(())
    })
}

#[test]
fn s18_a_cluster_ip_without_endpoints_is_refused_at_once() -> Result<()> {
    in_every_case(|scene| {
        let to = with_port(scene.cluster_ip(MESH, "nobody")?, 9000);
        let seen = scene.client.attempt(&["connect", "--to", &to])?;
        // By the node's own filter, which kube-proxy fills and which mesh traffic passes too.
        let error = seen["error"].as_str().context("it was not refused")?;
        ensure!(error.contains("Connection refused"), "{seen}");
        // A pod's kernel that hears of a refusal while it still sends the first packet believes only the
        // one of the second, a second later; over IPv6 it does, in the mesh and outside.
        let limit = match scene.case.family {
            Family::V4 => 1000,
            Family::V6 => 2000,
        };
        let took = seen["ms"].as_u64().context("ms")?;
        ensure!(took < limit, "{seen}");
        Ok(())
    })
}

#[test]
fn s21_a_mesh_pod_reaches_a_mesh_pod_of_another_node_over_hbone() -> Result<()> {
    in_every_case(|scene| {
        let Scene {
            home,
            away,
            client,
            far,
            ..
        } = scene;
        let (peer, ways) = scene.ways(|| client.send(&far.tcp()))?;
        same(peer, client.ip)?;
        let out = format!("{home} out {client} -> {far} mtls");
        let into = format!("{away} in {client} -> {far} mtls");
        same(sorted(ways), sorted(vec![out, into]))
    })
}

#[test]
fn s22_large_bodies_half_closes_and_single_bytes_arrive_whole() -> Result<()> {
    let large = large_body()?;
    in_every_case(|scene| {
        let Scene {
            client, near, far, ..
        } = scene;
        let mut bodies = vec![(near, 60 << 10), (far, 60 << 10)];
        if scene.first_of_family {
            bodies.push((far, large));
        }
        for server in [near, far] {
            client.run(&["half-close", "--to", &server.port(9001)])?;
            client.run(&["dribble", "--to", &server.tcp()])?;
        }
        for (server, bytes) in bodies {
            let (bytes, web) = (bytes.to_string(), format!("http://{}", server.port(8080)));
            let page = format!("{web}/bytes/{bytes}");
            let down = client.run(&["download", &page, "--timeout", "120"])?;
            same(&down["bytes"].to_string(), &bytes)?;
            let page = format!("{web}/sum");
            client.run(&["upload", &page, "--bytes", &bytes, "--timeout", "120"])?;
        }
        Ok(())
    })
}

/// 1 GiB or, with `AMBIT_LARGE_BODY`, fewer bytes where an emulated processor carries them.
fn large_body() -> Result<u64> {
    match std::env::var("AMBIT_LARGE_BODY") {
        Ok(bytes) => bytes
            .parse()
            .with_context(|| format!("AMBIT_LARGE_BODY is a number, not {bytes:?}")),
        Err(_) => Ok(1 << 30),
    }
}

/// Ways in one order: they come in that of the nodes.
fn sorted(mut ways: Vec<String>) -> Vec<String> {
    ways.sort();
    ways
}
