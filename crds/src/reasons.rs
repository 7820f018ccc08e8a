//! Reasons of conditions and of pending workloads: the whole list, one word each.
//!
//! `Ready` repeats the reason of the first condition that is not true, so that
//! `kubectl get ambientnodes` says why.

// === What is as it should be ===

/// `Ready`: everything is.
pub const READY: &str = "AllReady";
/// `ProxyAttached`: the node's proxy is connected.
pub const ATTACHED: &str = "Attached";
/// `TunnelsReady`: the devices stand.
pub const TUNNELS_UP: &str = "TunnelsUp";
/// `RedirectionReady`: the kernel holds all of it, as read back.
pub const REDIRECTING: &str = "Redirecting";
/// `ListenersReady`: all are bound.
pub const LISTENING: &str = "Listening";
/// `WorkloadsReady`: all are enrolled.
pub const ALL_ENROLLED: &str = "AllEnrolled";

// === What is not ===

/// The spec has a value that the agent cannot use; the message names the field.
pub const INVALID_SPEC: &str = "InvalidSpec";
/// No proxy is connected to the agent.
pub const NO_PROXY: &str = "NoProxy";
/// Who said hello is not this node's proxy.
pub const PROXY_REJECTED: &str = "ProxyRejected";
/// The proxy's network namespace cannot be redirected to (its CNI, its device).
pub const PROXY_UNUSABLE: &str = "ProxyUnusable";
/// The kernel has no geneve driver.
pub const GENEVE_UNSUPPORTED: &str = "GeneveUnsupported";
/// Somebody else's device has one of our names.
pub const FOREIGN_DEVICE: &str = "ForeignDevice";
/// Others on this node use the bits of a mark.
pub const MARKS_CONFLICT: &str = "MarksConflict";
/// kube-proxy runs in IPVS mode, where ClusterIPs cannot be redirected.
pub const IPVS_UNSUPPORTED: &str = "IpvsUnsupported";
/// A program of iptables is missing.
pub const IPTABLES_MISSING: &str = "IptablesMissing";
/// The set of pods' addresses has no room left.
pub const SET_FULL: &str = "SetFull";
/// The kernel could not be read.
pub const OBSERVE_FAILED: &str = "ObserveFailed";
/// The kernel refused a change; the message names it.
pub const APPLY_FAILED: &str = "ApplyFailed";
/// What was applied is not there when read back: somebody else changes it.
pub const NOT_CONVERGED: &str = "NotConverged";
/// The proxy could not bind a listener.
pub const LISTENER_FAILED: &str = "ListenerFailed";
/// The proxy has not answered yet.
pub const WAITING_FOR_PROXY: &str = "WaitingForProxy";
/// Some workloads are not enrolled; `status.pending` names them.
pub const WORKLOADS_PENDING: &str = "WorkloadsPending";

// === Why one workload is pending ===

/// The proxy failed to prepare for it, for example it got no certificate.
pub const PROXY_FAILED: &str = "ProxyFailed";
/// It has no address that can be used.
pub const NO_ADDRESS: &str = "NoAddress";
/// Its route or set member is not in the kernel yet.
pub const NOT_APPLIED: &str = "NotApplied";
