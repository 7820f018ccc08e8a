//! Ambit's Kubernetes objects.
//!
//! ```text
//!  controller ──spec.workloads──▶ AmbientNode ──spec──▶ agent
//!  user ──the rest of spec──────▶             ◀─status── agent
//! ```

pub mod ambient_node;

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

/// Field manager of the controller: owns `spec.workloads`.
pub const CONTROLLER_MANAGER: &str = "ambit-controller";

/// Field manager of the node agent: owns `status`.
pub const AGENT_MANAGER: &str = "ambit-node-agent";

/// Label of namespaces and pods that decides about enrolment (default; configurable).
pub const DATAPLANE_MODE_LABEL: &str = "istio.io/dataplane-mode";

/// Value of [`DATAPLANE_MODE_LABEL`] that enrols.
pub const DATAPLANE_MODE_AMBIENT: &str = "ambient";

/// Value of [`DATAPLANE_MODE_LABEL`] on a pod that opts out.
pub const DATAPLANE_MODE_NONE: &str = "none";

/// Condition types of an [`AmbientNode`].
pub mod conditions {
    /// All of the below are true.
    pub const READY: &str = "Ready";
    /// A proxy of this node said hello and is who it claims to be.
    pub const PROXY_ATTACHED: &str = "ProxyAttached";
    /// Tunnel devices between host and proxy stand, in both namespaces.
    pub const TUNNELS_READY: &str = "TunnelsReady";
    /// Rules, routes, sets, chains and sysctls are as desired.
    pub const REDIRECTION_READY: &str = "RedirectionReady";
    /// The proxy's listeners are bound.
    pub const LISTENERS_READY: &str = "ListenersReady";
    /// Every workload of the spec is enrolled.
    pub const WORKLOADS_READY: &str = "WorkloadsReady";
}
