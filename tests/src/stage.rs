//! The pods that most tests talk between, in the mesh and outside it. They are the same for all files
//! of tests: whoever comes first makes them, and they go with the cluster.
//!
//! ```text
//!            node-1                                     node-2
//!  in mesh   client   near ◀──────── Services ────────▶ far
//!  outside   stranger host (the node's own network)     remote
//! ```

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::manifest::{self, Pod};
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

/// The pods' addresses.
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
        let ip = |namespace, pod| cluster.pod_field(namespace, pod, ".status.podIP");
        Ok(Self {
            client: ip(MESH, "client")?,
            near: ip(MESH, "near")?,
            far: ip(MESH, "far")?,
            stranger: ip(PLAIN, "stranger")?,
            remote: ip(PLAIN, "remote")?,
            node_1: cluster.pod_field(PLAIN, "host", ".status.hostIP")?,
            cluster,
        })
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

fn manifests() -> String {
    let mut all = manifest::namespace(MESH, Some("ambient")) + &manifest::namespace(PLAIN, None);
    for (namespace, name, node) in [
        (MESH, "client", NODE_1),
        (MESH, "near", NODE_1),
        (MESH, "far", NODE_2),
        (PLAIN, "stranger", NODE_1),
        (PLAIN, "remote", NODE_2),
    ] {
        all += &Pod::new(namespace, name, node).manifests();
    }
    all += &Pod {
        host_network: true,
        ports_from: Some(19000),
        ..Pod::new(PLAIN, "host", NODE_1)
    }
    .manifests();
    for (namespace, name) in [
        (MESH, "client"),
        (MESH, "near"),
        (MESH, "far"),
        (MESH, "nobody"),
        (PLAIN, "remote"),
    ] {
        all += &manifest::service(namespace, name, name, false);
    }
    all + &manifest::service(MESH, "headless", "far", true)
}
