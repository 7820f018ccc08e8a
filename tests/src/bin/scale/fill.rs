//! What stands in the API server: namespaces of the mesh, nodes, pods with a status, Services. Kubernetes' own controllers
//! add service accounts and endpoint slices.

use std::future::Future;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use mesh_tests::cluster::SYSTEM;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const NAMESPACES: usize = 20;
/// Requests to the API server at once.
const AT_ONCE: usize = 48;
/// Of so many pods one stays out of the mesh.
const OUT_OF: usize = 20;

/// How large the cluster is.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Nodes, each with a proxy.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Pods, proxies not among them.
    #[arg(long, default_value_t = 50_000)]
    pods: usize,
    /// Services, which share the pods.
    #[arg(long, default_value_t = 2000)]
    services: usize,
}

/// A pod as it was made.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) node: String,
    pub(crate) in_mesh: bool,
}

impl Made {
    /// Namespace and name.
    pub(crate) fn key(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

/// A filled cluster.
#[derive(Debug)]
pub(crate) struct Filled {
    pub(crate) size: Size,
    pub(crate) pods: Vec<Made>,
}

impl Filled {
    /// How many pods are in the mesh.
    pub(crate) fn enrolled(&self) -> usize {
        self.pods.iter().filter(|pod| pod.in_mesh).count()
    }

    /// How many resources discovery has: pods, proxies and Services. The API server's own Service has an endpoint that
    /// is no pod.
    pub(crate) fn resources(&self) -> usize {
        const OF_KUBERNETES: usize = 2;
        self.pods.len() + self.size.nodes + self.size.services + OF_KUBERNETES
    }
}

/// Makes everything but the proxies.
pub(crate) async fn filled(client: &Client, size: &Size) -> Result<Filled> {
    let size = *size;
    all((0..NAMESPACES).map(|i| make_namespace(client, i))).await?;
    all((0..size.nodes).map(|i| make_node(client, i))).await?;
    let pods = all((0..size.pods).map(|i| make_pod(client, &size, i))).await?;
    all((0..size.services).map(|i| make_service(client, i))).await?;
    wait_for_slices(client, size.services).await?;
    Ok(Filled { size, pods })
}

/// Makes the nodes' proxies; a token for each, as kubelet would mount it.
pub(crate) async fn proxies(client: &Client, size: &Size) -> Result<Vec<String>> {
    let nodes = size.nodes;
    all((0..size.nodes).map(|i| make_proxy(client, nodes, i))).await
}

/// Makes a pod and says that it runs.
pub(crate) async fn make_pod(client: &Client, size: &Size, i: usize) -> Result<Made> {
    let made = create_pod(client, size, i).await?;
    start_pod(client, made.key(), i).await?;
    Ok(made)
}

/// A pod that has no address yet.
pub(crate) async fn create_pod(client: &Client, size: &Size, i: usize) -> Result<Made> {
    let service = i % size.services;
    let namespace = namespace_of(service);
    let name = format!("pod-{i}");
    let node = node_name((i + i / size.services) % size.nodes);
    let in_mesh = i % OUT_OF != 7;
    let mut labels = json!({"app": format!("app-{service}")});
    if !in_mesh {
        labels["istio.io/dataplane-mode"] = json!("none");
    }
    let pod = pod(&name, labels, &node, "default")?;
    let made = Api::<Pod>::namespaced(client.clone(), &namespace)
        .create(&PostParams::default(), &pod)
        .await
        .with_context(|| format!("create pod {namespace}/{name}"))?;
    let uid = made.metadata.uid.context("a pod without a UID")?;
    Ok(Made {
        namespace,
        name,
        uid,
        node,
        in_mesh,
    })
}

/// Says that a pod runs and is ready, as kubelet would.
pub(crate) async fn start_pod(
    client: &Client,
    (namespace, name): (&str, &str),
    i: usize,
) -> Result<()> {
    // Carrier-grade NAT's network has room for four million (RFC 6598).
    let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 1)) + u32::try_from(i)?);
    let status = json!({"status": {
        "phase": "Running",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }});
    Api::<Pod>::namespaced(client.clone(), namespace)
        .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .with_context(|| format!("say that pod {namespace}/{name} runs"))
        .map(drop)
}

