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
/// The proxy's pod has no veth to the host: macvlan, ipvlan, SR-IOV, or the host's own network.
pub const PROXY_WITHOUT_VETH: &str = "ProxyWithoutVeth";
/// The kernel has no geneve driver.
pub const GENEVE_UNSUPPORTED: &str = "GeneveUnsupported";
/// Somebody else has the UDP port of the geneve devices.
pub const GENEVE_PORT_IN_USE: &str = "GenevePortInUse";
/// Somebody else's device has one of our names.
pub const FOREIGN_DEVICE: &str = "ForeignDevice";
/// Others on this node use the bits of a mark.
pub const MARKS_CONFLICT: &str = "MarksConflict";
/// kube-proxy runs in IPVS mode, where ClusterIPs cannot be redirected.
pub const IPVS_UNSUPPORTED: &str = "IpvsUnsupported";
/// A CNI's BPF programs carry packets past netfilter; while the condition is true, somebody's program is
/// attached to the proxy's device and might.
pub const EBPF_DATA_PATH: &str = "EbpfDataPath";
/// A rule, for example of Calico, drops what the proxy sends from pods' addresses.
pub const SOURCE_CHECK: &str = "SourceCheck";
/// The plugin that holds new pods back is not in the host's CNI chain; while the condition is true, new
/// pods talk directly until they are enrolled.
pub const NEW_PODS_NOT_HELD: &str = "NewPodsNotHeld";
/// The node does not forward packets.
pub const FORWARDING_DISABLED: &str = "ForwardingDisabled";
/// The agent cannot write below `/proc/sys/net`.
pub const SYSCTL_READ_ONLY: &str = "SysctlReadOnly";
/// The agent lacks a capability.
pub const CAPABILITY_MISSING: &str = "CapabilityMissing";
/// The kernel lacks a part; the message names its module.
pub const KERNEL_MODULE_MISSING: &str = "KernelModuleMissing";
/// The host's rules are in another backend of iptables than Ambit's chains.
pub const IPTABLES_BACKEND_CHANGED: &str = "IptablesBackendChanged";
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
