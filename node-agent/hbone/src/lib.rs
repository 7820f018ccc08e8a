//! One connection of the mesh, from accept to copy.
//!
//! ```text
//!  15001 accept ─▶ original destination ─▶ local workload by source ─▶ upstream (directory)
//!                                    ┌──────────────┼───────────────────┐
//!                                    ▼              ▼                   ▼
//!                               pool ─▶ tunnel   policy ─▶ dial pod   dial (passthrough)
//!                                    └──────────────┴─────── copy ──────┘
//!  15008 accept ─▶ TLS (certificate by destination) ─▶ CONNECT ─▶ policy ─▶ dial pod ─▶ copy
//!  15006 accept ─▶ policy ─▶ dial pod ─▶ copy
//! ```
//!
//! What a connection reads (directory, local workloads, certificates) are immutable snapshots.

// In the order of the flow: what is known,
pub mod certificates;
pub mod directory;
pub mod identity;
pub mod local;
pub mod shared;

// accept,
mod inbound;
mod inbound_plaintext;
mod outbound;
pub mod serve;

// decide,
pub mod policy;
pub mod upstream;

// connect,
mod authority;
mod connect;
mod pool;
mod socket;
mod tls;
mod tunnel;

// copy and account.
mod access;
mod copy;
mod metrics;

#[cfg(fuzzing)]
pub mod fuzzing;

pub use access::with_causes;
pub use serve::{ListenerKind, Server};
pub use shared::{Settings, Shared};