async fn make_proxy(client: &Client, nodes: usize, i: usize) -> Result<String> {
    let name = format!("proxy-{i}");
    let labels = json!({"app.kubernetes.io/name": "ambit-proxy"});
    let pod = pod(&name, labels, &node_name(i), "ambit-proxy")?;
    let pods = Api::<Pod>::namespaced(client.clone(), SYSTEM);
    let made = pods.create(&PostParams::default(), &pod).await;
    let uid = made.context("create a proxy's pod")?.metadata.uid;
    // Behind the addresses of all other pods, and of those that are made later.
    start_pod(client, (SYSTEM, &name), (1 << 21) + nodes + i).await?;
    let request: TokenRequest = object(json!({
        "metadata": {},
        "spec": {
            "audiences": ["istio-ca"],
            "expirationSeconds": 7200,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid},
        },
    }))?;
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), SYSTEM);
    let answer = accounts
        .create_token_request("ambit-proxy", &PostParams::default(), &request)
        .await
        .with_context(|| format!("a token of {name}"))?;
    Ok(answer
        .status
        .context("a token request without a token")?
        .token)
}

fn pod(name: &str, labels: Value, node: &str, account: &str) -> Result<Pod> {
    object(json!({
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "nodeName": node,
            "serviceAccountName": account,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "one", "image": "example.com/none"}],
        },
    }))
}

async fn make_namespace(client: &Client, i: usize) -> Result<()> {
    let name = namespace_of(i);
    let namespace = object(json!({
        "metadata": {"name": name, "labels": {"istio.io/dataplane-mode": "ambient"}},
    }))?;
    let all = Api::<Namespace>::all(client.clone());
    all.create(&PostParams::default(), &namespace).await?;
    // Pods are refused before it is there.
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), &name);
    let wait = async {
        while accounts.get_opt("default").await?.is_none() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(60), wait)
        .await
        .with_context(|| format!("{name} has no service account"))?
}

async fn make_node(client: &Client, i: usize) -> Result<()> {
    let name = node_name(i);
    let labels = json!({
        "kubernetes.io/os": "linux",
        "topology.kubernetes.io/region": "region",
        "topology.kubernetes.io/zone": format!("zone-{}", i % 3),
    });
    let node = object(json!({"metadata": {"name": name, "labels": labels}}))?;
    let nodes = Api::<Node>::all(client.clone());
    nodes.create(&PostParams::default(), &node).await?;
    let status = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    nodes
        .patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .with_context(|| format!("say that {name} is ready"))
        .map(drop)
}

async fn make_service(client: &Client, i: usize) -> Result<()> {
    let namespace = namespace_of(i);
    let service = object(json!({
        "metadata": {"name": format!("service-{i}")},
        "spec": {
            "selector": {"app": format!("app-{i}")},
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        },
    }))?;
    let services = Api::<Service>::namespaced(client.clone(), &namespace);
    services.create(&PostParams::default(), &service).await?;
    Ok(())
}

async fn wait_for_slices(client: &Client, services: usize) -> Result<()> {
    let slices = Api::<EndpointSlice>::all(client.clone());
    let wait = async {
        loop {
            let listed = slices.list_metadata(&ListParams::default()).await?;
            if listed.items.len() >= services {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::time::timeout(crate::PATIENCE, wait)
        .await
        .context("the Services have no endpoints")?
}

fn namespace_of(service: usize) -> String {
    format!("scale-{}", service % NAMESPACES)
}

fn node_name(i: usize) -> String {
    format!("node-{i}")
}

fn object<T: DeserializeOwned>(value: Value) -> Result<T> {
    Ok(serde_json::from_value(value)?)
}

async fn all<T>(work: impl Iterator<Item = impl Future<Output = Result<T>>>) -> Result<Vec<T>> {
    futures::stream::iter(work)
        .buffered(AT_ONCE)
        .try_collect()
        .await
}
