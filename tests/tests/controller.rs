//! The controller against the real API server: leader election, desired state, certificates.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::certificate_api::{Answer, CertificateApi, token};
use mesh_tests::cluster::{Cluster, SYSTEM, items};
use mesh_tests::command;
use mesh_tests::guard::Namespace;
use mesh_tests::manifest::Pod;
use mesh_tests::stage::{MESH, NODE_1, NODE_2, Stage};
use mesh_tests::wait::eventually;
use tonic::Code;

const AUDIENCE: &str = "istio-ca";

/// What the controller says to a proxy of node 1 that asks for `identity`.
fn ask(stage: &Stage, token: Option<&str>, identity: &str) -> Result<Answer> {
    CertificateApi::connect(&stage.cluster)?.ask(token, identity)
}

fn proxys_token(cluster: &Cluster, node: &str) -> Result<String> {
    let pod = cluster.system_pod("ambit-proxy", node)?;
    token(cluster, "ambit-proxy", Some(AUDIENCE), Some(&pod))
}

fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/{MESH}/sa/{account}")
}

fn ensure_refused(answer: Answer, code: Code, words: &str) -> Result<()> {
    let Err((got, why)) = answer else {
        bail!("a certificate was signed");
    };
    ensure!(got == code && why.contains(words), "{got:?}: {why}");
    Ok(())
}

#[test]
fn a_proxy_gets_the_certificate_of_a_workload_of_its_node() -> Result<()> {
    let stage = Stage::set()?;
    let token = proxys_token(&stage.cluster, NODE_1)?;
    let chain = ask(stage, Some(&token), &identity("client"))?
        .map_err(|(code, why)| anyhow::anyhow!("{code}: {why}"))?;
    let leaf = chain.first().context("an empty chain")?;
    let mut openssl = std::process::Command::new("openssl");
    openssl.args([
        "x509",
        "-noout",
        "-ext",
        "subjectAltName,extendedKeyUsage,basicConstraints",
    ]);
    let read = command::run(&mut openssl, leaf)?.success()?;
    ensure!(
        read.contains(&format!("URI:{}", identity("client"))),
        "{read}"
    );
    ensure!(!read.contains("CA:TRUE"), "{read}");
    Ok(())
}

#[test]
fn a_request_without_a_token_is_refused() -> Result<()> {
    let answer = ask(Stage::set()?, None, &identity("client"))?;
    ensure_refused(answer, Code::Unauthenticated, "token")
}

#[test]
fn a_token_for_another_audience_is_refused() -> Result<()> {
    let stage = Stage::set()?;
    let pod = stage.cluster.system_pod("ambit-proxy", NODE_1)?;
    let token = token(&stage.cluster, "ambit-proxy", None, Some(&pod))?;
    ensure_refused(
        ask(stage, Some(&token), &identity("client"))?,
        Code::Unauthenticated,
        "token",
    )
}

#[test]
fn a_token_of_another_service_account_is_refused() -> Result<()> {
    let stage = Stage::set()?;
    let pod = stage.cluster.system_pod("ambit-node-agent", NODE_1)?;
    let token = token(
        &stage.cluster,
        "ambit-node-agent",
        Some(AUDIENCE),
        Some(&pod),
    )?;
    let answer = ask(stage, Some(&token), &identity("client"))?;
    ensure_refused(
        answer,
        Code::Unauthenticated,
        "system:serviceaccount:ambit-system:ambit-node-agent",
    )
}

#[test]
fn a_token_that_is_bound_to_no_node_is_refused() -> Result<()> {
    let stage = Stage::set()?;
    let token = token(&stage.cluster, "ambit-proxy", Some(AUDIENCE), None)?;
    let answer = ask(stage, Some(&token), &identity("client"))?;
    ensure_refused(answer, Code::Unauthenticated, "not bound to a pod")
}

#[test]
fn a_proxy_gets_no_certificate_of_a_workload_of_another_node() -> Result<()> {
    let stage = Stage::set()?;
    let token = proxys_token(&stage.cluster, NODE_1)?;
    let answer = ask(stage, Some(&token), &identity("far"))?;
    ensure_refused(
        answer,
        Code::PermissionDenied,
        "no enrolled pod on node node-1",
    )?;
    let token = proxys_token(&stage.cluster, NODE_2)?;
    let answer = ask(stage, Some(&token), &identity("far"))?;
    ensure!(answer.is_ok(), "{answer:?}");
    Ok(())
}

