//! Holding a new pod's traffic back, between its first moment and its enrolment.
//!
//! ```text
//!  agent ──orders: which namespaces──▶ /var/lib/ambit/guard.json ─┐
//!    │ install: into the CNI chain                                ├─▶ ambit-cni (ADD): record, then ip rule
//!    ▼                                                            │        │
//!  /etc/cni/net.d, /opt/cni/bin ──▶ container runtime ──pod───────┘        ▼
//!  agent ◀──records: whose hold is it── /run/ambit/held/*.json ◀── (kernel keeps the rule, needs nobody)
//!    └─ enrolled, or to stay out, or gone: takes the rule away, then the record
//! ```
//!
//! The plugin needs neither agent nor API server. What it does for a pod of the mesh can fail that pod
//! only; for any other pod it hands on what the plugin before it said.

pub mod conflist;
mod file;
pub mod install;
pub mod orders;
pub mod record;

/// Name of the program, and of the plugin in a chain.
pub const PROGRAM: &str = "ambit-cni";

/// Where the agent leaves its orders: they outlive a reboot.
pub const ORDERS: &str = "/var/lib/ambit/guard.json";

/// Where records of holds are: they go with the kernel's rules when the node reboots.
pub const RECORDS: &str = "/run/ambit/held";
