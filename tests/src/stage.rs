//! The pods that most tests talk between, in the mesh and outside it. They are the same for all files
//! of tests: whoever comes first makes them, and they go with the cluster.
//!
//! ```text
//!            node-1                                     node-2
//!  in mesh   client   near ◀──────── Services ────────▶ far    client-2
//!  outside   stranger host (the node's own network)     remote host-2
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::{Cluster, items};
use crate::manifest::{self, Pod};
use crate::matrix::{Family, families};
use crate::podtool::Place;

/// Namespace in the mesh.
pub const MESH: &str = "stage-mesh";
/// Namespace outside the mesh.
pub const PLAIN: &str = "stage-plain";
/// Start of both names.
pub const STAGE: &str = "stage-";
/// The client's node.
pub const NODE_1: &str = "node-1";
/// The other node.
pub const NODE_2: &str = "node-2";

/// Port of a host pod that serves what [`manifest::TCP`] does in others: it is the node's own.
pub const HOST_TCP: u16 = 19000;

/// The addresses that an object has, of one or both families.
type Addresses = BTreeMap<(String, String), Vec<IpAddr>>;

/// The pods and their addresses; what the fields hold is of the cluster's first family.
#[derive(Clone, Debug)]
pub struct Stage {
    /// The cluster.
    pub cluster: Cluster,
    /// Mesh pod on node 1, which most connections start from.
    pub client: String,
    /// Mesh pod on node 1.
    pub near: String,
    /// Mesh pod on node 2.
    pub far: String,
    /// Pod outside the mesh on node 1.
    pub stranger: String,
    /// Pod outside the mesh on node 2.
    pub remote: String,
    /// Node 1 itself.
    pub node_1: String,
    pods: Addresses,
    services: Addresses,
}

impl Stage {
    /// The pods, made if they are not there yet, all of them settled.
    ///
    /// # Errors
    /// If they do not run, or the mesh does not take them.
    pub fn set() -> Result<&'static Self> {
        static STAGE: OnceLock<Result<Stage, String>> = OnceLock::new();
        let stage = STAGE
            .get_or_init(|| Self::make().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        stage.cluster.wait_in_mesh(MESH, Duration::from_secs(30))?;
        Ok(stage)
    }

    fn make() -> Result<Self> {
        let cluster = Cluster::current()?;
        cluster.apply(&manifests())?;
        cluster.wait_ready(MESH)?;
        cluster.wait_ready(PLAIN)?;
        let pods = addresses(&cluster, "pods", |pod| {
            strings(&pod["status"]["podIPs"], |entry| entry["ip"].as_str())
        })?;
        let services = addresses(&cluster, "services", |service| {
            strings(&service["spec"]["clusterIPs"], Value::as_str)
        })?;
        let first = families()?[0];
        let ip = |namespace, pod| {
            let ip = of(&pods, namespace, pod, |ip| first.has(*ip))?;
            Ok::<_, anyhow::Error>(ip.to_string())
        };
        Ok(Self {
            client: ip(MESH, "client")?,
            near: ip(MESH, "near")?,
            far: ip(MESH, "far")?,
            stranger: ip(PLAIN, "stranger")?,
            remote: ip(PLAIN, "remote")?,
            node_1: ip(PLAIN, "host")?,
            cluster,
            pods,
            services,
        })
    }

    /// The address of a pod of this family; of a host pod, that of its node.
    ///
    /// # Errors
    /// If it has none.
    pub fn pod_ip(&self, namespace: &str, pod: &str, family: Family) -> Result<IpAddr> {
        of(&self.pods, namespace, pod, |ip| family.has(*ip))
            .with_context(|| format!("the {family} address of pod {namespace}/{pod}"))
    }

    /// The ClusterIP of a Service of this family.
    ///
    /// # Errors
    /// If it has none.
    pub fn cluster_ip(&self, namespace: &str, service: &str, family: Family) -> Result<IpAddr> {
        of(&self.services, namespace, service, |ip| family.has(*ip))
            .with_context(|| format!("the {family} address of Service {namespace}/{service}"))
    }

    /// Whether this is an address of the client, of either family.
    #[must_use]
    pub fn is_client(&self, ip: &str) -> bool {
        let ips = self.pods.get(&(MESH.to_owned(), "client".to_owned()));
        ips.into_iter()
            .flatten()
            .any(|client| client.to_string() == ip)
    }

    /// Podtool in a mesh pod.
    #[must_use]
    pub fn mesh(&self, pod: &str) -> Place {
        Place::pod(&self.cluster, MESH, pod)
    }

    /// Podtool in a pod outside the mesh.
    #[must_use]
    pub fn plain(&self, pod: &str) -> Place {
        Place::pod(&self.cluster, PLAIN, pod)
    }
}

/// The addresses of all objects of a kind in the stage's two namespaces.
fn addresses(
    cluster: &Cluster,
    kind: &str,
    ips: impl Fn(&Value) -> Vec<String>,
) -> Result<Addresses> {
    let mut all = Addresses::new();
    for namespace in [MESH, PLAIN] {
        for object in items(&cluster.get(&["-n", namespace, kind])?) {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            // A headless Service has the word None for an address.
            let ips = ips(object)
                .iter()
                .filter_map(|ip| ip.parse().ok())
                .collect();
            all.insert((namespace.to_owned(), name.to_owned()), ips);
        }
    }
    Ok(all)
}

fn strings(list: &Value, word: impl Fn(&Value) -> Option<&str>) -> Vec<String> {
    let entries = list.as_array().into_iter().flatten();
    entries.filter_map(word).map(str::to_owned).collect()
}

fn of(
    all: &Addresses,
    namespace: &str,
    name: &str,
    wanted: impl Fn(&IpAddr) -> bool,
) -> Result<IpAddr> {
    let found = all.get(&(namespace.to_owned(), name.to_owned()));
    found
        .and_then(|ips| ips.iter().copied().find(wanted))
        .with_context(|| format!("{namespace}/{name} has {found:?}"))
}

fn manifests() -> String {
    let mut all = manifest::namespace(MESH, Some("ambient")) + &manifest::namespace(PLAIN, None);
    for (namespace, name, node) in [
        (MESH, "client", NODE_1),
        (MESH, "near", NODE_1),
        (MESH, "far", NODE_2),
        (MESH, "client-2", NODE_2),
        (PLAIN, "stranger", NODE_1),
        (PLAIN, "remote", NODE_2),
    ] {
        all += &Pod::new(namespace, name, node).manifests();
    }
    for (name, node) in [("host", NODE_1), ("host-2", NODE_2)] {
        let pod = Pod {
            host_network: true,
            ports_from: Some(HOST_TCP),
            ..Pod::new(PLAIN, name, node)
        };
        all += &pod.manifests();
        all += &manifest::service_port(PLAIN, name, name, HOST_TCP);
    }
    for (namespace, name) in [
        (MESH, "client"),
        (MESH, "client-2"),
        (MESH, "near"),
        (MESH, "far"),
        (MESH, "nobody"),
        (PLAIN, "remote"),
    ] {
        all += &manifest::service(namespace, name, name, false);
    }
    all + &manifest::service(MESH, "headless", "far", true)
}
