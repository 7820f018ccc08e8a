//! Ambit's Kubernetes objects.
//!
//! ```text
//!  controller ──spec.workloads──▶ AmbientNode ──spec──▶ agent
//!  user ──the rest of spec──────▶             ◀─status── agent
//! ```

pub mod ambient_node;
pub mod conditions;
pub mod reasons;
mod validation;

use kube::CustomResourceExt;
use serde_yaml_ng::Value;

pub use ambient_node::{
    AmbientNode, AmbientNodeSpec, AmbientNodeStatus, FailureMode, IptablesBackend, KernelStatus,
    LocalTraffic, MarksSpec, PortsSpec, ProxyStatus, TunnelEndSpec, TunnelSpec, TunnelType,
    Workload, WorkloadNote,
};

/// API group of every object here.
pub const GROUP: &str = "ambit.mesh";

/// API version of every object here.
pub const VERSION: &str = "v1alpha1";

/// Namespace that Ambit's own programs run in.
pub const SYSTEM_NAMESPACE: &str = "ambit-system";

/// Namespaces whose pods are never held back: the mesh itself needs them (DNS, CNI, kube-proxy) before it
/// can carry anybody. So it is with [`SYSTEM_NAMESPACE`], whatever it is called.
pub const UNHELD_NAMESPACES: [&str; 1] = ["kube-system"];

/// Field manager of the controller: owns `spec.workloads`, `excluded`, `meshNamespaces` and `outside`.
pub const CONTROLLER_MANAGER: &str = "ambit-controller";

/// Field manager of the node agent: owns `status`.
pub const AGENT_MANAGER: &str = "ambit-node-agent";

/// Taint of a node that starts, until it is ready (default; configurable).
pub const STARTUP_TAINT: &str = "ambit.mesh/not-ready";

/// Label of namespaces and pods that decides about enrolment (default; configurable).
pub const DATAPLANE_MODE_LABEL: &str = "istio.io/dataplane-mode";

/// Value of [`DATAPLANE_MODE_LABEL`] that enrols.
pub const DATAPLANE_MODE_AMBIENT: &str = "ambient";

/// Value of [`DATAPLANE_MODE_LABEL`] on a pod that opts out.
pub const DATAPLANE_MODE_NONE: &str = "none";

/// The CustomResourceDefinitions as YAML; committed as `crds/yaml/ambientnodes.yaml`.
///
/// # Errors
/// If a type cannot be written as YAML.
pub fn yaml() -> Result<String, serde_yaml_ng::Error> {
    let header = "# Written by: cargo run -p crds --bin crdgen > crds/yaml/ambientnodes.yaml\n";
    let mut definition = serde_yaml_ng::to_value(AmbientNode::crd())?;
    drop_number_formats(&mut definition);
    Ok(header.to_owned() + &serde_yaml_ng::to_string(&definition)?)
}

/// The API server warns about each format that it does not know, those of Rust's numbers among them.
fn drop_number_formats(schema: &mut Value) {
    match schema {
        Value::Mapping(map) => {
            if map.get("type").and_then(Value::as_str) == Some("integer") {
                map.remove("format");
            }
            map.values_mut().for_each(drop_number_formats);
        }
        Value::Sequence(items) => items.iter_mut().for_each(drop_number_formats),
        _ => {}
    }
}
