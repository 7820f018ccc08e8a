//! Who is not who it should be is refused, with the codes of the field and a line in the log.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::guard::{Namespace, Undo};
use mesh_tests::manifest::Pod;
use mesh_tests::pki::Ca;
use mesh_tests::podtool::Place;
use mesh_tests::stage::{MESH, NODE_1, NODE_2, Stage};
use mesh_tests::traffic::{log_of, now};
use mesh_tests::wait::eventually;
use serde_json::Value;

const PODTOOL: &str = env!("CARGO_BIN_EXE_podtool");

/// Speaks HBONE to the proxy of pod `far` from outside the cluster.
struct Stranger {
    stage: &'static Stage,
    since: String,
}

impl Stranger {
    fn new() -> Result<Self> {
        Ok(Self {
            stage: Stage::set()?,
            since: now()?,
        })
    }

    fn dial(&self, certificate: Option<&str>, authority: &str) -> Result<Value> {
        let to = format!("{}:15008", self.stage.far);
        let mut call = vec!["hbone", "--to", &to, "--authority", authority];
        if certificate.is_some() {
            call.push("--certificate");
        }
        Place::outside(PODTOOL)?.attempt(&call, certificate.unwrap_or_default())
    }

    /// Waits for a line about a failed connection with these words.
    fn logged(&self, words: &str) -> Result<()> {
        logged(&self.stage.cluster, NODE_2, &self.since, words)
    }

    fn far(&self, port: u16) -> String {
        format!("{}:{port}", self.stage.far)
    }
}

fn logged(cluster: &Cluster, node: &str, since: &str, words: &str) -> Result<()> {
    eventually(Duration::from_secs(10), "the log says why", || {
        let lines = log_of(cluster, node, since, "connection failed")?;
        ensure!(
            lines.iter().any(|line| line.contains(words)),
            "no {words:?} in {lines:#?}"
        );
        Ok(())
    })
    .map(drop)
}

fn of_the_mesh(stage: &Stage) -> Result<String> {
    Ca::of_the_mesh(&stage.cluster)?.issue(&format!("spiffe://cluster.local/ns/{MESH}/sa/client"))
}

#[test]
fn a_peer_of_the_mesh_is_let_in() -> Result<()> {
    let stranger = Stranger::new()?;
    let certificate = of_the_mesh(stranger.stage)?;
    let seen = stranger.dial(Some(&certificate), &stranger.far(9000))?;
    assert_eq!(seen["status"], 200, "{seen}");
    let received = seen["received"].as_str().unwrap_or_default();
    // The greeting of the server itself, and the line that came back.
    ensure!(
        received.contains("\"pod\":\"far\"") && received.ends_with("\nping\n"),
        "{seen}"
    );
    Ok(())
}

#[test]
fn a_peer_without_a_certificate_is_refused() -> Result<()> {
    let stranger = Stranger::new()?;
    let seen = stranger.dial(None, &stranger.far(9000))?;
    ensure!(
        seen["refused"].is_string() && seen["status"].is_null(),
        "{seen}"
    );
    stranger.logged("peer sent no certificates")
}

#[test]
fn a_peer_whose_certificate_leads_to_another_root_is_refused() -> Result<()> {
    let stranger = Stranger::new()?;
    let certificate =
        Ca::of_nobody()?.issue(&format!("spiffe://cluster.local/ns/{MESH}/sa/client"))?;
    let seen = stranger.dial(Some(&certificate), &stranger.far(9000))?;
    ensure!(
        seen["refused"].is_string() && seen["status"].is_null(),
        "{seen}"
    );
    stranger.logged("UnknownIssuer")
}

#[test]
fn a_peer_of_another_trust_domain_is_refused() -> Result<()> {
    let stranger = Stranger::new()?;
    let identity = "spiffe://elsewhere.example/ns/stage-mesh/sa/client";
    let certificate = Ca::of_the_mesh(&stranger.stage.cluster)?.issue(identity)?;
    let seen = stranger.dial(Some(&certificate), &stranger.far(9000))?;
    ensure!(
        seen["refused"].is_string() && seen["status"].is_null(),
        "{seen}"
    );
    stranger.logged(&format!(
        "{identity} is not of this trust domain (cluster.local)"
    ))
}