#[test]
fn a_proxy_gets_no_certificate_of_a_pod_outside_the_mesh_or_of_another_trust_domain() -> Result<()>
{
    let stage = Stage::set()?;
    let token = proxys_token(&stage.cluster, NODE_1)?;
    let outside = "spiffe://cluster.local/ns/stage-plain/sa/stranger";
    ensure_refused(
        ask(stage, Some(&token), outside)?,
        Code::PermissionDenied,
        outside,
    )?;
    let elsewhere = identity("client").replace("cluster.local", "elsewhere.example");
    let answer = ask(stage, Some(&token), &elsewhere)?;
    ensure_refused(answer, Code::PermissionDenied, "elsewhere.example")
}

#[test]
fn another_replica_takes_the_lease_and_goes_on_when_the_leader_is_gone() -> Result<()> {
    let cluster = Cluster::current()?;
    let first = cluster.leader()?;
    let pods = cluster.get(&[
        "-n",
        SYSTEM,
        "pods",
        "-l",
        "app.kubernetes.io/name=ambit-controller",
    ])?;
    let names: Vec<_> = items(&pods)
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .collect();
    ensure!(
        names.contains(&first.as_str()),
        "{first:?} leads and is none of {names:?}"
    );
    // Without the grace that would let it hand the lease over.
    cluster.kubectl(&[
        "-n",
        SYSTEM,
        "delete",
        "pod",
        &first,
        "--grace-period=0",
        "--force",
    ])?;
    eventually(Duration::from_secs(40), "another leads", || {
        let now = cluster.leader()?;
        ensure!(now != first, "{now:?} leads");
        Ok(())
    })?;
    let namespace = Namespace::create(&cluster, "led", Some("ambient"))?;
    cluster.apply(&Pod::new(&namespace.name, "pod", NODE_1).manifests())?;
    cluster.wait_ready(&namespace.name)?;
    cluster.wait_in_mesh(&namespace.name, Duration::from_secs(20))?;
    cluster.wait_recovered()
}

#[test]
fn a_pod_that_is_deleted_leaves_its_nodes_workloads() -> Result<()> {
    let cluster = Cluster::current()?;
    let namespace = Namespace::create(&cluster, "gone", Some("ambient"))?;
    let name = namespace.name.as_str();
    cluster.apply(&Pod::new(name, "pod", NODE_2).manifests())?;
    cluster.wait_ready(name)?;
    cluster.wait_in_mesh(name, Duration::from_secs(20))?;
    cluster.kubectl(&["-n", name, "delete", "pod", "pod"])?;
    eventually(Duration::from_secs(20), "no workload of it", || {
        let workloads = cluster.ambient_node(NODE_2)?["spec"]["workloads"].take();
        ensure!(!workloads.to_string().contains(name), "{workloads:#}");
        Ok(())
    })
    .map(drop)
}

#[test]
fn what_others_add_to_a_nodes_workloads_is_taken_out_again() -> Result<()> {
    let stage = Stage::set()?;
    let cluster = &stage.cluster;
    let stranger = "of-no-pod";
    let change = serde_json::json!([{
        "op": "add",
        "path": "/spec/workloads/-",
        "value": {
            "uid": stranger,
            "namespace": MESH,
            "name": "stranger",
            "serviceAccount": "far",
            "ips": ["203.0.113.7"],
        },
    }]);
    let change = change.to_string();
    cluster.kubectl(&["patch", "ambientnode", NODE_2, "--type=json", "-p", &change])?;
    eventually(Duration::from_secs(20), "it is out again", || {
        let workloads = cluster.ambient_node(NODE_2)?["spec"]["workloads"].take();
        ensure!(!workloads.to_string().contains(stranger), "{workloads:#}");
        Ok(())
    })?;
    cluster.wait_recovered()
}

#[test]
fn the_controller_leaves_what_users_set_in_the_spec() -> Result<()> {
    let cluster = Cluster::current()?;
    let owner = |field: &str| -> Result<Vec<String>> {
        let node = cluster.get(&["ambientnode", NODE_1, "--show-managed-fields"])?;
        let managers = node["metadata"]["managedFields"]
            .as_array()
            .context("managedFields")?;
        Ok(managers
            .iter()
            .filter(|entry| !entry["fieldsV1"]["f:spec"][field].is_null())
            .filter(|entry| entry["operation"] == "Apply")
            .filter_map(|entry| entry["manager"].as_str().map(str::to_owned))
            .collect())
    };
    assert_eq!(owner("f:workloads")?, ["ambit-controller"]);
    for field in ["f:tunnel", "f:ports", "f:marks", "f:failureMode"] {
        assert_eq!(owner(field)?, [""; 0], "{field}");
    }
    Ok(())
}
