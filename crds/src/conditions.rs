//! Condition types of an [`AmbientNode`](crate::AmbientNode).

/// All of the others are true.
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

/// All but [`READY`], in the order in which one thing needs the other: the first that is not true
/// gives `Ready` its reason.
pub const PARTS: [&str; 5] = [
    PROXY_ATTACHED,
    TUNNELS_READY,
    REDIRECTION_READY,
    LISTENERS_READY,
    WORKLOADS_READY,
];
