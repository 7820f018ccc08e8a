//! Real protocols between mesh pods of two nodes.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::guard::Namespace;
use mesh_tests::manifest::{self, Pod};
use mesh_tests::stage::{MESH, NODE_1, NODE_2, STAGE, Stage};
use mesh_tests::traffic::ways_of;
use mesh_tests::wait::{SERVED, eventually};

#[test]
fn http_1_keeps_its_connection_through_the_mesh() -> Result<()> {
    let stage = Stage::set()?;
    let page = format!("http://far.{MESH}/");
    let (seen, ways) = ways_of(&stage.cluster, STAGE, || {
        stage
            .mesh("client")
            .run(&["http", &page, "-n", "200", "--keep-alive"])
    })?;
    assert_eq!(
        (&seen["pod"], &seen["connections"]),
        (&"far".into(), &1.into())
    );
    // The server saw one port of its client, so it was one connection there too.
    assert_eq!(seen["peers"], 1);
    ensure!(
        stage.is_client(&mesh_tests::podtool::peer_ip(&seen)?),
        "{seen}"
    );
    assert!(ways.iter().all(|way| way.ends_with(" mtls")), "{ways:?}");
    Ok(())
}

#[test]
fn a_new_connection_per_request_works_two_hundred_times() -> Result<()> {
    let stage = Stage::set()?;
    let page = format!("http://far.{MESH}/");
    let seen = stage
        .mesh("client")
        .run(&["http", &page, "-n", "200", "--timeout", "60"])?;
    assert_eq!(
        (&seen["connections"], &seen["peers"]),
        (&200.into(), &200.into())
    );
    Ok(())
}

#[test]
fn http_2_without_tls_goes_through_the_mesh() -> Result<()> {
    let stage = Stage::set()?;
    let page = format!("http://far.{MESH}/");
    let client = stage.mesh("client");
    let seen = client.run(&["http", &page, "-n", "200", "--keep-alive", "--h2"])?;
    assert_eq!((&seen["pod"], &seen["peers"]), (&"far".into(), &1.into()));
    Ok(())
}

#[test]
fn redis_from_debian_serves_a_client_of_another_node() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "redis", Some("ambient"))?;
    let name = namespace.name.as_str();
    let redis = Pod {
        command: Some("[redis-server, --port, '6379', --protected-mode, 'no', --save, '']"),
        probe: Some("{tcpSocket: {port: 6379}, periodSeconds: 1}"),
        ..Pod::new(name, "redis", NODE_2)
    };
    cluster.apply(&(redis.manifests() + &Pod::new(name, "client", NODE_1).manifests()))?;
    cluster.apply(&manifest::service_port(name, "redis", "redis", 6379))?;
    cluster.wait_ready(name)?;
    cluster.wait_in_mesh(name, Duration::from_secs(20))?;
    let redis = |command: &[&str]| {
        let mut all = vec!["redis-cli", "-h", "redis"];
        all.extend(command);
        cluster.exec(name, "client", &all)?.success()
    };
    // A Service has no endpoint in the client's proxy until the news that its pod is ready got there.
    eventually(SERVED, "the Service answers", || {
        ensure!(redis(&["ping"])? == "PONG\n");
        Ok(())
    })?;
    let ((), ways) = ways_of(&cluster, name, || {
        ensure!(redis(&["set", "key", "value"])? == "OK\n");
        ensure!(redis(&["get", "key"])? == "value\n");
        // A pipeline of writes and reads on fifty connections.
        let benchmark = [
            "redis-benchmark",
            "-h",
            "redis",
            "-n",
            "2000",
            "-t",
            "set,get",
            "-P",
            "4",
            "-q",
        ];
        let printed = cluster.exec(name, "client", &benchmark)?.success()?;
        ensure!(printed.contains("GET:"), "{printed}");
        Ok(())
    })?;
    assert!(
        !ways.is_empty() && ways.iter().all(|way| way.ends_with(" mtls")),
        "{ways:?}"
    );
    Ok(())
}

#[test]
fn a_server_that_speaks_first_is_heard() -> Result<()> {
    let stage = Stage::set()?;
    for (server, ip) in [("near", &stage.near), ("far", &stage.far)] {
        // The client says nothing before it has read the server's greeting.
        let seen = stage
            .mesh("client")
            .run(&["send", "--to", &format!("{ip}:9000")])?;
        assert_eq!(seen["pod"], server);
    }
    Ok(())
}

#[test]
fn a_client_that_ends_first_still_gets_its_answer() -> Result<()> {
    let stage = Stage::set()?;
    for ip in [&stage.near, &stage.far, &stage.remote] {
        let seen = stage
            .mesh("client")
            .run(&["half-close", "--to", &format!("{ip}:9001")])?;
        assert_eq!(mesh_tests::podtool::peer_ip(&seen)?, stage.client);
    }
    Ok(())
}