#[test]
fn a_connect_to_another_pod_than_the_one_dialled_gets_400() -> Result<()> {
    let stranger = Stranger::new()?;
    let certificate = of_the_mesh(stranger.stage)?;
    let authority = format!("{}:9000", stranger.stage.near);
    let seen = stranger.dial(Some(&certificate), &authority)?;
    assert_eq!(seen["status"], 400, "{seen}");
    stranger.logged(&format!(
        "the authority {authority} is not an address of the destination pod"
    ))
}

#[test]
fn a_connect_to_a_name_gets_400() -> Result<()> {
    let stranger = Stranger::new()?;
    let certificate = of_the_mesh(stranger.stage)?;
    let seen = stranger.dial(Some(&certificate), "far.stage-mesh:9000")?;
    assert_eq!(seen["status"], 400, "{seen}");
    stranger.logged("\"far.stage-mesh:9000\" is no address and port")
}

#[test]
fn a_connect_to_a_port_that_refuses_gets_503() -> Result<()> {
    let stranger = Stranger::new()?;
    let certificate = of_the_mesh(stranger.stage)?;
    let seen = stranger.dial(Some(&certificate), &stranger.far(9999))?;
    assert_eq!(seen["status"], 503, "{seen}");
    stranger.logged(&stranger.far(9999))
}

#[test]
fn a_connect_to_the_proxys_own_port_gets_503() -> Result<()> {
    let stranger = Stranger::new()?;
    let certificate = of_the_mesh(stranger.stage)?;
    let seen = stranger.dial(Some(&certificate), &stranger.far(15008))?;
    assert_eq!(seen["status"], 503, "{seen}");
    stranger.logged("port 15008 is the proxy's own")
}

#[test]
fn a_server_that_presents_another_workloads_certificate_is_not_talked_to() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    let namespace = Namespace::create(cluster, "wrong", Some("ambient"))?;
    let name = namespace.name.as_str();
    let pods = Pod::new(name, "expected", NODE_2).manifests()
        + &Pod::new(name, "other", NODE_2).manifests();
    cluster.apply(&pods)?;
    cluster.wait_ready(name)?;
    cluster.wait_in_mesh(name, Duration::from_secs(20))?;
    let expected = cluster.pod_field(name, "expected", ".status.podIP")?;
    let other = cluster.pod_field(name, "other", ".status.podIP")?;

    // As a network that leads the expected pod's address astray would.
    let (target, port) = (format!("{other}:15008"), "15008");
    let rule = [
        "PREROUTING",
        "-p",
        "tcp",
        "-d",
        &expected,
        "--dport",
        port,
        "-j",
        "DNAT",
        "--to",
        &target,
    ];
    let change = |action: &str| {
        [&["iptables", "-w", "-t", "nat", action], &rule[..]]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let (add, delete) = (change("-I"), change("-D"));
    run_on_node(cluster, &add)?;
    let also = cluster.clone();
    let undo = Undo::new(move || run_on_node(&also, &delete));

    let since = now()?;
    let seen = stage
        .mesh("client")
        .attempt(&["send", "--to", &format!("{expected}:9000")], "")?;
    ensure!(seen["error"].is_string(), "{seen}");
    let identity = |account: &str| format!("spiffe://cluster.local/ns/{name}/sa/{account}");
    let words = format!(
        "the peer is {}, expected is {}",
        identity("other"),
        identity("expected")
    );
    logged(cluster, NODE_1, &since, &words)?;
    undo.now()?;
    stage
        .mesh("client")
        .send(&format!("{expected}:9000"))
        .map(drop)
}

fn run_on_node(cluster: &Cluster, command: &[String]) -> Result<()> {
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    cluster.on_node(NODE_2, &words).map(drop)
}
