//! The benchmark's pods: a client on the first node, a server on each, in and outside the mesh.

use std::time::Duration;

use anyhow::Result;
use mesh_tests::cluster::Cluster;

/// Namespace outside the mesh.
pub(crate) const PLAIN: &str = "bench-plain";
/// Namespace in the mesh.
pub(crate) const MESH: &str = "bench-mesh";

/// Addresses of the servers.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    plain: Servers,
    mesh: Servers,
}

#[derive(Clone, Debug)]
struct Servers {
    near: String,
    far: String,
}

impl Places {
    /// Address of a server in `namespace`, on the client's node or on the other.
    pub(crate) fn server(&self, namespace: &str, same_node: bool) -> &str {
        let servers = if namespace == MESH {
            &self.mesh
        } else {
            &self.plain
        };
        if same_node {
            &servers.near
        } else {
            &servers.far
        }
    }
}

/// Deploys the pods, enrols their namespace and waits until the mesh carries it.
pub(crate) fn deploy(cluster: &Cluster, image: &str) -> Result<Places> {
    let nodes = cluster.nodes()?;
    let [near, far, ..] = nodes.as_slice() else {
        anyhow::bail!("the benchmark needs two nodes, the cluster has {nodes:?}");
    };
    for (namespace, mode) in [(PLAIN, "none"), (MESH, "ambient")] {
        cluster.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {namespace}, \
             labels: {{istio.io/dataplane-mode: {mode}}}}}}}"
        ))?;
        for (pod, node, arguments) in [
            ("client", near, r#"["sleep", "infinity"]"#),
            ("near", near, r#"["load", "serve"]"#),
            ("far", far, r#"["load", "serve"]"#),
        ] {
            cluster.apply(&pod_manifest(namespace, pod, node, image, arguments))?;
        }
    }
    cluster.wait_ready(PLAIN)?;
    cluster.wait_ready(MESH)?;
    cluster.wait_in_mesh(MESH, Duration::from_secs(60))?;
    Ok(Places {
        plain: servers(cluster, PLAIN)?,
        mesh: servers(cluster, MESH)?,
    })
}

fn servers(cluster: &Cluster, namespace: &str) -> Result<Servers> {
    Ok(Servers {
        near: cluster.pod_field(namespace, "near", ".status.podIP")?,
        far: cluster.pod_field(namespace, "far", ".status.podIP")?,
    })
}

fn pod_manifest(namespace: &str, pod: &str, node: &str, image: &str, command: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {pod}, namespace: {namespace}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: load, image: '{image}', imagePullPolicy: Never, command: {command}}}
"
    )
}
